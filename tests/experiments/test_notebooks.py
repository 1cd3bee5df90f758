"""The notebooks: stored clean, linked to themselves, formatted; each runs from top to bottom, offline."""

import base64
import html
import os
import pathlib
import re
import subprocess
import sys

import nbclient
import nbformat
import numpy as np
import pytest

from chameleon_jax.data.sources.emoji_world import EmojiWorld
from chameleon_jax.tokens.images import load_image

ROOT = pathlib.Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / 'experiments' / 'notebooks').glob('*.ipynb'))
COLAB = 'https://colab.research.google.com/github/chameleon-jax/chameleon_jax/blob/main/'

# On a machine without the package, as far as the install cell can tell; {gpu} and {tpu} say what else it has.
BARE_MACHINE = """
get_ipython().register_magic_function(lambda line: print('pip', line), magic_name='pip')
importlib.util.find_spec = lambda name: None
shutil.which = lambda name: {gpu}
glob.glob = lambda pattern: {tpu}
"""


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
  return request.param


def test_there_is_a_notebook():
  assert [path.name for path in NOTEBOOKS] == ['fine_tune.ipynb', 'sample.ipynb']


def test_it_is_stored_without_outputs(notebook):
  stored = nbformat.read(notebook, as_version=nbformat.NO_CONVERT)
  nbformat.validate(stored)
  dirty = [cell.id for cell in stored.cells if cell.cell_type == 'code' and (cell.outputs or cell.execution_count is not None)]
  assert not dirty, f'cells {dirty} of {notebook.name} hold outputs; clear all outputs (a menu entry of Jupyter and Colab) and save'


def test_its_badge_opens_itself(notebook):
  first = nbformat.read(notebook, as_version=4).cells[0]
  own_address = COLAB + notebook.relative_to(ROOT).as_posix()
  assert first.cell_type == 'markdown'
  assert re.match(r'\[!\[Open in Colab\]\([^)]+\.svg\)\]\(([^)]+)\)', first.source)[1] == own_address
  assert own_address in (ROOT / 'README.md').read_text(encoding='utf-8')


@pytest.mark.parametrize('check', [['check'], ['format', '--check']], ids=['lint', 'format'])
def test_ruff_has_nothing_to_say(notebook, check):
  done = subprocess.run([sys.executable, '-m', 'ruff', *check, '--no-cache', str(notebook)], cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stdout + done.stderr


# ------------------------------------------------------------------------------------------- sample.ipynb, run


class _Client(nbclient.NotebookClient):
  """Also keeps what a cell shows in place of what it showed before: {cell id: html of each update}."""

  def process_message(self, msg, cell, cell_index):
    if msg['msg_type'] == 'update_display_data':
      self.updates.setdefault(cell.id, []).append(msg['content']['data']['text/html'])
    return super().process_message(msg, cell, cell_index)


def _environment(folder):
  """One device, as a user has, and no way out of the machine."""
  environment = {name: value for name, value in os.environ.items() if name not in ('XLA_FLAGS', 'NPROC')}
  paths = [str(ROOT), *filter(None, [os.environ.get('PYTHONPATH')])]
  environment |= {'PYTHONPATH': os.pathsep.join(paths), 'IPYTHONDIR': str(folder / 'ipython')}
  environment |= dict.fromkeys(('http_proxy', 'https_proxy'), 'http://127.0.0.1:9')  # nobody answers there: no download succeeds
  return environment


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """sample.ipynb after a run in a kernel of this Python: cells by their id, and the client with its updates.

  The install cell is run again at the end, on a machine that looks bare.
  """
  folder = tmp_path_factory.mktemp('notebook')
  notebook = nbformat.read(ROOT / 'experiments' / 'notebooks' / 'sample.ipynb', as_version=4)
  install = next(cell for cell in notebook.cells if cell.id == 'install').source
  for name, gpu, tpu in (('bare', None, []), ('bare-gpu', 'nvidia-smi', []), ('bare-tpu', None, ['/dev/vfio/0'])):
    notebook.cells.append(nbformat.v4.new_code_cell(BARE_MACHINE.format(gpu=repr(gpu), tpu=tpu) + install, id=name))
  environment = _environment(folder)
  client = _Client(notebook, timeout=300, kernel_name='python3', resources={'metadata': {'path': str(folder)}})
  client.updates = {}
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('JUPYTER_RUNTIME_DIR', str(folder / 'runtime'))
    client.execute(env=environment)  # raises where a cell does
  return {cell.id: cell for cell in notebook.cells}, client


def _html(cell):
  return ''.join(output.data.get('text/html', '') for output in cell.outputs if output.output_type == 'display_data')


def _printed(cell):
  return ''.join(output.text for output in cell.outputs if output.output_type == 'stream')


def _pictures(shown):
  """The pictures in a piece of HTML, in order."""
  return [load_image(base64.b64decode(data)) for data in re.findall(r'src="data:image/png;base64,([^"]+)"', shown)]


def _words(shown):
  return html.unescape(re.sub(r'<[^>]+>', ' ', shown))


def _named(picture):
  """The name of the picture of the emoji world that is nearest."""
  world = EmojiWorld.load()
  distances = [np.square(picture.astype(np.int32) - other).sum() for other in world.pictures]
  return world.items[int(np.argmin(distances))].name


@pytest.mark.slow
def test_it_tells_the_device_and_no_cell_warns(run):
  cells, _ = run
  assert '1 x cpu (cpu), jax' in _printed(cells['device'])
  assert '8 x 8 codes' in _printed(cells['load'])
  errors = [output.text for cell in cells.values() for output in cell.get('outputs', ()) if output.get('name') == 'stderr']
  assert not [text for text in errors if 'Warning' in text]


@pytest.mark.slow
def test_the_install_cell_asks_for_what_the_machine_has_and_only_where_the_package_is_missing(run):
  cells, _ = run
  source = 'git+https://github.com/chameleon-jax/chameleon_jax'
  assert cells['install'].outputs == []
  for name, extra in (('bare', ''), ('bare-gpu', '[cuda]'), ('bare-tpu', '[tpu]')):
    assert _printed(cells[name]) == f"pip install --quiet 'chameleon-jax{extra} @ {source}'\n"


@pytest.mark.slow
def test_it_describes_draws_and_edits(run):
  cells, _ = run
  described = _html(cells['describe'])
  assert len(_pictures(described)) == 3
  for name in ('health worker: medium-dark skin tone', 'woman: light skin tone, white hair', 'OK hand: medium skin tone'):
    assert name in _words(described)
  drawn = [_named(picture) for picture in _pictures(_html(cells['draw']))]
  assert drawn == ['man: light skin tone, red hair', 'student: medium-dark skin tone', 'rocket', 'red apple']
  edited = [_named(picture) for picture in _pictures(_html(cells['edit']))]
  assert edited == ['student: medium-dark skin tone', 'student: light skin tone', 'woman student: light skin tone']


@pytest.mark.slow
def test_a_stream_shows_every_row_of_every_picture(run):
  cells, client = run
  assert [_named(picture) for picture in _pictures(_html(cells['stream']))] == ['tiger face', 'sailboat', 'hamburger']
  updates = client.updates['stream']
  assert len(updates) == 3 * 8
  assert updates[-1] == _html(cells['stream']) and len(set(updates)) > 8


@pytest.mark.slow
def test_a_document_holds_text_and_pictures(run):
  cells, _ = run
  shown = _html(cells['document'])
  pictures = _pictures(shown)
  assert _words(shown).strip().startswith('Here is man firefighter: medium skin tone')
  assert 1 <= len(pictures) <= 4
  assert 'firefighter' in _named(pictures[0])


@pytest.mark.slow
def test_the_token_grid_is_the_picture_in_patches_with_their_codes(run):
  cells, _ = run
  shown = _html(cells['grid'])
  original, decoded, *patches = _pictures(shown)
  assert _named(original) == _named(decoded) == 'rocket'
  rows = [np.concatenate(patches[8 * row : 8 * row + 8], axis=1) for row in range(8)]
  np.testing.assert_array_equal(np.concatenate(rows), decoded)
  codes = [int(code) for code in re.findall(r'<br>(\d+)</div>', shown)]
  assert len(codes) == 64 and max(codes) < 1024 and len(set(codes)) > 16
  cat, apple, both = (picture.astype(np.int32) for picture in _pictures(_html(cells['swap'])))
  assert np.abs(both[:24] - cat[:24]).mean() < 8 < np.abs(both[:24] - apple[:24]).mean()
  assert np.abs(both[40:] - apple[40:]).mean() < 8 < np.abs(both[40:] - cat[40:]).mean()


@pytest.mark.slow
def test_in_painting_fills_the_gap_by_the_words_and_keeps_the_rest(run):
  cells, _ = run
  given, *filled = _pictures(_html(cells['inpaint']))
  assert (given[16:48, 16:48] == 160).all() and len(filled) == 3
  assert [_named(picture) for picture in filled] == [f'student: {tone} skin tone' for tone in ('light', 'medium', 'dark')]
  for picture in filled:
    assert np.abs(picture[:8].astype(np.int32) - given[:8]).mean() < 4  # the cap; nearer to the gap the decoder blends


@pytest.mark.slow
def test_the_best_is_one_of_the_eight_and_scores_are_probabilities(run):
  cells, _ = run
  *eight, best = _pictures(_html(cells['best']))
  assert len(eight) == 8 and len({picture.tobytes() for picture in eight}) > 1
  assert min(np.abs(picture.astype(np.int32) - best).max() for picture in eight) <= 1  # it was decoded alone, they in a batch
  lines = _printed(cells['score']).splitlines()
  shares = {tone: float(share.rstrip('%')) for tone, share in (line.split() for line in lines)}
  assert list(shares) == ['light', 'medium-light', 'medium', 'medium-dark', 'dark']
  assert sorted(shares, key=shares.get)[-2:] == ['medium-light', 'medium']
  assert 80 < sum(shares.values()) <= 100.3


# ---------------------------------------------------------------------------------------- fine_tune.ipynb, run


@pytest.fixture(scope='module')
def tuned(tmp_path_factory):
  """fine_tune.ipynb after a run of four steps: cells by their id, and the folder it ran in."""
  folder = tmp_path_factory.mktemp('fine_tune')
  notebook = nbformat.read(ROOT / 'experiments' / 'notebooks' / 'fine_tune.ipynb', as_version=4)
  settings = next(cell for cell in notebook.cells if cell.id == 'settings')
  assert 'STEPS = 200' in settings.source
  settings.source = settings.source.replace('STEPS = 200', 'STEPS = 4')
  client = nbclient.NotebookClient(notebook, timeout=300, kernel_name='python3', resources={'metadata': {'path': str(folder)}})
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('JUPYTER_RUNTIME_DIR', str(folder / 'runtime'))
    client.execute(env=_environment(folder))
  return {cell.id: cell for cell in notebook.cells}, folder


@pytest.mark.slow
def test_a_folder_of_pictures_becomes_a_model(tuned):
  cells, folder = tuned
  assert _printed(cells['folder']) == f'{len(list((folder / "pictures").glob("*.png")))} pictures in pictures\n'
  assert len(_pictures(_html(cells['show']))) == 6
  losses = [float(loss) for loss in re.findall(r'([\d.]+) nats per code', _printed(cells['curve']))]
  assert len(losses) == 4 and losses[-1] < losses[0]
  before, after = (_pictures(_html(cells[name])) for name in ('before', 'after'))
  assert len(before) == len(after) == 3
  difference = float(re.search(r'logits differ by (\S+)', _printed(cells['after']))[1])
  assert difference < 1e-3


@pytest.mark.slow
def test_it_leaves_a_model_an_adapter_and_both_exports(tuned):
  cells, folder = tuned
  assert "['adapter_config.json', 'adapter_model.safetensors']" in _printed(cells['export'])
  for place in ('model', 'adapter', 'copy', 'peft'):
    assert (folder / 'fine_tuned' / place).is_dir()
