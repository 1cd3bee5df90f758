"""How the ids are laid out."""

import dataclasses

from chameleon_jax.config.checks import require, require_positive


@dataclasses.dataclass(frozen=True)
class VocabularyConfig:
  """Layout of the token space (spec model.md 5.1).

  0 begin_sequence, 1 pad, 2 end_sequence, 3 unknown, codes from 4, end_image, begin_image,
  `n_sentinels` sentinels, `n_reserved` reserved tokens of which the first is end_turn, then text up to `size`.
  The split of the release between reserved and text tokens is not established; 7,676 reserved tokens here.
  """

  size: int = 65_536
  n_codes: int = 8192
  n_sentinels: int = 512
  n_reserved: int = 7676

  def __post_init__(self):
    require_positive(self, 'size', 'n_codes', 'n_reserved')
    require(self.n_sentinels >= 0, f'n_sentinels must not be negative, got {self.n_sentinels}')
    require(self.n_text > 0, f'vocabulary of {self.size} leaves no room for text: {self.text_start} ids are taken by codes and specials')

  @property
  def text_start(self) -> int:
    """First text id."""
    return 4 + self.n_codes + 2 + self.n_sentinels + self.n_reserved

  @property
  def n_text(self) -> int:
    """Number of text ids."""
    return self.size - self.text_start
