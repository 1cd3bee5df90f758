"""What the configs check in `__post_init__`: one line of ValueError that names the field."""


def require(condition: bool, message: str) -> None:
  if not condition:
    raise ValueError(message)


def require_positive(config: object, *names: str) -> None:
  for name in names:
    value = getattr(config, name)
    require(bool(value > 0), f'{type(config).__name__}.{name} must be positive, got {value}')


def require_fraction(config: object, *names: str) -> None:
  for name in names:
    value = getattr(config, name)
    require(bool(0 <= value <= 1), f'{type(config).__name__}.{name} must lie in [0, 1], got {value}')
