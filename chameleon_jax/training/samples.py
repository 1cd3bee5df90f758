"""What the model writes while it is trained: pictures and texts in TensorBoard, and a page in WORKDIR/samples/step_N/.

    prompt (validation)    answer drawn now              the document went on
    Draw a red apple.      [picture]                     [picture]
    [picture]              a cat face                    cat face
    The first half of      a text goes on ...            a text is continued like this

The prompts are chosen once and stay, so that pages of different steps compare. Drawing takes its randomness from the seed in
`config.samples.options` and the place of the prompt alone, and changes nothing of the run: its losses are the same with and without.
The parameters are used where they lie on the mesh; a copy in the model's compute type exists while samples are drawn.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from chameleon_jax.array_types import Params
from chameleon_jax.config import TrainConfig
from chameleon_jax.data.sources.source import make_source
from chameleon_jax.errors import ChameleonError, SamplingError
from chameleon_jax.interop.native import ModelParts
from chameleon_jax.models.vqgan.model import decode_pixels
from chameleon_jax.sampling import page
from chameleon_jax.sampling.engine import Engine
from chameleon_jax.tokens import images
from chameleon_jax.tokens.document import Codes, Document, Image, Segment, Text, Turn
from chameleon_jax.tokens.render import render_prompt, unrender
from chameleon_jax.training.metrics import MetricsWriter


@dataclasses.dataclass(frozen=True)
class Prompt:
  """The beginning of a document, how it went on, and the tokens to continue."""

  document: Document
  rest: Document
  source: str
  index: int
  tokens: np.ndarray


def split(document: Document) -> tuple[Document, Document] | None:
  """A document cut into what is given and what is to be written; None where nothing would be given.

      prompt answer prompt answer    -> prompt answer prompt | answer
      text picture                   -> text | picture
      picture text picture           -> picture text | picture
      one two three four five        -> one two | three four five
  """
  if not document.is_plain:
    if len(document.turns) < 2 or document.turns[-1].role != 'answer':
      return None
    return Document(document.turns[:-1]), Document(document.turns[-1:])
  segments: Sequence[Segment] = document.turns[0].segments
  if len(segments) > 1:
    return Document.plain(*segments[:-1]), Document.plain(segments[-1])
  words = segments[0].text.split(' ') if segments and isinstance(segments[0], Text) else []
  half = len(words) // 2
  if half == 0:
    return None
  return Document.plain(' '.join(words[:half])), Document.plain(' ' + ' '.join(words[half:]))


class Sampler:
  """Draws samples of a run.

  Args:
    config: of the run; `config.samples` says how.
    parts: its tokenizers.
    data: vocabulary, text_tokenizer, and codes and encode_images where there are some, as for `make_batches`.
    writer: of the run.
    workdir: of the run.
  """

  def __init__(self, config: TrainConfig, parts: ModelParts, *, data: Mapping[str, Any], writer: MetricsWriter, workdir: Path):
    self._config, self._parts, self._data, self._writer, self._workdir = config, parts, data, writer, workdir
    self._vocabulary = data['vocabulary']
    self._options = config.samples.options
    if parts.vqgan_config is None:  # nobody knows how many codes a picture has
      self._options = dataclasses.replace(self._options, modalities='text', min_images=0)
    self._prompts: list[Prompt] | None = None

  def evaluated(self, step: int, whole_params: Callable[[], Params]) -> None:
    """Called after each evaluation; draws at every `every_evaluations`-th of them, and only then asks for the parameters."""
    every = self._config.samples.every_evaluations
    if every is None:
      return
    if (step // self._config.eval_every) % every == 0 or step == self._config.n_steps:
      self.draw(step, whole_params())

  def draw(self, step: int, params: Params) -> None:
    """Draws and writes. On several hosts all must call it together. A sample that cannot be drawn is said, and the run goes on."""
    if self._prompts is None:
      self._prompts = list(self._find_prompts())
    if not self._prompts:
      self._writer.say('samples: the validation documents have no beginnings to continue; nothing is drawn')
      return
    n_image_tokens = 1 if self._parts.vqgan_config is None else self._parts.vqgan_config.n_image_tokens
    try:
      engine = Engine(self._config.model, params, self._vocabulary, n_image_tokens=n_image_tokens)
      rows = engine.generate_tokens([prompt.tokens for prompt in self._prompts], self._options)
    except SamplingError as error:
      self._writer.say(f'samples of step {step}: {error}')
      rows = error.results
    except ChameleonError as error:
      self._writer.say(f'samples of step {step}: {error}; none drawn')
      return
    answers = [unrender(row, self._vocabulary, self._data['text_tokenizer']) for row in rows]
    # All hosts decode the pictures, and together: under the mesh of all of them a program of one alone would wait for the others.
    shown = self._decoded([part for prompt, answer in zip(self._prompts, answers) for part in (prompt.document, answer, prompt.rest)])
    if jax.process_index() == 0:
      self._write(step, self._prompts, shown)

  def _find_prompts(self) -> Iterator[Prompt]:
    """From each source in turn the next document that can be cut and leaves room for an answer."""
    names = [name for name, _ in self._config.data.stages[-1].weights]
    sources = {name: make_source(name, 'validation', codes=self._data.get('codes')) for name in names}
    found = {name: self._prompts_of(name, source) for name, source in sources.items()}
    n_found = 0
    while found and n_found < self._config.samples.n_prompts:
      for name in list(found):
        prompt = next(found[name], None)
        if prompt is None:
          del found[name]
        elif n_found < self._config.samples.n_prompts:
          n_found += 1
          yield prompt

  def _prompts_of(self, name: str, source: Any) -> Iterator[Prompt]:
    for index in range(len(source)):
      pieces = split(source.document(index, np.random.default_rng(index)))
      if pieces is None:
        continue
      encode = self._data.get('encode_images')
      tokens = render_prompt(pieces[0], self._vocabulary, self._data['text_tokenizer'], encode_images=encode)
      if len(tokens) < self._config.model.max_seq_len:
        yield Prompt(*pieces, source=name, index=index, tokens=tokens)

  def _write(self, step: int, prompts: Sequence[Prompt], shown: Sequence[Document]) -> None:
    """`shown` holds for each prompt what was given, what was written, and how the document went on."""
    folder = self._workdir / 'samples' / f'step_{step:07d}'
    examples = []
    for number, prompt in enumerate(prompts):
      given, written, rest = shown[3 * number : 3 * number + 3]
      whole = page.joined(given, written)
      caption = f'{prompt.source}, validation document {prompt.index}. It went on: {page.document_text(rest)}'
      examples.append(page.Example(whole, originals=_originals(rest), caption=caption))
      page.write_pictures(folder, written, name=f'sample_{number}')
      name = f'samples/{number}_{prompt.source}'
      parts = {'prompt': given, 'answer': written, 'the document': rest}
      text = '\n\n'.join(f'{title}:\n\n{page.document_text(part)}' for title, part in parts.items())
      pictures = [segment.pixels for segment in written.segments if isinstance(segment, Image)]
      self._writer.show(step, name, text=text, pictures=pictures)
    title = f'Samples at step {step:,}'
    page.write_page(folder / 'index.html', [page.Section('Validation documents continued', tuple(examples))], title=title)
    self._writer.say(f'samples: {folder / "index.html"}')

  def _decoded(self, documents: Sequence[Document]) -> list[Document]:
    """Pictures of as many codes as a picture has become pixels, all in one go."""
    config, params = self._parts.vqgan_config, self._parts.vqgan_params
    if config is None or 'decoder' not in (params or {}):
      return list(documents)
    n = config.n_image_tokens
    whole = [s.codes for document in documents for s in document.segments if isinstance(s, Codes) and len(s.codes) == n]
    pictures = iter(images.to_uint8(decode_pixels(config, params, np.stack(whole))) if whole else ())

    def decoded(segment: Segment) -> Segment:
      return Image(next(pictures)) if isinstance(segment, Codes) and len(segment.codes) == n else segment

    return [Document(tuple(Turn(tuple(map(decoded, turn.segments)), turn.role) for turn in document.turns)) for document in documents]


def _originals(rest: Document) -> tuple[page.Original, ...]:
  return tuple(page.Original(segment.pixels, 'the document') for segment in rest.segments if isinstance(segment, Image))
