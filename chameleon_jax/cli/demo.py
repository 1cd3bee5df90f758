"""Describes, draws and edits held-out emoji, writes a document of text and pictures, and shows all of it on a page.

    chameleon demo --output=demo
    chameleon demo --output=demo --model=runs/sft/model
    chameleon demo --output=demo --from_scratch

The pictures asked about are combinations of base, skin tone and gender that training never showed. With --from_scratch
image tokenizer, text tokenizer and transformer are first trained small, in OUTPUT/training; run again after an
interruption, it goes on where it was. Open OUTPUT/index.html in a browser.
"""

import dataclasses
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
from absl import flags

from chameleon_jax.array_types import Pictures
from chameleon_jax.chameleon import Chameleon
from chameleon_jax.cli.demo_training import small_run, train_from_scratch
from chameleon_jax.config import SamplingOptions
from chameleon_jax.data.sources import emoji_documents
from chameleon_jax.data.sources.emoji_world import EmojiItem, EmojiWorld
from chameleon_jax.errors import ConfigError
from chameleon_jax.evals.emoji import GREEDY, only_picture
from chameleon_jax.sampling import page
from chameleon_jax.tokens.document import Document
from chameleon_jax.tokens.images import save_png

T = TypeVar('T')

# One length for the three tasks, so that all prompts run as one batch: a picture with its frame, or the longest name.
ANSWER_TOKENS = 96
DOCUMENT_TOKENS = 320

NOTES = {
    'draw': 'The second picture is the original, which the model has never seen; the third is the best the image tokenizer could do.',
    'edit': 'A picture and a change in, a picture out. The result that was asked for (second, third) was never seen.',
}


@dataclasses.dataclass(frozen=True)
class Task:
  """Prompts of one kind ('describe', 'draw', 'edit') and the item that each should lead to."""

  kind: str
  items: tuple[EmojiItem, ...]
  prompts: tuple[Document, ...]


def define_flags() -> None:
  """Defines the flags of the command."""
  flags.DEFINE_string('output', 'demo', 'folder for index.html and the pictures (made if missing)')
  flags.DEFINE_string('model', 'emoji', "model folder, or 'emoji' for the weights shipped with the package")
  flags.DEFINE_bool('from_scratch', False, 'train all three parts small first (under 25 minutes on two cores) and use them')
  flags.DEFINE_integer('count', 8, 'examples of each task', lower_bound=1, upper_bound=64)
  flags.DEFINE_integer('seed', 0, 'chooses the examples and what is drawn in the document')


def main(argv: Sequence[str]) -> int:
  """Runs the command."""
  if len(argv) > 1:
    raise ConfigError(f'unexpected argument {argv[1]!r}')
  values = flags.FLAGS
  started = time.monotonic()

  def log(line: str) -> None:
    print(f'{time.monotonic() - started:6.0f} s  {line}', file=sys.stderr, flush=True)

  output = pathlib.Path(values.output)
  output.mkdir(parents=True, exist_ok=True)
  name = values.model
  if values.from_scratch:
    name = str(train_from_scratch(small_run(), output / 'training', log=log))
  log(f'loading {name}')
  written = run(Chameleon.load(name), output, count=values.count, seed=values.seed, log=log)
  log('done')
  print(f'wrote {written}')
  return 0


def run(model: Chameleon, output: pathlib.Path, *, count: int, seed: int, log: Callable[[str], None]) -> pathlib.Path:
  """Samples everything, writes the page and the pictures that were drawn; returns the path of the page."""
  world = EmojiWorld.load('all')
  rng = np.random.default_rng(seed)
  tasks = make_tasks(world, rng, count)
  log(f'drawing, describing and editing, {count} of each (much of the time goes into compiling)')
  prompts = [prompt for task in tasks for prompt in task.prompts]
  longest = max(ANSWER_TOKENS, model.n_image_tokens + 8)
  answers = iter(model.generate(prompts, dataclasses.replace(GREEDY, max_new_tokens=longest)))
  sections = []
  for task in tasks:
    found = [next(answers) for _ in task.items]
    sections.append(make_section(model, world, task, found))
    for place, (item, answer) in enumerate(zip(task.items, found), 1):
      log(report_line(task.kind, item, answer))
      if task.kind != 'describe' and (picture := only_picture(answer)) is not None:
        save_png(output / f'{task.kind}_{place}.png', picture)

  log('writing a document')
  document = write_document(model, choose(rng, [item for item in world.items if item.split == 'validation'], 1)[0], seed=seed)
  sections.append(page.Section('A document', (page.Example(document),), note='The model wrote everything after the first name.', wide=True))
  page.write_pictures(output, document, name='document')
  (output / 'document.txt').write_text(page.document_text(document) + '\n', encoding='utf-8')
  note = f'Model {model.name}. All pictures asked about are held-out combinations of base, skin tone and gender.'
  return page.write_page(output / 'index.html', sections, title='Chameleon on the emoji world', note=note)


def make_tasks(world: EmojiWorld, rng: np.random.Generator, count: int) -> list[Task]:
  """`count` held-out pictures to draw, others to describe, and edits that end in `count` different ones."""
  held_out = [item for item in world.items if item.split == 'validation']
  drawn, described = choose(rng, held_out, count), choose(rng, held_out, count)
  pairs = emoji_documents.edit_pairs(world, 'validation')
  results = choose(rng, sorted({result for _, result in pairs}), count)
  starts = [choose(rng, [start for start, end in pairs if end == result], 1)[0] for result in results]
  edits = [(world.items[start], world.items[result]) for start, result in zip(starts, results)]
  return [
      Task('draw', drawn, tuple(emoji_documents.draw_prompt(item) for item in drawn)),
      Task('describe', described, tuple(emoji_documents.describe_prompt(item) for item in described)),
      Task('edit', tuple(result for _, result in edits), tuple(emoji_documents.edit_prompt(*edit) for edit in edits)),
  ]


def make_section(model: Chameleon, world: EmojiWorld, task: Task, answers: Sequence[Document]) -> page.Section:
  """One task on the page: each prompt with its answer; the originals beside what was drawn, the name below what was described."""
  documents = [page.joined(prompt, answer) for prompt, answer in zip(task.prompts, answers)]
  if task.kind == 'describe':
    exact = [is_exact(item, answer) for item, answer in zip(task.items, answers)]
    captions = ['exact' if right else f'its name: {item.name}' for right, item in zip(exact, task.items)]
    examples = tuple(page.Example(document, caption=caption) for document, caption in zip(documents, captions))
    return page.Section('Describe', examples, note=f'{sum(exact)} of {len(exact)} names are exact.')
  originals = world.pictures[[item.index for item in task.items]]
  copies: Pictures = model.decode_codes(model.encode_images(originals))
  beside = [(page.Original(a, 'original'), page.Original(b, 'through the image tokenizer')) for a, b in zip(originals, copies)]
  captions = [item.name if task.kind == 'edit' else '' for item in task.items]
  examples = tuple(page.Example(*parts) for parts in zip(documents, beside, captions))
  return page.Section(task.kind.capitalize(), examples, note=NOTES[task.kind])


def is_exact(item: EmojiItem, answer: Document) -> bool:
  """Whether the answer is the item's English name."""
  return answer.text.strip() == item.name


def report_line(kind: str, item: EmojiItem, answer: Document) -> str:
  """What came of one prompt, for the terminal."""
  if kind == 'describe':
    return f'describe: {answer.text.strip()!r}' + ('' if is_exact(item, answer) else f', but it is {item.name!r}')
  return f'{kind}: {item.name}' + (', no picture came' if only_picture(answer) is None else '')


def write_document(model: Chameleon, item: EmojiItem, *, seed: int) -> Document:
  """A document that opens with the name of a held-out picture; everything behind it is sampled."""
  opening = Document.plain(f'Three pictures:\n- {item.name}: ')
  options = SamplingOptions(
      max_new_tokens=max(DOCUMENT_TOKENS, 3 * (model.n_image_tokens + 24)),
      repetition_penalty=1.0,
      image_greedy=True,
      guidance_text=1.0,
      guidance_image=1.0,
      max_images=3,
      stop_at_end_turn=False,
      seed=seed,
  )
  return page.joined(opening, model.generate([opening], options)[0])


def choose(rng: np.random.Generator, values: Sequence[T], n: int) -> tuple[T, ...]:
  """n different values (all, where there are fewer) in random order."""
  return tuple(values[place] for place in rng.permutation(len(values))[:n])
