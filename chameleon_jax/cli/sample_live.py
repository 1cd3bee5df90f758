"""What `chameleon sample` shows while it works: text as it comes on stdout, a bar for pictures on stderr.

    sky: a blue                                   several requests: each portion on a line of its own, behind its id
    sun: a yellow
    2 pictures [############............] 8/16 rows

Knows events and where to write, neither models nor results.
"""

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

from chameleon_jax.sampling import page
from chameleon_jax.sampling.events import Ended, Event, Failed, PictureDone, PictureRows, PictureStarted, TextPiece
from chameleon_jax.tokens.document import Codes

Write: TypeAlias = Callable[[str], object]

_BAR_WIDTH = 24


class LiveText:
  """Writes the text of a stream; the sum of what one request writes is `page.document_text` of its document."""

  def __init__(self, write: Write, ids: Sequence[str], picture_names: Sequence[tuple[str, str]]):
    """Begins.

    Args:
      write: takes the text, a portion at once.
      ids: of the requests; a single one is written without it.
      picture_names: of each request, what stands before and behind the number of a picture in its name.
    """
    self._print = write
    self._prefixes = [f'{name}: ' for name in ids] if len(ids) > 1 else ['']
    self._picture_names = picture_names
    self._n_pictures = [0] * len(ids)
    self._drawing: set[int] = set()  # requests inside a picture
    self._speaker: int | None = None  # whose line is open

  def show(self, event: Event) -> None:
    """Writes what an event adds to the text."""
    request = event.request
    if isinstance(event, TextPiece):
      self._write(request, event.text)
    elif isinstance(event, PictureStarted):
      self._drawing.add(request)
    elif isinstance(event, PictureDone):
      self._drawing.remove(request)
      if event.image is None:
        self._write(request, page.unfinished_note(Codes(event.codes)))
      else:
        self._n_pictures[request] += 1
        start, ending = self._picture_names[request]
        self._write(request, f'[{start}{self._n_pictures[request]}{ending}]')
    elif isinstance(event, Ended):
      last = event.document.segments[-1:]
      if request in self._drawing and last and isinstance(last[0], Codes):
        self._write(request, page.unfinished_note(last[0]))
      self._end_line(request)
    elif isinstance(event, Failed) and self._speaker == request:
      self._end_line(request)

  def _write(self, request: int, text: str) -> None:
    prefix = self._prefixes[request]
    opening = prefix if self._speaker is None else '' if self._speaker == request else '\n' + prefix
    self._print(opening + text.replace('\n', '\n' + prefix))
    self._speaker = request

  def _end_line(self, request: int) -> None:
    if self._speaker != request and self._prefixes[request]:
      return  # its last line is closed
    self._print('\n')
    self._speaker = None


class PictureBar:
  """Rows of codes of the pictures under way, on one line that is written over."""

  def __init__(self, write: Write, n_image_tokens: int):
    self._print = write
    self._grid = math.isqrt(n_image_tokens)
    self._rows: dict[tuple[int, int], int] = {}
    self._width = 0

  def show(self, event: Event) -> None:
    """Draws the bar anew where an event changes it, or where it was taken away."""
    if isinstance(event, PictureStarted):
      self._rows[event.request, event.picture] = 0
    elif isinstance(event, PictureRows):
      self._rows[event.request, event.picture] = len(event.codes) // self._grid
    elif isinstance(event, PictureDone):
      self._rows[event.request, event.picture] = self._grid
    elif isinstance(event, (Ended, Failed)):
      self._rows = {key: rows for key, rows in self._rows.items() if key[0] != event.request}
    elif self._width:
      return
    self.clear()
    self._draw()
    if isinstance(event, PictureDone):
      del self._rows[event.request, event.picture]

  def clear(self) -> None:
    """Takes the bar away."""
    if self._width:
      self._print('\r' + ' ' * self._width + '\r')
      self._width = 0

  def _draw(self) -> None:
    if not self._rows:
      return
    done, total = sum(self._rows.values()), len(self._rows) * self._grid
    full = _BAR_WIDTH * done // total
    what = 'picture' if len(self._rows) == 1 else f'{len(self._rows)} pictures'
    line = f'{what} [{"#" * full}{"." * (_BAR_WIDTH - full)}] {done}/{total} rows'
    self._print(line)
    self._width = len(line)
