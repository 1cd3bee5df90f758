"""cli/values.py: the round trip of every config, readings of texts, and the wording of errors."""

import dataclasses
import json
from typing import Literal

import pytest

from chameleon_jax import config as configs
from chameleon_jax import presets
from chameleon_jax.cli.values import config_keys, editable, frozen, override, parse_value
from chameleon_jax.errors import ConfigError


def _train_config(**changes):
  config = configs.TrainConfig(
      model=presets.tiny_transformer(),
      vocabulary=presets.tiny_vocabulary(),
      data=configs.DataConfig(
          seq_len=64,
          stages=(
              configs.StageConfig(fraction=0.75, weights=(('emoji_text', 1.0),)),
              configs.StageConfig(fraction=0.25, weights=(('emoji_text', 0.5), ('emoji_chat', 2.0))),
          ),
      ),
  )
  return dataclasses.replace(config, **changes)


# Every dataclass of config/; those with required fields get an instance here.
EXAMPLES = {
    configs.TransformerConfig: [presets.chameleon_7b(), presets.chameleon_34b(), presets.tiny_transformer()],
    configs.StageConfig: [configs.StageConfig(fraction=1.0, weights=(('a', 1.0), ('b', 2.0)))],
    configs.TrainConfig: [_train_config(), _train_config(tokenizers='folder', init_from='other')],
}
ALL_CONFIGS = [
    value for value in vars(configs).values() if dataclasses.is_dataclass(value) and value.__module__.startswith(configs.__name__)
]


def test_the_list_of_configs_is_not_empty():
  assert {configs.TransformerConfig, configs.TrainConfig, configs.SamplingOptions} <= set(ALL_CONFIGS)


@pytest.mark.parametrize('config_type', ALL_CONFIGS, ids=lambda config_type: config_type.__name__)
def test_round_trip_of_every_config(config_type):
  for config in EXAMPLES.get(config_type) or [config_type()]:
    assert frozen(editable(config), config_type) == config
    # The same through JSON, which turns tuples into lists: what is saved beside a checkpoint reads back.
    assert frozen(json.loads(json.dumps(dataclasses.asdict(config))), config_type) == config


def test_editing_a_nested_field_and_a_tuple_of_dataclasses():
  values = editable(_train_config())
  values.optimizer.learning_rate = 1  # an int is promoted
  values.data.stages[1].fraction = 0.25
  config = frozen(values, configs.TrainConfig)
  assert config.optimizer.learning_rate == 1.0 and isinstance(config.optimizer.learning_rate, float)
  assert config.data.stages[1].weights == (('emoji_text', 0.5), ('emoji_chat', 2.0))


def test_editable_is_locked():
  values = editable(configs.OptimizerConfig())
  with pytest.raises(AttributeError):
    values.learning_rat = 1.0


@pytest.mark.parametrize(
    ('path', 'text', 'read'),
    [
        ('optimizer.learning_rate', '3e-4', lambda c: c.optimizer.learning_rate == 3e-4),
        ('optimizer.learning_rate', '1', lambda c: c.optimizer.learning_rate == 1.0),
        ('optimizer.clip_norm', 'None', lambda c: c.optimizer.clip_norm is None),
        ('optimizer.schedule', 'cosine', lambda c: c.optimizer.schedule == 'cosine'),
        ('n_steps', '1e4', lambda c: c.n_steps == 10_000 and isinstance(c.n_steps, int)),
        ('n_steps', '1_000', lambda c: c.n_steps == 1000),
        ('model.qk_norm', 'no', lambda c: c.model.qk_norm is False),
        ('tokenizers', 'a/b=c', lambda c: c.tokenizers == 'a/b=c'),
        ('tokenizers', 'none', lambda c: c.tokenizers is None),
        ('data.stages.1.weights.0.1', '7', lambda c: c.data.stages[1].weights == (('emoji_text', 7.0), ('emoji_chat', 2.0))),
        ('data.stages.0.weights', "(('emoji_pairs', 3),)", lambda c: c.data.stages[0].weights == (('emoji_pairs', 3.0),)),
        ('data.stages', "({'fraction': 1, 'weights': [['a', 1]]},)", lambda c: c.data.stages[0].fraction == 1.0),
        ('mesh', "{'data': 2, 'fsdp': 1}", lambda c: c.mesh == configs.MeshConfig(data=2, fsdp=1)),
    ],
)
def test_override(path, text, read):
  values = editable(_train_config())
  override(values, configs.TrainConfig, path, text)
  assert read(frozen(values, configs.TrainConfig))


@pytest.mark.parametrize(
    ('path', 'text', 'message'),
    [
        ('optimizer.learning_rat', '1', "'config.optimizer.learning_rat'; the nearest known key is 'config.optimizer.learning_rate'"),
        ('learning_rate', '1', "unknown key 'config.learning_rate'; the nearest known key is 'config.optimizer.learning_rate'"),
        ('modle.d_model', '1', "unknown key 'config.modle.d_model'; the nearest known key is 'config.model.d_model'"),
        ('n_stpes', '1', "unknown key 'config.n_stpes'; the nearest known key is 'config.n_steps'"),
        ('n_steps', '1.5', "config.n_steps must be int, got '1.5'"),
        ('n_steps', 'many', "config.n_steps must be int, got 'many'"),
        ('optimizer.clip_norm', 'x', "config.optimizer.clip_norm must be float, got 'x'"),
        ('model.qk_norm', 'maybe', "config.model.qk_norm must be bool, got 'maybe'"),
        ('optimizer.schedule', 'cosin', "must be one of 'exponential', 'cosine', 'constant', got 'cosin'; did you mean 'cosine'?"),
        ('data.stages.5.fraction', '1', 'config.data.stages has 2 entries'),
        ('data.stages.0.weights', "(('a',),)", 'config.data.stages.0.weights.0 must be tuple[str, float]'),
        ('optimizer.beta1.x', '1', "config.optimizer.beta1 is float and has no field 'x'"),
    ],
)
def test_override_errors_are_one_line_that_names_the_key(path, text, message):
  with pytest.raises(ConfigError) as error:
    override(editable(_train_config()), configs.TrainConfig, path, text)
  assert message in str(error.value)
  assert '\n' not in str(error.value)


def test_frozen_errors():
  values = editable(configs.OptimizerConfig())
  values.schedule = 'sawtooth'
  with pytest.raises(ConfigError, match=r"config\.schedule must be one of .* got 'sawtooth'"):
    frozen(values, configs.OptimizerConfig)
  with pytest.raises(ConfigError, match=r'config\.warmup_steps must be int, got 0\.5'):
    frozen({'warmup_steps': 0.5}, configs.OptimizerConfig)
  with pytest.raises(ConfigError, match=r'config\.accumulate_steps must be int, got True'):
    frozen({'accumulate_steps': True}, configs.OptimizerConfig)
  with pytest.raises(ConfigError, match="unknown key 'config.beta3'; the nearest known key is 'config.beta"):
    frozen({'beta3': 0.5}, configs.OptimizerConfig)
  with pytest.raises(ConfigError, match=r'config\.weights is missing'):
    frozen({'fraction': 1}, configs.StageConfig)
  # What __post_init__ refuses comes with the place of the dataclass.
  with pytest.raises(ConfigError, match=r'config\.optimizer: OptimizerConfig\.learning_rate must be positive'):
    frozen({**dataclasses.asdict(_train_config()), 'optimizer': {'learning_rate': -1.0}}, configs.TrainConfig)


@pytest.mark.parametrize(
    ('text', 'annotation', 'value'),
    [
        ('none', float | None, None),
        ('1e-4', float, 0.0001),
        ('1e5', int, 100_000),
        ('yes', bool, True),
        ('1,2,4', tuple[int, ...], (1, 2, 4)),
        ('(1, 2, 4)', tuple[int, ...], (1, 2, 4)),
        ('7', tuple[int, ...], (7,)),
        ('', tuple[int, ...], ()),
        ('a,b', tuple[str, ...], ('a', 'b')),
        ("(('text', 1),)", tuple[tuple[str, float], ...], (('text', 1.0),)),
        ('2', Literal[1, 2], 2),
        ('3', int | str, 3),
        ('x', int | str, 'x'),
    ],
)
def test_parse_value(text, annotation, value):
  got = parse_value(text, annotation, key='k')
  assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    ('text', 'annotation'), [('1,x', tuple[int, ...]), ('1,2,3', tuple[int, int]), ('nan!', float), ('{}', tuple[int, ...])]
)
def test_parse_value_refuses(text, annotation):
  with pytest.raises(ConfigError, match='^k'):
    parse_value(text, annotation, key='k')


def test_config_keys_lists_leaves_in_order():
  keys = [key for key, _, _ in config_keys(configs.ImageTokenizerTrainConfig)]
  assert keys[0] == 'config.model.resolution'
  assert 'config.discriminator_optimizer.learning_rate' in keys and 'config.optimizer' not in keys
