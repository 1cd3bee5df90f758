"""`chameleon convert` and `tools/convert_checkpoint.py`: what they print, write and refuse."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from chameleon_jax.cli import convert as command
from chameleon_jax.cli.main import main
from chameleon_jax.interop.convert import Progress
from chameleon_jax.interop.opening import detect_format, open_checkpoint
from chameleon_jax.tokens.text_json import JsonText

ROOT = pathlib.Path(__file__).parents[2]
GOLDEN = ROOT / 'tests' / 'golden'
PORT = GOLDEN / 'models' / 'hf_7b_like'


def test_weights_of_the_port_become_ours(tmp_path, capsys):
  assert main(['convert', f'--source={PORT}', f'--target={tmp_path / "ours"}', '--target_format=orbax', '--dtype=bfloat16']) == 0
  captured = capsys.readouterr()
  note, last = captured.out.splitlines()
  assert note == 'note: the image tokenizer has no decoder: pictures can be read, not drawn'
  assert last.startswith(f'wrote {tmp_path / "ours"}: orbax, 100 tensors, ') and last.endswith('read back and compared')
  assert captured.err == '', 'no progress where stderr is no terminal'
  with open_checkpoint(tmp_path / 'ours') as model:
    assert model.transformer_config.param_dtype == 'bfloat16'


def test_every_flag_reaches_the_converter(tmp_path, monkeypatch, capsys):
  from chameleon_jax.interop import convert as converter

  seen = {}

  def convert(*arguments, **options):
    seen.update(options, arguments=arguments)
    return converter.ConversionReport('a', 'meta', 'b', 'meta', 1, 2, False, ())

  monkeypatch.setattr(converter, 'convert', convert)
  flags = ['--tokenizer=t', '--n_shards=4', '--dtype=float16', '--nodecoder', '--overwrite', '--noverify', '--verify_checklist']
  assert main(['convert', '--source=a', '--target=b', '--target_format=meta', *flags]) == 0
  assert seen.pop('arguments') == (pathlib.Path('a'), 'b', 'meta')
  assert seen == {
      'tokenizer': 't',
      'adapter': None,
      'n_shards': 4,
      'dtype': 'float16',
      'decoder': False,
      'overwrite': True,
      'verify': False,
      'verify_checklist': True,
      'on_progress': None,
  }
  assert capsys.readouterr().out == 'wrote b: meta, 1 tensors, 0.00 GB\n'


def test_ours_is_exported_as_a_text_tokenizer(tiny_model_folder, tmp_path, capsys):
  path = tmp_path / 'new' / 'text_tokenizer.json'
  assert main(['convert', f'--source={tiny_model_folder}', f'--export_tokenizer={path}']) == 0
  assert capsys.readouterr().out == f'wrote {path}\n'
  with open_checkpoint(tiny_model_folder) as model:
    text = JsonText.load(path)
    assert text.vocabulary_config == model.vocabulary
    assert text.encode('draw a red apple') == model.text_tokenizer.encode('draw a red apple')
  assert main(['convert', f'--source={tiny_model_folder}', f'--export_tokenizer={path}']) == 1
  assert 'exists; choose another name, or give --overwrite' in capsys.readouterr().err
  port = tmp_path / 'tokenizer.json'
  assert main(['convert', f'--source={tiny_model_folder}', f'--export_tokenizer={port}', '--overwrite']) == 0
  assert '<image>' in port.read_text() and '<image>' not in path.read_text()


def test_a_tokenizer_is_exported_after_the_conversion_and_not_where_that_fails(tmp_path, capsys):
  path = tmp_path / 'new' / 'text_tokenizer.json'
  flags = ['convert', f'--source={PORT}', f'--target={tmp_path / "target"}', f'--export_tokenizer={path}']
  assert main([*flags, '--target_format=meta']) == 1  # which has no place for an image tokenizer without a decoder
  captured = capsys.readouterr()
  assert captured.err.count('\n') == 1 and 'no decoder' in captured.err and captured.out == ''
  assert list(tmp_path.iterdir()) == []
  assert main([*flags, '--target_format=orbax']) == 0
  assert capsys.readouterr().out.endswith(f'wrote {path}\n')
  assert JsonText.load(path).n_pieces > 0 and detect_format(tmp_path / 'target') == 'orbax'


@pytest.mark.parametrize(('place', 'message'), [('target/x.json', 'lies in the target'), ('', 'is a folder'), ('file/x.json', 'file')])
def test_a_place_for_the_tokenizer_that_cannot_be_is_one_line(tmp_path, capsys, place, message):
  (tmp_path / 'file').touch()
  flags = [f'--source={PORT}', *([f'--target={tmp_path / "target"}', '--target_format=orbax'] if 'target' in place else [])]
  assert main(['convert', *flags, f'--export_tokenizer={tmp_path / place}']) == 1
  err = capsys.readouterr().err
  assert message in err and err.count('\n') == 1
  assert [path.name for path in tmp_path.iterdir()] == ['file']


def test_the_whole_checklist_is_compared_on_request(tmp_path, capsys):
  data = tmp_path / 'data'
  shutil.copytree(GOLDEN / 'models' / 'meta_7b_like', data / 'models' / '7b')
  shutil.copytree(GOLDEN / 'tokenizer', data / 'tokenizer')
  flags = [f'--source={data / "models" / "7b"}', '--target_format=orbax', '--verify_checklist']
  assert main(['convert', *flags, f'--target={tmp_path / "one"}']) == 0
  with (data / 'tokenizer' / 'vqgan.ckpt').open('ab') as file:
    file.write(b'\0')
  capsys.readouterr()
  assert main(['convert', *flags, f'--target={tmp_path / "two"}']) == 1
  assert 'vqgan.ckpt is not the file that checklist.chk lists' in capsys.readouterr().err
  assert main(['convert', f'--source={PORT}', *flags[1:], f'--target={tmp_path / "two"}']) == 1
  assert "is not in Meta's form, which alone comes with a checklist.chk" in capsys.readouterr().err
  assert sorted(path.name for path in tmp_path.iterdir()) == ['data', 'one']


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ([], '--source=DIR is needed'),
        (['--source=x'], 'nothing to do: give --target=DIR and --target_format=FORMAT, or --export_tokenizer=FILE'),
        (['--source=x', '--target=y'], '--target_format=orbax|meta|huggingface is needed as well'),
        (['--source=x', '--target_format=meta'], '--target=DIR is needed as well'),
        (['--source=x', '--target=y', '--target_format=orbax'], 'x does not exist'),
        (['--source=x', '--target=y', '--target_format=orbax', 'z'], "unexpected argument 'z'"),
    ],
)
def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys, arguments, message):
  monkeypatch.chdir(tmp_path)
  assert main(['convert', *arguments]) == 1
  err = capsys.readouterr().err
  assert message in err and err.count('\n') == 1
  assert list(tmp_path.iterdir()) == []


def test_the_shipped_weights_have_a_name(tmp_path, capsys):
  assert main(['convert', '--source=emoji', f'--export_tokenizer={tmp_path / "text_tokenizer.json"}']) == 0
  assert JsonText.load(tmp_path / 'text_tokenizer.json').vocabulary_config.n_codes == 1024


def test_the_progress_is_one_line(capsys):
  line = command._ProgressLine()
  for done in range(1, 1001):
    line(Progress('writing', done, 1000, done * 10**6, 10**9))
  line.end()
  line.end()
  err = capsys.readouterr().err
  assert err.count('\n') == 1 and err.count('\r') < 20
  assert err.endswith('writing: 1,000 / 1,000 tensors, 1.00 / 1.00 GB\n')


def test_the_tool_is_the_same_function(tmp_path):
  tool = [sys.executable, str(ROOT / 'tools' / 'convert_checkpoint.py')]
  environment = os.environ | {'PYTHONPATH': str(ROOT)}
  flags = [f'--source={PORT}', f'--target={tmp_path / "ours"}', '--target_format=orbax']
  run = subprocess.run([*tool, *flags], capture_output=True, text=True, env=environment, check=False)
  assert run.returncode == 0 and run.stdout.splitlines()[-1].startswith(f'wrote {tmp_path / "ours"}: orbax'), run.stderr
  assert detect_format(tmp_path / 'ours') == 'orbax'
  run = subprocess.run([*tool, *flags], capture_output=True, text=True, env=environment, check=False)
  assert run.returncode == 1 and run.stderr.startswith('convert_checkpoint: ') and run.stderr.count('\n') == 1
