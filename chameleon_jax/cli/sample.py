"""Continues a prompt with text and pictures.

    chameleon sample --prompt="Draw a red apple." --output=out
    chameleon sample --model=runs/sft/model --image=cat.png --prompt="What is this?" --modalities=text
    chameleon sample --completion --prompt="The parser reads" --modalities=text --count=4

The prompt is one turn of a conversation, the pictures of --image before its text; with --completion it is the
beginning of a document. The text goes to stdout; --output also gets the pictures as PNG files and a page, index.html.
"""

import dataclasses
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags

from chameleon_jax.config import SamplingOptions
from chameleon_jax.errors import ConfigError, PromptError

_DEFAULTS = SamplingOptions()


def define_flags() -> None:
  """Defines the flags of the command; sampling flags are the fields of `SamplingOptions`."""
  flags.DEFINE_string('model', 'emoji', "model folder, or 'emoji' for the weights shipped with the package")
  flags.DEFINE_string('prompt', '', "text of the prompt; '-' reads it from stdin")
  flags.DEFINE_multi_string('image', [], 'picture file placed before the text; may be repeated')
  flags.DEFINE_bool('completion', False, 'continue the prompt as a plain document instead of answering it as a turn')
  flags.DEFINE_integer('count', 1, 'how many continuations to draw', lower_bound=1)
  flags.DEFINE_string('output', None, 'folder for PNG files and index.html (made if missing)')
  flags.DEFINE_enum('modalities', _DEFAULTS.modalities, ['text', 'image', 'mixed'], 'what may be written; image: one picture only')
  flags.DEFINE_integer('max_new_tokens', _DEFAULTS.max_new_tokens, 'most tokens to write; the context may end earlier')
  flags.DEFINE_integer('max_images', _DEFAULTS.max_images, 'most pictures to write (default: no limit)')
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
  try:
    return SamplingOptions(stop_at_end_turn=not flags.FLAGS.completion, **values)
  except ValueError as error:
    raise ConfigError(f'sampling flags: {error}') from error


def main(argv: Sequence[str]) -> int:
  """Runs the command."""
  from chameleon_jax.chameleon import Chameleon
  from chameleon_jax.sampling import page
  from chameleon_jax.tokens.document import Document, Image, Turn
  from chameleon_jax.tokens.images import load_image

  if len(argv) > 1:
    raise ConfigError(f'unexpected argument {argv[1]!r}; put the prompt in quotes: --prompt="..."')
  values = flags.FLAGS
  options = options_from_flags()
  text = sys.stdin.read() if values.prompt == '-' else values.prompt
  segments = (*(Image(load_image(path)) for path in values.image), *([text] if text else []))
  if not segments and not values.completion:
    raise PromptError('the prompt is empty: give --prompt="..." or --image=FILE (or --completion to write freely)')
  prompt = Document.plain(*segments) if values.completion else Document((Turn(segments, role='prompt'),))  # type: ignore[arg-type]
  answers = Chameleon.load(values.model).generate([prompt] * values.count, options)

  folder = None if values.output is None else pathlib.Path(values.output)
  for index, answer in enumerate(answers):
    name = 'picture' if len(answers) == 1 else f'picture_{index + 1}'
    paths = [] if folder is None else page.write_pictures(folder, answer, name=name)
    print(page.document_text(answer, picture_names=[str(path) for path in paths]))
  if folder is not None:
    examples = tuple(page.Example(page.joined(prompt, answer)) for answer in answers)
    note = f'model {values.model}, {options.modalities}, seed {options.seed}'
    written = page.write_page(folder / 'index.html', [page.Section('Samples', examples, note=note, wide=len(examples) == 1)])
    print(f'wrote {written}', file=sys.stderr)
  return 0
