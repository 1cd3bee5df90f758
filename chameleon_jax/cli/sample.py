"""Continues prompts with text and pictures.

    chameleon sample --prompt="Draw a red apple." --output=out
    chameleon sample --model=runs/sft/model --image=cat.png --prompt="What is this?" --modalities=text --stream
    chameleon sample --completion --prompt="The parser reads" --modalities=text --count=4
    chameleon sample --prompts_file=prompts.jsonl --output=out --best_of=4
    chameleon sample --prompt="Draw a red apple." --fix_from=apple.png --redraw=0,16,16,16 --modalities=image --output=out

The prompt is one turn of a conversation, the pictures of --image before its text; with --completion it is the
beginning of a document. The text goes to stdout; --output also gets the pictures as PNG files, results.jsonl with one line
a request, and a page, index.html. --prompts_file holds many prompts: one a line of a .txt file, or of a .jsonl file requests

    {"prompt": "text" or [{"text": "..."}, {"image": "FILE"}], "options": {"seed": 3, ...}, "id": "name"}

whose options are those below and the other fields of SamplingOptions. A request that cannot be done is reported, the others
run, and the exit code is 1.
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from absl import flags

from chameleon_jax.cli.values import parse_value
from chameleon_jax.config import CacheDtype, Quantization, SamplingOptions
from chameleon_jax.errors import ChameleonError, ConfigError

if TYPE_CHECKING:
  from chameleon_jax.cli.sample_requests import Malformed, Request

_DEFAULTS = SamplingOptions()
_TOKEN_LISTS = ('banned_tokens', 'stop_tokens')


def define_flags() -> None:
  """Defines the flags of the command; sampling flags are the fields of `SamplingOptions`."""
  flags.DEFINE_string('model', 'emoji', "model folder, or 'emoji' for the weights shipped with the package")
  flags.DEFINE_string('adapter', None, 'folder of a LoRA adapter to add to the weights')
  flags.DEFINE_enum('quantization', None, list(get_args(Quantization)), 'keep the weights of the transformer in int8')
  flags.DEFINE_enum('cache_dtype', None, list(get_args(CacheDtype)), 'type of the keys and values kept (default: as computed in)')
  flags.DEFINE_string('prompt', '', "text of the prompt; '-' reads it from stdin")
  flags.DEFINE_multi_string('image', [], 'picture file placed before the text; may be repeated')
  flags.DEFINE_string('prompts_file', None, '.txt with one prompt a line, or .jsonl with one request a line')
  flags.DEFINE_bool('completion', False, 'continue the prompt as a plain document instead of answering it as a turn')
  flags.DEFINE_integer('count', 1, 'how many continuations to draw of each prompt', lower_bound=1)
  flags.DEFINE_integer('best_of', 1, 'draw so many and keep the one that the model itself finds most likely', lower_bound=1)
  flags.DEFINE_string('output', None, 'folder for PNG files, results.jsonl and index.html (made if missing)')
  flags.DEFINE_bool('stream', False, 'print text as it comes')
  flags.DEFINE_bool('progress', None, 'show a bar while pictures are drawn (default: on a terminal)')
  flags.DEFINE_string('fix_from', None, 'picture file that the first picture keeps all of but the part of --redraw')
  flags.DEFINE_string('redraw', None, 'top,left,height,width in pixels of --fix_from: the part that is drawn anew')
  flags.DEFINE_enum('modalities', _DEFAULTS.modalities, ['text', 'image', 'mixed'], 'what may be written; image: one picture only')
  flags.DEFINE_integer('max_new_tokens', _DEFAULTS.max_new_tokens, 'most tokens to write; the context may end earlier')
  flags.DEFINE_integer('min_images', _DEFAULTS.min_images, 'least pictures to write')
  flags.DEFINE_integer('max_images', _DEFAULTS.max_images, 'most pictures to write (default: no limit)')
  flags.DEFINE_string('banned_tokens', '', 'ids of tokens never to write, with commas between')
  flags.DEFINE_string('stop_tokens', '', 'ids of tokens that end the writing too, with commas between')
  flags.DEFINE_bool('greedy', _DEFAULTS.greedy, 'take the most likely text token instead of drawing one')
  flags.DEFINE_float('temperature', _DEFAULTS.temperature, 'of text')
  flags.DEFINE_float('top_p', _DEFAULTS.top_p, 'of text')
  flags.DEFINE_float('repetition_penalty', _DEFAULTS.repetition_penalty, 'of text; 1 switches it off')
  flags.DEFINE_bool('image_greedy', _DEFAULTS.image_greedy, 'take the most likely image token instead of drawing one')
  flags.DEFINE_float('image_temperature', _DEFAULTS.image_temperature, 'of pictures')
  flags.DEFINE_float('image_top_p', _DEFAULTS.image_top_p, 'of pictures')
  flags.DEFINE_float('guidance_text', _DEFAULTS.guidance_text, 'how strongly pictures follow the text; 1 switches it off')
  flags.DEFINE_float('guidance_image', _DEFAULTS.guidance_image, 'how strongly pictures follow earlier pictures; 1 switches it off')
  flags.DEFINE_integer('seed', _DEFAULTS.seed, 'the same seed gives the same result')


def options_from_flags() -> SamplingOptions:
  """The sampling options that the flags ask for.

  Raises:
    ConfigError: a value is out of range.
  """
  fields = [field.name for field in dataclasses.fields(SamplingOptions) if field.name in flags.FLAGS]
  values: dict[str, Any] = {name: flags.FLAGS[name].value for name in fields}
  values |= {name: parse_value(values[name], tuple[int, ...], key=f'--{name}') for name in _TOKEN_LISTS}
  try:
    return SamplingOptions(stop_at_end_turn=not flags.FLAGS.completion, **values)
  except ValueError as error:
    raise ConfigError(f'sampling flags: {error}') from error


def check_flags() -> None:
  """Raises ConfigError for flags that do not go together."""
  values = flags.FLAGS
  if values.stream and values.best_of > 1:
    raise ConfigError('--stream prints what is drawn and --best_of throws most of it away: choose one')
  if (values.fix_from is None) != (values.redraw is None):
    raise ConfigError('--fix_from=FILE and --redraw=top,left,height,width belong together: give both')
  if values.prompts_file is not None and (values.prompt or values.image):
    raise ConfigError('--prompts_file comes with prompts of its own: leave --prompt and --image out')
  if values.output is not None and Path(values.output).exists() and not Path(values.output).is_dir():
    raise ConfigError(f'--output={values.output} is a file; name a folder')


def requests_from_flags(options: SamplingOptions) -> 'list[Request | Malformed]':
  """What is to be continued: the prompt of the flags, or those of the file.

  Raises:
    ConfigError: the file cannot be used.
    PromptError: there is no prompt.
    ImageError: a picture of --image cannot be read.
  """
  from chameleon_jax.cli.sample_requests import Request, copies, prompt_document, read_requests
  from chameleon_jax.tokens.document import Image, Segment, Text
  from chameleon_jax.tokens.images import load_image

  values = flags.FLAGS
  if values.prompts_file is not None:
    return copies(read_requests(values.prompts_file, options, completion=values.completion), values.count)
  text = sys.stdin.read() if values.prompt == '-' else values.prompt
  segments: list[Segment] = [Image(load_image(path)) for path in values.image]
  segments += [Text(text)] if text else []
  given = [*({'image': path} for path in values.image), *([{'text': text}] if text else [])] if values.image else text
  prompt = prompt_document(segments, completion=values.completion)
  return [Request(str(copy + 1), prompt, given, options) for copy in range(values.count)]


def main(argv: Sequence[str]) -> int:
  """Runs the command."""
  from chameleon_jax.chameleon import Chameleon
  from chameleon_jax.cli import sample_results, sample_run
  from chameleon_jax.cli.sample_requests import Malformed
  from chameleon_jax.sampling import page

  if len(argv) > 1:
    raise ConfigError(f'unexpected argument {argv[1]!r}; put the prompt in quotes: --prompt="..."')
  values = flags.FLAGS
  check_flags()
  folder = None if values.output is None else Path(values.output)
  from_flags = values.prompts_file is None
  requests = requests_from_flags(options_from_flags())
  for request in requests:
    if isinstance(request, Malformed):
      print(f'chameleon: {request.error}', file=sys.stderr)
  model = Chameleon.load(values.model, adapter=values.adapter, quantization=values.quantization, cache_dtype=values.cache_dtype)
  if values.fix_from is not None:
    requests = sample_run.with_codes(requests, sample_run.fixed_codes(model, values.fix_from, values.redraw))
  names = sample_results.picture_names([request.id for request in requests], from_flags=from_flags)
  shown = [('picture ', '') if folder is None else (str(folder / f'{name}_'), '.png') for name in names]
  if values.best_of > 1:
    results = sample_run.draw_best(model, requests, best_of=values.best_of)
  else:
    bar = sys.stderr.isatty() if values.progress is None else values.progress
    results = sample_run.draw(model, requests, shown, live=values.stream, bar=bar)

  for result, (start, ending) in zip(results, shown):
    if result.error is not None and from_flags:
      raise ChameleonError(result.error)
    if result.document is not None and not values.stream:
      pictures = [f'{start}{number + 1}{ending}' for number in range(len(result.document.pictures))]
      text = page.document_text(result.document, picture_names=pictures)
      print(text if from_flags else f'{result.request.id}: {text}')
    elif result.error is not None and not isinstance(result.request, Malformed):
      print(f'chameleon: {result.error}', file=sys.stderr)
  if folder is not None:
    note = f'model {values.model}, {values.modalities}, seed {values.seed}'
    print(f'wrote {sample_results.write_results(folder, results, names, note=note)}', file=sys.stderr)
  return int(any(result.error is not None for result in results))
