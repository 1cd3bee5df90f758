"""The experiment files of the transformer: they resolve, and hold the settings they claim."""

import dataclasses
import pathlib

import pytest
from jax.sharding import AbstractMesh, AxisType

from chameleon_jax.cli.flags import frozen, load_config_file
from chameleon_jax.config import TrainConfig
from chameleon_jax.data.sources.source import SOURCES
from chameleon_jax.errors import ConfigError
from chameleon_jax.partitioning import AXES
from chameleon_jax.training.mesh_checks import check_mesh
from chameleon_jax.training.optimizer import make_schedule

FOLDER = pathlib.Path(__file__).resolve().parents[2] / 'experiments'


CHAMELEON = [
    f'{size},{stage},{machines}'
    for size in ('7b', '34b')
    for stage in ('pretrain', 'stage_1', 'stage_2', 'sft')
    for machines in ('v5e-256', 'v5p-128', '8xh100', '8xh200', '64xh100')
    if (size, machines) != ('34b', '8xh100')
]
DEVICES = {'v5e-256': 256, 'v5p-128': 64, '8xh100': 8, '8xh200': 8, '64xh100': 64}


def _config(name, argument=None):
  return frozen(load_config_file(str(FOLDER / f'{name}.py') + ('' if argument is None else f':{argument}')), TrainConfig)


@pytest.mark.parametrize('name', ['emoji_pretrain', 'emoji_sft', 'emoji_sft_continued', 'chameleon', 'two_processes'])
def test_every_source_is_known(name):
  config = _config(name)
  assert {source for stage in config.data.stages for source, _ in stage.weights} <= SOURCES.keys()


@pytest.mark.parametrize('name', ['emoji_pretrain', 'chameleon'])
def test_stage_2_halves_stage_1_and_adds_instructions(name):
  first, second = _config(name).data.stages
  assert (first.fraction, second.fraction) == (0.8, 0.2)
  before, after = dict(first.weights), dict(second.weights)
  assert {source: after[source] for source in before} == {source: weight / 2 for source, weight in before.items()}
  assert set(after) - set(before) == {'emoji_chat'}
  assert after['emoji_chat'] == pytest.approx(sum(before.values()) / 2)  # the other half


def test_fine_tuning_continues_the_pre_trained_model():
  pretrain, sft = _config('emoji_pretrain'), _config('emoji_sft')
  assert sft.vocabulary == pretrain.vocabulary
  assert sft.model == pretrain.model
  assert sft.optimizer.learning_rate < pretrain.optimizer.learning_rate
  continued = _config('emoji_sft_continued')
  assert continued.vocabulary == sft.vocabulary
  assert continued.model == dataclasses.replace(sft.model, dropout=0.0)
  assert (continued.init_from, sft.init_from) == ('runs/emoji/sft/model', 'runs/emoji/pretrain/model')


def test_the_tokenizers_use_the_same_vocabulary():
  from chameleon_jax.config import ImageTokenizerTrainConfig, TextTokenizerTrainConfig

  text = frozen(load_config_file(str(FOLDER / 'emoji_text_tokenizer.py')), TextTokenizerTrainConfig)
  images = frozen(load_config_file(str(FOLDER / 'emoji_image_tokenizer.py')), ImageTokenizerTrainConfig)
  pretrain = _config('emoji_pretrain')
  assert text.vocabulary == pretrain.vocabulary
  assert images.model.n_codes == pretrain.vocabulary.n_codes
  assert images.model.n_image_tokens == 64


@pytest.mark.parametrize('argument', CHAMELEON)
def test_every_size_stage_and_machine_fits_its_mesh(argument):
  config = _config('chameleon', argument)
  mesh = AbstractMesh((config.mesh.data, config.mesh.fsdp, config.mesh.tensor), AXES, axis_types=(AxisType.Auto,) * 3)
  assert mesh.size == DEVICES[argument.split(',')[2]]
  check_mesh(config, mesh)
  assert config.data.seq_len % config.loss_chunks == 0
  assert {source for stage in config.data.stages for source, _ in stage.weights} <= SOURCES.keys()


@pytest.mark.parametrize('argument', [argument for argument in CHAMELEON if ',pretrain,' in argument])
def test_pre_training_has_the_settings_of_the_paper(argument):
  config = _config('chameleon', argument)
  tokens = {'7b': 2**23, '34b': 3 * 2**22}[argument.split(',')[0]]
  assert config.data.batch_size * config.data.seq_len == tokens
  assert config.n_steps * tokens == pytest.approx(9.2e12, rel=1e-3)
  optimizer = config.optimizer
  assert (optimizer.learning_rate, optimizer.warmup_steps, optimizer.schedule) == (1e-4, 4000, 'exponential')
  assert (optimizer.beta1, optimizer.beta2, optimizer.eps, optimizer.weight_decay, optimizer.clip_norm) == (0.9, 0.95, 1e-5, 0.1, 1.0)
  assert config.z_loss == 1e-5
  recipe = (config.model.dropout, config.model.norm_position, config.model.qk_norm)
  assert recipe == ((0.1, 'pre', True) if argument.startswith('7b') else (0.0, 'post', True))


def test_the_stages_go_down_the_curve_of_the_whole_run():
  whole, first, second = (_config('chameleon', f'34b,{stage},64xh100') for stage in ('pretrain', 'stage_1', 'stage_2'))
  assert first.n_steps + second.n_steps == whole.n_steps and first.n_steps == round(0.8 * whole.n_steps)
  assert (first.data.stages[0].weights, second.data.stages[0].weights) == tuple(stage.weights for stage in whole.data.stages)
  curve, start, rest = (make_schedule(config.optimizer, config.n_steps) for config in (whole, first, second))
  for step in (0, 3999, 4000, 200_000, first.n_steps - 1):
    assert float(start(step)) == pytest.approx(float(curve(step)), rel=1e-4)
  for step in (100, 10_000, second.n_steps - 1):  # behind its own warm-up
    assert float(rest(step)) == pytest.approx(float(curve(first.n_steps + step)), rel=2e-3, abs=1e-10)


@pytest.mark.parametrize('size', ['7b', '34b'])
def test_fine_tuning_has_the_settings_of_the_paper(size):
  config = _config('chameleon', f'{size},sft,8xh200')
  assert (config.data.batch_size, config.data.seq_len, config.model.dropout, config.z_loss) == (128, 4096, 0.05, 1e-5)
  optimizer = config.optimizer
  assert (optimizer.learning_rate, optimizer.schedule, optimizer.weight_decay) == (1e-5, 'cosine', 0.1)
  assert config.n_steps == pytest.approx(2 * 2104, rel=1e-3)  # two passes over 1.103 billion tokens
  shared = _config('chameleon', f'{size},sft,v5e-256')
  assert (shared.mesh.fsdp, shared.mesh.tensor, shared.model.sequence_parallel) == (128, 2, True)


@pytest.mark.parametrize(
    ('argument', 'message'),
    [
        ('34b,pretrain,8xh100', '34b does not fit 8xh100: .* 85.7 GB a device; it fits v5e-256, v5p-128, 8xh200, 64xh100'),
        ('13b,pretrain,8xh100', "no size '13b': choose one of 7b, 34b"),
        ('7b,rl,8xh100', "no stage 'rl': choose one of pretrain, stage_1, stage_2, sft"),
        ('7b,sft,laptop', "no machines 'laptop'"),
        ('7b', "give SIZE,STAGE,MACHINES such as 34b,sft,v5p-128, not '7b'"),
    ],
)
def test_what_cannot_be_run_is_one_line(argument, message):
  with pytest.raises(ConfigError, match=message) as raised:
    _config('chameleon', argument)
  assert '\n' not in str(raised.value)


def test_an_argument_for_a_file_that_takes_none():
  with pytest.raises(ConfigError, match="emoji_sft.py' takes no argument, got '7b'"):
    _config('emoji_sft', '7b')
