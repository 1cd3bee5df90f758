"""cli/verify.py: exit codes, the table, the JSON, one line for every mistake. What is found: tests/interop/verify/test_certificate.py."""

import dataclasses
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from chameleon_jax.chameleon import Chameleon
from chameleon_jax.cli import main as cli
from chameleon_jax.interop import native
from chameleon_jax.interop.convert import convert

GOLDEN = pathlib.Path(__file__).resolve().parent.parent / 'golden'


@pytest.fixture(scope='module')
def swapped(tiny_model_folder, tmp_path_factory):
  """The tiny model with gate and up of the feed-forward swapped."""
  parts = native.load_model(tiny_model_folder)
  path = tmp_path_factory.mktemp('model') / 'swapped'

  def swap(name, leaf):
    gate, up = (parts.transformer_params['layers']['feed_forward'][key] for key in ('gate_proj', 'up_proj'))
    text = jax.tree_util.keystr(name)
    return up if 'gate_proj' in text else gate if 'up_proj' in text else leaf

  params = jax.tree_util.tree_map_with_path(swap, parts.transformer_params)
  native.save_model(path, dataclasses.replace(parts, transformer_params=params))
  return path


@pytest.fixture(scope='module')
def golden(tiny_model_folder, tmp_path_factory):
  """Golden values that the whole model gives."""
  model = Chameleon.load(tiny_model_folder)
  tokens = np.arange(20).reshape(2, 10)
  pictures = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3)).astype(np.uint8)
  codes = model.encode_images(pictures)
  path = tmp_path_factory.mktemp('golden') / 'golden.npz'
  np.savez(path, tokens=tokens, logits=model.logits(tokens), pictures=pictures, codes=codes, decoded=model.decode_codes(codes))
  return path


def test_a_checkpoint_is_equal_to_itself(tiny_model_folder, tmp_path, capsys):
  output = tmp_path / 'new' / 'report.json'
  assert cli.main(['verify', str(tiny_model_folder), str(tiny_model_folder), f'--output={output}']) == 0
  lines = capsys.readouterr().out.splitlines()
  assert lines[0] == f'A = {tiny_model_folder} (orbax)' and lines[-1] == 'verified: PASS'
  report = json.loads(output.read_text())
  assert report['passed'] is True and report['findings'] == []
  rows = {row['name']: row for row in report['rows']}
  assert rows['logits (unit scale)']['value'] == 0 and rows['text tokenizer']['status'] == 'pass'


def test_a_fault_gives_exit_code_one_and_its_name(tiny_model_folder, swapped, tmp_path, capsys):
  output = tmp_path / 'report.json'
  assert cli.main(['verify', str(tiny_model_folder), str(swapped), f'--output={output}', '--activations=yes']) == 1
  out = capsys.readouterr().out
  assert 'looks like: ' in out and 'gate_proj and up_proj of the feed-forward are swapped' in out and out.endswith('verified: FAIL\n')
  report = json.loads(output.read_text())
  assert report['passed'] is False and [finding['fault'] for finding in report['findings']] == ['gate_up_swapped']


def test_golden_values_pass_and_fail(tiny_model_folder, swapped, golden, capsys):
  assert cli.main(['verify', str(tiny_model_folder), f'--golden={golden}']) == 0
  assert '| A, golden: decoded pictures (levels)' in capsys.readouterr().out
  assert cli.main(['verify', str(swapped), f'--golden={golden}']) == 1
  assert 'with that undone the logits agree' in capsys.readouterr().out


@pytest.mark.parametrize('name', ['meta_30b_like', 'hf_30b_like'])
def test_checkpoints_of_other_programs_are_held_against_their_own_values(name, capsys):
  assert cli.main(['verify', str(GOLDEN / 'models' / name), f'--golden={GOLDEN / name / "golden.npz"}']) == 0
  out = capsys.readouterr().out
  assert '| A, golden: logits (unit scale)' in out and '| A, golden: activations (relative)' in out and '| id map of A' in out


def test_the_port_without_a_picture_decoder_passes_and_the_verdict_says_what_was_left_out(tmp_path, capsys):
  port, whole, output = tmp_path / 'port', GOLDEN / 'models' / 'anole_like', tmp_path / 'report.json'
  convert(whole, port, 'huggingface', decoder=False)
  assert cli.main(['verify', str(whole), str(port), f'--output={output}']) == 0
  assert capsys.readouterr().out.endswith('\nverified: PASS; not compared: picture decoder\n')
  report = json.loads(output.read_text())
  assert report['not_compared'] == ['picture decoder'] and report['passed'] is True


def test_a_side_without_an_image_tokenizer_fails_unless_that_is_asked_for(tiny_model_folder, tmp_path, capsys):
  lone = tmp_path / 'lone'
  native.save_model(lone, dataclasses.replace(native.load_model(tiny_model_folder), vqgan_config=None, vqgan_params=None))
  assert cli.main(['verify', str(tiny_model_folder), str(lone), '--activations=no']) == 1
  assert 'verified: FAIL; not compared: image tokenizer' in capsys.readouterr().out
  assert cli.main(['verify', str(tiny_model_folder), str(lone), '--partial']) == 0
  assert capsys.readouterr().out.endswith('\nverified: PASS; not compared: image tokenizer\n')


def test_a_config_that_puts_the_norms_in_the_wrong_place_is_found(tmp_path, capsys):
  folder = shutil.copytree(GOLDEN / 'models' / 'hf_30b_like', tmp_path / 'wrong')
  config = json.loads((folder / 'config.json').read_text())
  assert config['swin_norm'] is True
  (folder / 'config.json').write_text(json.dumps(config | {'swin_norm': False}))
  assert cli.main(['verify', str(folder), f'--golden={GOLDEN / "hf_30b_like" / "golden.npz"}']) == 1
  assert "norm_position must be 'post' and not 'pre'" in capsys.readouterr().out
  assert cli.main(['verify', str(GOLDEN / 'models' / 'hf_30b_like'), str(folder)]) == 1
  assert 'norm_position: post in A, pre in B' in capsys.readouterr().out


def test_flags_reach_the_comparison(tiny_model_folder, swapped, capsys):
  assert cli.main(['verify', str(tiny_model_folder), str(swapped), '--activations=no', '--tolerance=100', '--dtype=bfloat16']) == 0
  assert 'switched off' in capsys.readouterr().out


@pytest.mark.parametrize(
    ('arguments', 'message', 'code'),
    [
        ([], 'name the checkpoints: chameleon verify A B', 1),
        (['{model}'], 'nothing to compare', 1),
        (['{model}', '{model}', 'more'], "unexpected argument 'more'", 1),
        (['{model}', '--golden=x.npz', '--tokenizer_b=y'], 'there is only one', 1),
        (['{model}', '--golden=no/such.npz'], 'no/such.npz cannot be read', 1),
        (['{model}', 'no/such/folder'], 'no/such/folder', 1),
        (['{model}', '{empty}'], '{empty}', 1),
        (['{model}', '{model}', '--output={empty}'], 'is a folder; name a file', 1),
        (['{model}', '{model}', '--dtype=int4'], 'dtype', 2),
        (['{model}', '{model}', '--activations=perhaps'], 'activations', 2),
        (['{model}', '{model}', '--tolerance=-1'], 'tolerance', 2),
    ],
)
def test_mistakes_are_one_line(tiny_model_folder, tmp_path, capsys, arguments, message, code):
  names = {'model': tiny_model_folder, 'empty': tmp_path}
  assert cli.main(['verify', *(argument.format(**names) for argument in arguments)]) == code
  captured = capsys.readouterr()
  assert message.format(**names) in captured.err and captured.err.count('\n') == 1 and captured.out == ''


def test_an_unwritable_output_is_one_line(tiny_model_folder, tmp_path, capsys):
  (tmp_path / 'file').write_text('')
  output = f'--output={tmp_path}/file/report.json'
  assert cli.main(['verify', str(tiny_model_folder), str(tiny_model_folder), '--activations=no', output]) == 1
  captured = capsys.readouterr()
  assert str(tmp_path / 'file') in captured.err and captured.err.count('\n') == 1 and captured.out == ''


def test_help_tells_the_golden_keys_place(capsys):
  assert cli.main(['verify', '--help']) == 0
  assert 'verify/golden.py' in capsys.readouterr().out
