"""Shows documents: one self-contained HTML page, PNG files, plain text.

    write_page('out/index.html', [Section('Draw', (Example(document, originals=(Original(pixels, 'truth'),)),))])

The page loads nothing: pictures are PNG data inside it, the style sheet too; it follows the reader's light or dark
setting. Whatever a document says is shown as text, never as markup. This file knows no model: pictures come
decoded (`Chameleon.generate` does that), and what is still codes is shown as an unfinished picture.
"""

import base64
import dataclasses
import html
import os
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import UInt8

from chameleon_jax.tokens.document import Document, Image, Segment, Text, Turn
from chameleon_jax.tokens.images import png_bytes, save_png

Pixels = UInt8[np.ndarray, 'H W 3']

_SHOWN_PIXELS = 128  # small pictures are enlarged to about this side, by a whole factor

_STYLE = """
:root { color-scheme: light dark;
  --ground: #fcfcfa; --panel: #ffffff; --ink: #1c1d1f; --soft: #62666d; --line: #dcdcd6; --prompt: #eef1f6; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #16181b; --panel: #1f2226; --ink: #e8e8e4; --soft: #9aa0a8; --line: #34383e; --prompt: #282d35; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 70rem; padding: 2rem 1.25rem 4rem; background: var(--ground); color: var(--ink);
  font: 1rem/1.55 system-ui, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .5rem; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .25rem; }
p.note { color: var(--soft); max-width: 45rem; margin: .25rem 0 1rem; white-space: pre-line; }
.examples { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); gap: 1rem; }
.examples.wide { grid-template-columns: 1fr; }
article { background: var(--panel); border: 1px solid var(--line); border-radius: .6rem; padding: .9rem 1rem; overflow-wrap: anywhere; }
.turn { white-space: pre-wrap; margin: .35rem 0; }
.turn.prompt { background: var(--prompt); border-radius: .4rem; padding: .4rem .6rem; }
.role, figcaption, .caption { color: var(--soft); font-size: .8rem; white-space: normal; }
.role { display: block; }
.pictures { display: flex; flex-wrap: wrap; gap: .75rem; margin: .5rem 0; }
figure { margin: .35rem 0; display: inline-block; vertical-align: top; }
figure img { display: block; border: 1px solid var(--line); border-radius: .3rem; background: #fff;
  image-rendering: pixelated; max-width: 100%; height: auto; }
.unfinished { display: inline-block; border: 1px dashed var(--line); border-radius: .3rem; padding: .4rem .6rem;
  color: var(--soft); font-size: .85rem; }
""".strip()


@dataclasses.dataclass(frozen=True, eq=False)
class Original:
  """A picture to compare with: uint8 [H, W, 3] and what it is."""

  pixels: Pixels
  caption: str = 'original'


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
  """A document, the pictures to show beside it, and a line about it."""

  document: Document
  originals: tuple[Original, ...] = ()
  caption: str = ''


@dataclasses.dataclass(frozen=True, eq=False)
class Section:
  """A titled group of examples; `wide` gives each the whole width (for long documents)."""

  title: str
  examples: tuple[Example, ...]
  note: str = ''
  wide: bool = False


def picture_of(segment: Segment) -> Pixels | None:
  """The pixels of a segment; None where there are none."""
  return segment.pixels if isinstance(segment, Image) else None


def unfinished_note(segment: Segment) -> str:
  """What stands for a picture that was cut off."""
  return f'[unfinished picture, {len(getattr(segment, "codes", ()))} codes]'


def joined(prompt: Document, answer: Document) -> Document:
  """The prompt followed by what was written to it: as one more answer, or as one plain document."""
  if prompt.is_plain:
    return Document.plain(*prompt.segments, *answer.segments)
  return Document((*prompt.turns, Turn(answer.segments, role='answer')))


def document_text(document: Document, *, picture_names: Sequence[str] = ()) -> str:
  """The document as plain text, turns on lines of their own, each picture as `[name]`.

  Args:
    document: to show.
    picture_names: of its finished pictures in order; those left over are called `picture 1`, `picture 2`, ...
  """
  names = iter(picture_names)
  count = 0
  turns = []
  for turn in document.turns:
    parts = []
    for segment in turn.segments:
      if isinstance(segment, Text):
        parts.append(segment.text)
      elif picture_of(segment) is None:
        parts.append(unfinished_note(segment))
      else:
        count += 1
        parts.append(f'[{next(names, f"picture {count}")}]')
    turns.append(''.join(parts))
  return '\n'.join(turns)


def write_pictures(directory: str | os.PathLike[str], document: Document, *, name: str = 'picture') -> list[pathlib.Path]:
  """Writes the document's finished pictures as `<name>_1.png`, ...; returns the paths in order. Makes the directory."""
  folder = pathlib.Path(directory)
  folder.mkdir(parents=True, exist_ok=True)
  paths: list[pathlib.Path] = []
  for pixels in (picture_of(segment) for segment in document.segments):
    if pixels is not None:
      paths.append(folder / f'{name}_{len(paths) + 1}.png')
      save_png(paths[-1], pixels)
  return paths


def write_page(path: str | os.PathLike[str], sections: Sequence[Section], *, title: str = 'Chameleon', note: str = '') -> pathlib.Path:
  """Writes the page, whole or not at all; makes its directory. Returns its path."""
  return write_html(path, page_html(sections, title=title, note=note))


def write_html(path: str | os.PathLike[str], text: str) -> pathlib.Path:
  """Writes a page that is ready, whole or not at all; makes its directory. Returns its path."""
  target = pathlib.Path(path)
  target.parent.mkdir(parents=True, exist_ok=True)
  draft = target.with_name(target.name + '.part')
  try:
    draft.write_text(text, encoding='utf-8')
    draft.replace(target)
  finally:
    draft.unlink(missing_ok=True)
  return target


def page_html(sections: Sequence[Section], *, title: str = 'Chameleon', note: str = '') -> str:
  """The page as a string."""
  return shell([line for section in sections for line in _section(section)], title=title, note=note)


def shell(body: Sequence[str], *, title: str, note: str = '', style: str = '') -> str:
  """A whole page around lines of HTML, in the style of this file and any rules of `style` besides."""
  return '\n'.join(
    [
      '<!DOCTYPE html>',
      '<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">',
      f'<title>{html.escape(title)}</title>',
      f'<style>\n{_STYLE}\n{style}</style></head><body>',
      f'<h1>{html.escape(title)}</h1>',
      *_note(note),
      *body,
      '</body></html>\n',
    ]
  )


def _note(note: str) -> list[str]:
  return [f'<p class="note">{html.escape(note)}</p>'] if note else []


def _section(section: Section) -> Iterator[str]:
  yield f'<section><h2>{html.escape(section.title)}</h2>'
  yield from _note(section.note)
  yield f'<div class="examples{" wide" if section.wide else ""}">'
  for example in section.examples:
    yield '<article>'
    for turn in example.document.turns:
      role = '' if turn.role == 'document' else f'<span class="role">{turn.role}</span>'
      yield f'<div class="turn {turn.role}">{role}{"".join(map(_segment, turn.segments))}</div>'
    if example.originals:
      yield '<div class="pictures">' + ''.join(figure(original.pixels, original.caption) for original in example.originals) + '</div>'
    if example.caption:
      yield f'<div class="caption">{html.escape(example.caption)}</div>'
    yield '</article>'
  yield '</div></section>'


def _segment(segment: Segment) -> str:
  if isinstance(segment, Text):
    return html.escape(segment.text)
  pixels = picture_of(segment)
  return f'<span class="unfinished">{html.escape(unfinished_note(segment))}</span>' if pixels is None else figure(pixels)


def figure(pixels: Pixels, caption: str = '') -> str:
  """A picture as HTML that holds it."""
  height, width = pixels.shape[:2]
  factor = max(1, _SHOWN_PIXELS // max(height, width))
  data = base64.b64encode(png_bytes(pixels)).decode('ascii')
  text = html.escape(caption)
  image = f'<img src="data:image/png;base64,{data}" width="{width * factor}" height="{height * factor}" alt="{text or "picture"}">'
  return f'<figure>{image}{f"<figcaption>{text}</figcaption>" if text else ""}</figure>'
