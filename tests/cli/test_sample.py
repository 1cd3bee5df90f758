"""`chameleon sample` on a tiny model folder: what it prints and writes, and its one-line errors."""

import io
import json

import numpy as np
import pytest

from chameleon_jax.chameleon import Chameleon
from chameleon_jax.cli import sample_live, sample_requests, sample_results, sample_run
from chameleon_jax.cli.main import main
from chameleon_jax.config import SamplingOptions
from chameleon_jax.errors import PromptError
from chameleon_jax.sampling.events import Ended, Failed, PictureDone, PictureRows, PictureStarted, TextPiece
from chameleon_jax.sampling.stream import Stream
from chameleon_jax.tokens.document import Codes, Document, Image, Turn
from chameleon_jax.tokens.images import load_image, save_png
from tests.sampling.scripted_engine import ScriptedEngine


@pytest.fixture(scope='module')
def model(tiny_model_folder):
  return tiny_model_folder


def test_a_picture_to_a_page(model, tmp_path, capsys):
  save_png(tmp_path / 'in.png', np.full((20, 30, 3), 200, np.uint8))
  code = main(
    [
      'sample',
      f'--model={model}',
      '--prompt=draw a red apple',
      f'--image={tmp_path / "in.png"}',
      '--modalities=image',
      f'--output={tmp_path / "out"}',
    ]
  )
  captured = capsys.readouterr()
  assert code == 0, captured.err
  assert captured.out.strip() == f'[{tmp_path / "out" / "picture_1.png"}]'
  assert load_image(tmp_path / 'out' / 'picture_1.png').shape == (16, 16, 3)
  page = (tmp_path / 'out' / 'index.html').read_text()
  assert page.count('<img') == 2 and 'draw a red apple' in page


def test_completions_as_text(model, capsys):
  arguments = [
    'sample',
    f'--model={model}',
    '--completion',
    '--prompt=a green',
    '--modalities=text',
    '--max_new_tokens=4',
    '--count=2',
    '--temperature=3',
  ]
  assert main(arguments) == 0
  first = capsys.readouterr().out
  assert main(arguments) == 0
  assert capsys.readouterr().out == first and len(first) > 2


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ([], 'the prompt is empty'),
    (['--prompt=a', '--temperature=0'], 'temperature must be positive'),
    (['--prompt=' + 'a b ' * 100], 'the context of this model 64; shorten it'),
    (['--image=missing.png'], 'missing.png'),
    (['loose', 'words'], "unexpected argument 'loose'"),
  ],
)
def test_bad_input_is_one_line(model, arguments, message, capsys):
  assert main(['sample', f'--model={model}', *arguments]) == 1
  error = capsys.readouterr().err.strip()
  assert message in error and '\n' not in error


@pytest.mark.parametrize('command', ['sample', 'evaluate'])
def test_weights_and_cache_can_be_kept_in_int8(model, command, monkeypatch, capsys):
  asked = []

  def load(path, **options):
    asked.append((options['quantization'], options['cache_dtype']))
    raise PromptError('seen enough')

  monkeypatch.setattr(Chameleon, 'load', load)
  arguments = [command, f'--model={model}', *(['--prompt=a'] if command == 'sample' else [])]
  assert main([*arguments, '--quantization=int8', '--cache_dtype=int8']) == main(arguments) == 1
  assert asked == [('int8', 'int8'), (None, None)]
  capsys.readouterr()
  for flag in ('quantization', 'cache_dtype'):
    assert main([*arguments, f'--{flag}=int4']) == 2
    error = capsys.readouterr().err.strip()
    assert flag in error and 'int4' in error and 'int8' in error and '\n' not in error


# ------------------------------------------------------------------------------------ on a tiny model


def test_streamed_text_is_the_text(model, tmp_path, capsys):
  flags = ['--prompt=draw', '--max_new_tokens=40', '--temperature=3', '--min_images=1', f'--output={tmp_path}']
  arguments = ['sample', f'--model={model}', *flags]
  assert main(arguments) == 0
  whole = capsys.readouterr().out
  assert main([*arguments, '--stream']) == 0
  assert capsys.readouterr().out == whole and '_1.png]' in whole


def test_a_file_of_requests_of_which_some_cannot_be_done(model, tmp_path, capsys):
  save_png(tmp_path / 'in.png', np.full((16, 16, 3), 200, np.uint8))
  lines = [
    '{"prompt": "draw a pear", "id": "pear/1", "options": {"modalities": "image", "seed": 3}}',
    '',
    '{"promt": "x"}',
    json.dumps({'prompt': 'a b ' * 100, 'id': 'long'}),
    '{"prompt": [{"image": "in.png"}, {"text": "what?"}], "options": {"modalities": "text", "max_new_tokens": 3}}',
  ]
  (tmp_path / 'requests.jsonl').write_text('\n'.join(lines))
  out = tmp_path / 'out'
  assert main(['sample', f'--model={model}', f'--prompts_file={tmp_path / "requests.jsonl"}', f'--output={out}']) == 1
  captured = capsys.readouterr()
  results = [json.loads(line) for line in (out / 'results.jsonl').read_text().splitlines()]
  assert [set(result) for result in results] == [{'id', 'prompt', 'text', 'pictures', 'reason', 'tokens', 'options', 'error'}] * 4
  assert [result['id'] for result in results] == ['pear/1', '3', 'long', '5']
  assert [result['reason'] for result in results] == ['picture', None, None, 'length']
  pear, unknown, long, seen = results
  assert pear['pictures'] == ['pear-1_1.png'] and pear['text'] == '[pear-1_1.png]' and len(pear['tokens']) == 16
  assert pear['options']['seed'] == 3 and pear['options']['top_p'] == 0.9 and pear['error'] is None
  assert seen['prompt'] == [{'image': 'in.png'}, {'text': 'what?'}] and len(seen['tokens']) == 3
  assert unknown['error'] == f"{tmp_path}/requests.jsonl:3: unknown key 'promt' of a request; the nearest known key is 'prompt'"
  assert long['error'].startswith(f'{tmp_path}/requests.jsonl:4: the prompt has ') and long['prompt'] == 'a b ' * 100
  errors = [line for line in captured.err.splitlines() if line.startswith('chameleon: ')]
  assert errors == [f'chameleon: {unknown["error"]}', f'chameleon: {long["error"]}']
  assert captured.out.startswith(f'pear/1: [{out}/pear-1_1.png]\n5: ')
  assert sorted(path.name for path in out.iterdir()) == ['index.html', 'pear-1_1.png', 'results.jsonl']
  page = (out / 'index.html').read_text()
  assert '2 of 4 requests failed' in page and page.count('<article>') == 3 and 'long: ' in page


def test_a_text_file(model, tmp_path, capsys):
  (tmp_path / 'prompts.txt').write_bytes(b'\xef\xbb\xbfdraw a pear\r\n\n\xff bad\nred\xe2\x80\xa8apple')
  flags = [f'--prompts_file={tmp_path / "prompts.txt"}', '--modalities=text', '--max_new_tokens=2', f'--output={tmp_path / "out"}']
  assert main(['sample', f'--model={model}', *flags]) == 1
  assert f'{tmp_path}/prompts.txt:3: byte 1 is no UTF-8' in capsys.readouterr().err
  results = [json.loads(line) for line in (tmp_path / 'out' / 'results.jsonl').read_text().splitlines()]
  assert [(result['id'], result['prompt']) for result in results] == [('1', 'draw a pear'), ('3', None), ('4', 'red\u2028apple')]


def test_the_best_of_several(model, tmp_path, capsys):
  flags = ['--prompt=draw', '--modalities=text', '--max_new_tokens=4', '--temperature=2', f'--output={tmp_path}']
  assert main(['sample', f'--model={model}', *flags, '--best_of=3']) == 0
  best = capsys.readouterr().out
  assert main(['sample', f'--model={model}', *flags, '--count=3']) == 0
  assert best in capsys.readouterr().out and best.strip()


def test_the_best_of_several_beside_a_request_that_cannot_be_done(model, tmp_path, capsys):
  (tmp_path / 'prompts.txt').write_text('draw\n' + 'a b ' * 100)
  flags = [f'--prompts_file={tmp_path / "prompts.txt"}', '--modalities=text', '--max_new_tokens=2', '--best_of=2']
  assert main(['sample', f'--model={model}', *flags]) == 1
  captured = capsys.readouterr()
  assert captured.out.startswith('1: ') and captured.out.count('\n') == 1
  assert f'{tmp_path}/prompts.txt:2: the prompt has' in captured.err


def test_redrawing_a_part_keeps_the_rest(model, tmp_path):
  picture = np.random.default_rng(0).integers(0, 256, (16, 16, 3)).astype(np.uint8)
  save_png(tmp_path / 'in.png', picture)
  flags = [f'--fix_from={tmp_path / "in.png"}', '--redraw=0,8,4,5', '--modalities=image', f'--output={tmp_path / "out"}']
  assert main(['sample', f'--model={model}', '--prompt=draw a pear', *flags]) == 0
  (result,) = [json.loads(line) for line in (tmp_path / 'out' / 'results.jsonl').read_text().splitlines()]
  loaded = Chameleon.load(model)
  codes = loaded.encode_images(picture[None])[0]
  fixed = result['options']['fixed_codes']
  assert [place for place, code in enumerate(fixed) if code is None] == [2, 3]  # a grid of 4 x 4; pixels 8 to 12 touch two cells
  written = loaded.vocabulary.tokens_to_codes(np.array(result['tokens']))
  np.testing.assert_array_equal(np.delete(written, [2, 3]), np.delete(codes, [2, 3]))


def test_a_rectangle_follows_the_picture_to_the_models_square(model, tmp_path):
  """32 x 64 pixels are scaled to 16 x 32, of which the middle 16 columns stay: the file's columns 16 to 47."""
  loaded, path = Chameleon.load(model), tmp_path / 'wide.png'
  save_png(path, np.zeros((32, 64, 3), np.uint8))

  def free(redraw):
    return [place for place, code in enumerate(sample_run.fixed_codes(loaded, path, redraw)) if code is None]

  assert free('0,16,8,8') == [0]
  assert free('24,32,8,16') == [14, 15]
  with pytest.raises(PromptError, match='marks no pixel'):
    free('0,0,32,8')


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (['--prompt=a', '--stop_tokens=1,x'], '--stop_tokens must be tuple[int, ...]'),
    (['--prompt=a', '--banned_tokens=99999'], 'banned_tokens with token id 99999, outside the vocabulary'),
    (['--prompt=a', '--stream', '--best_of=2'], 'choose one'),
    (['--prompt=a', '--redraw=0,0,1,1'], 'belong together'),
    (['--prompt=a', '--fix_from={folder}/p.png', '--redraw=0,0,1'], '--redraw (top,left,height,width) must be tuple[int, int, int, int]'),
    (['--prompt=a', '--fix_from={folder}/p.png', '--redraw=0,0,17,1'], 'does not lie in'),
    (['--prompt=a', '--fix_from={folder}/p.png', '--redraw=0,0,0,1'], 'does not lie in'),
    (['--prompt=a', '--min_images=2', '--max_images=1'], 'max_images 1 is below min_images 2'),
    (['--prompt=a', '--prompts_file={folder}/p.txt'], 'leave --prompt and --image out'),
    (['--prompt=a', '--output={folder}/p.txt'], 'is a file; name a folder'),
    (['--prompts_file={folder}/none.txt'], 'cannot read the prompts of'),
    (['--prompts_file={folder}/p.png'], 'reads .txt (one prompt a line) and .jsonl'),
    (['--prompts_file={folder}/blank.txt'], 'holds no prompts'),
  ],
)
def test_flags_that_do_not_fit_are_one_line(model, tmp_path, arguments, message, capsys):
  save_png(tmp_path / 'p.png', np.zeros((16, 16, 3), np.uint8))
  (tmp_path / 'p.txt').write_text('a')
  (tmp_path / 'blank.txt').write_text('\n  \n')
  assert main(['sample', f'--model={model}', *(argument.format(folder=tmp_path) for argument in arguments)]) == 1
  error = capsys.readouterr().err.strip()
  assert message in error and '\n' not in error


# ---------------------------------------------------------------------------------- lines of requests


@pytest.mark.parametrize(
  ('line', 'message'),
  [
    ('{"prompt": "a"', "no JSON: Expecting ',' delimiter"),
    ('["a"]', 'a request is a JSON object, got ["a"]'),
    ('{"id": "a"}', 'the request has no "prompt"'),
    ('{"prompt": ""}', '"prompt" is a text or a list of segments and not empty'),
    ('{"prompt": [{"text": ""}]}', 'the prompt is empty'),
    ('{"prompt": 3}', '"prompt" is a text or a list of segments'),
    ('{"prompt": ["a"]}', 'a segment is a JSON object, got "a"'),
    ('{"prompt": [{"txt": "a"}]}', "unknown key 'txt' of a segment; the nearest known key is 'text'"),
    ('{"prompt": [{"text": "a", "image": "b"}]}', 'a segment is {"text": "..."} or {"image": "FILE"}'),
    ('{"prompt": [{"image": "none.png"}]}', 'none.png: No such file or directory'),
    ('{"prompt": "\\ud800"}', 'lone surrogate'),
    ('{"prompt": "a", "id": ""}', 'an id is a text or a number'),
    ('{"prompt": "a", "id": "first"}', "the id 'first' is that of line 1 already"),
    ('{"prompt": "a", "options": {"sed": 1}}', "unknown key 'options.sed'; the nearest known key is 'options.seed'"),
    ('{"prompt": "a", "options": {"seed": "1"}}', "options.seed must be int, got '1'"),
    ('{"prompt": "a", "options": {"top_p": 2}}', 'options: top_p must lie in (0, 1]'),
    ('{"prompt": "a", "options": [1]}', '"options" is a JSON object'),
    ('{"prompt": ' + '[' * 100_000, 'no JSON'),
  ],
)
def test_a_malformed_line_says_where_and_why_and_the_next_one_stands(tmp_path, line, message):
  path = tmp_path / 'r.jsonl'
  path.write_text('{"prompt": "a", "id": "first"}\n' + line + '\n{"prompt": "b", "options": {"stop_tokens": [1, 2]}}\n')
  first, malformed, last = sample_requests.read_requests(path, SamplingOptions(seed=5), completion=False)
  assert isinstance(malformed, sample_requests.Malformed)
  assert malformed.error.startswith(f'{path}:2: ') and message in malformed.error and '\n' not in malformed.error
  assert first.options == SamplingOptions(seed=5) and last.options == SamplingOptions(seed=5, stop_tokens=(1, 2))
  assert (last.id, last.where, last.prompt) == ('3', f'{path}:3', Document((Turn('b', role='prompt'),)))


def test_completions_may_be_empty_and_copies_have_names(tmp_path):
  path = tmp_path / 'r.jsonl'
  path.write_text('{"prompt": "", "id": 7}\n{')
  found = sample_requests.copies(sample_requests.read_requests(path, SamplingOptions(), completion=True), 2)
  assert [request.id for request in found] == ['7.1', '7.2', '2']
  assert found[0].prompt.is_plain and found[0].prompt.text == ''


# ------------------------------------------------------------------------------------------- results


def test_names_of_files_are_safe_and_differ():
  names = sample_results.picture_names(['a', 'A', '../../etc/x', '..', 'ä b', 'x' * 300, 'a'], from_flags=False)
  assert names == ['a', 'A-2', 'etc-x', 'request', 'b', 'x' * 80, 'a-3']
  assert sample_results.picture_names(['1'], from_flags=True) == ['picture']
  assert sample_results.picture_names(['1', '2'], from_flags=True) == ['picture_1', 'picture_2']


def a_result():
  request = sample_requests.Request('a', Document((Turn('draw', role='prompt'),)), 'draw', SamplingOptions(), 'f.txt:1')
  return sample_results.Result(request, Document.plain('here ', Image(np.zeros((2, 2, 3), np.uint8))), 'stop', (1, 2))


def test_other_files_of_the_folder_stay(tmp_path):
  (tmp_path / 'mine.txt').write_text('mine')
  (tmp_path / 'a_1.png').write_text('old')
  sample_results.write_results(tmp_path, [a_result()], ['a'], note='n')
  assert sorted(path.name for path in tmp_path.iterdir()) == ['a_1.png', 'index.html', 'mine.txt', 'results.jsonl']
  assert load_image(tmp_path / 'a_1.png').shape == (2, 2, 3)


def test_a_failed_write_leaves_the_folder_as_it_was(tmp_path, monkeypatch):
  def fail(*args, **settings):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(sample_results.page, 'write_page', fail)
  (tmp_path / 'old').mkdir()
  (tmp_path / 'old' / 'index.html').write_text('old')
  for folder in (tmp_path / 'old', tmp_path / 'new'):
    with pytest.raises(OSError, match='No space'):
      sample_results.write_results(folder, [a_result()], ['a'], note='n')
  assert [path.name for path in tmp_path.iterdir()] == ['old']
  assert [path.name for path in (tmp_path / 'old').iterdir()] == ['index.html']


# ---------------------------------------------------------------------------------------------- live

PIXELS = np.zeros((2, 2, 3), np.uint8)


def ended(request, *segments):
  return Ended(request, 'length', Document.plain(*segments), np.zeros(0, np.int32))


def codes(n):
  return np.zeros(n, np.int32)


def test_one_request_is_written_as_it_is():
  out = io.StringIO()
  live = sample_live.LiveText(out.write, ['a'], [('p_', '.png')])
  seen = []
  for event in (
    TextPiece(0, 'one\ntwo '),
    PictureStarted(0, 0),
    PictureDone(0, 0, codes(4), PIXELS),
    PictureStarted(0, 1),
    PictureDone(0, 1, codes(4), None),
    PictureStarted(0, 2),
    ended(0, Codes(codes(3))),
  ):
    live.show(event)
    seen.append(out.getvalue())
  assert seen[0] == 'one\ntwo '  # at once
  assert seen[-1] == 'one\ntwo [p_1.png][unfinished picture, 4 codes][unfinished picture, 3 codes]\n'


def test_several_requests_get_lines_of_their_own():
  out = io.StringIO()
  live = sample_live.LiveText(out.write, ['sky', 'sun', 'sea'], [('p', '')] * 3)
  events = [TextPiece(0, 'a '), TextPiece(0, 'blue'), TextPiece(1, 'a\nyellow'), TextPiece(0, ' one'), ended(1, 'x'), ended(0, 'y')]
  for event in [*events, TextPiece(2, 'wet'), Failed(2, 'the logits are not finite')]:
    live.show(event)
  assert out.getvalue() == 'sky: a blue\nsun: a\nsun: yellow\nsky:  one\nsea: wet\n'


def test_the_bar_counts_rows_of_all_pictures_and_goes_away():
  out = io.StringIO()
  bar = sample_live.PictureBar(out.write, 16)

  def shown(event):
    bar.show(event)
    return out.getvalue().rsplit('\r', 1)[-1]

  assert shown(TextPiece(0, 'a')) == ''
  assert shown(PictureStarted(0, 0)) == 'picture [........................] 0/4 rows'
  assert shown(PictureRows(0, 0, codes(8), None)) == 'picture [############............] 2/4 rows'
  assert shown(PictureStarted(1, 0)) == '2 pictures [######..................] 2/8 rows'
  assert shown(PictureDone(0, 0, codes(16), None)) == '2 pictures [############............] 4/8 rows'
  assert shown(PictureRows(1, 0, codes(4), None)) == 'picture [######..................] 1/4 rows'
  assert shown(ended(1)) == ''
  bar.clear()
  assert out.getvalue().endswith('\r' + ' ' * len('picture [######..................] 1/4 rows') + '\r')


def test_the_bar_is_on_stderr_where_asked_for(model, capsys):
  arguments = ['sample', f'--model={model}', '--prompt=draw', '--modalities=image']
  assert main(arguments) == 0
  assert 'rows' not in capsys.readouterr().err  # no terminal
  assert main([*arguments, '--progress']) == 0
  captured = capsys.readouterr()
  assert '] 3/4 rows' in captured.err and captured.out == '[picture 1]\n'


def test_a_request_that_fails_on_the_way_leaves_the_others(model, monkeypatch, tmp_path, capsys):
  """The second request runs into NaN after two words."""

  def stream(loaded, prompts, options, *, max_steps):
    text, v = loaded.parts.text_tokenizer, loaded.vocabulary
    words = [[v.text_start + piece for piece in text.encode(words)] for words in ('fine', 'not so', 'good')]
    engine = ScriptedEngine([(tokens, end) for tokens, end in zip(words, ('length', 'failed', 'stop'))])
    given = [np.array([v.begin_sequence], np.int32)] * len(prompts)
    return Stream(engine, given, options, vocabulary=v, text_tokenizer=text, n_image_tokens=16, max_steps=max_steps)

  monkeypatch.setattr(Chameleon, 'stream', stream)
  (tmp_path / 'p.txt').write_text('a\nb\nc\n')
  flags = [f'--prompts_file={tmp_path / "p.txt"}', f'--output={tmp_path / "out"}', '--stream']
  assert main(['sample', f'--model={model}', *flags]) == 1
  captured = capsys.readouterr()
  assert captured.out == '1: fine\n2: not so\n3: good\n'
  assert f'chameleon: {tmp_path}/p.txt:2: the logits are not finite' in captured.err
  results = [json.loads(line) for line in (tmp_path / 'out' / 'results.jsonl').read_text().splitlines()]
  assert [result['reason'] for result in results] == ['length', None, 'stop'] and results[1]['text'] is None
