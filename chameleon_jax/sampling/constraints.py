"""Which codes of a picture are given and which are drawn: makers of `SamplingOptions.fixed_codes`.

    inpaint      draw marked codes anew, keep the rest
    outpaint     put a picture into a larger grid, or shift it, and draw what is missing
    variation    keep a random share, draw the rest

All return one entry a code, row by row from the top left: the code, or None where the model is free. Drawn
examples write a free code as a dot. Knows grids of codes only: no pixels (but for their places in `mask_from_pixels`), no
tokens, no codebook size, which the engine checks. A row is drawn in order, so a free code sees the given codes before it and
not those behind it. Source: architecture.md 4 (codes row by row); spec model.md 8.3 (a picture is exactly n codes).
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Shaped

from chameleon_jax.errors import PromptError

FixedCodes = tuple[int | None, ...]
Grid = tuple[int, int]  # rows, columns of codes


def inpaint(codes: np.ndarray | Sequence[int], mask: np.ndarray | Sequence[bool]) -> FixedCodes:
  """Draws the marked codes anew and keeps the others.

      codes  5 6 7    mask  . x .    result  5 . 7
             8 9 3          . x x            8 . .

  Args:
    codes: of one picture, integers [h, w] or [n].
    mask: bool [h, w] or [n], True = draw anew; `mask_from_pixels` makes one from a painted mask.

  Raises:
    PromptError: codes are negative or no integers, the mask is not boolean, of another size, or marks nothing.
  """
  flat, marked = _codes(codes), np.asarray(mask)
  if marked.dtype != bool:
    raise PromptError(f'the mask of codes must be boolean (True = draw anew), got {marked.dtype}; compare it with 0 first')
  both_are_grids = np.ndim(codes) == marked.ndim == 2
  if marked.size != len(flat) or marked.ndim not in (1, 2) or (both_are_grids and np.shape(codes) != marked.shape):
    raise PromptError(f'the mask has shape {list(marked.shape)} and the codes {list(np.shape(codes))}; give one entry a code')
  if not marked.any():
    raise PromptError('the mask marks no code, so nothing would be drawn; mark at least one')
  return _with_free(flat, marked.reshape(-1))


def outpaint(codes: np.ndarray | Sequence[int], source_grid: Grid, grid: Grid, *, top: int, left: int) -> FixedCodes:
  """Places a picture inside the grid that is drawn; everything around it is free.

      codes 5 6    source_grid (2, 2), grid (3, 4), top 1, left 2     . . . .
            7 8                                                       . . 5 6
                                                                      . . 7 8

  Along a side where the picture is as long as the grid it may also be shifted, either way. What leaves the grid is cut
  off, what enters is free:

      codes 5 6    source_grid (2, 2), grid (2, 2), top 0, left -1    6 .
            7 8                                                       8 .

  Args:
    codes: of one picture, integers [h, w] or [n].
    source_grid: its rows and columns of codes.
    grid: rows and columns of the picture to draw.
    top: row of `grid` where the first row of the picture goes.
    left: the same for columns.

  Raises:
    PromptError: codes are negative or no integers, do not fill `source_grid`, do not fit `grid` at this place, or leave
      nothing to draw.
  """
  for name, (rows, columns) in (('source_grid', source_grid), ('grid', grid)):
    if rows < 1 or columns < 1:
      raise PromptError(f'{name} is {rows} x {columns}; both sides must be positive')
  flat = _codes(codes)
  if len(flat) != source_grid[0] * source_grid[1] or (np.ndim(codes) == 2 and np.shape(codes) != source_grid):
    raise PromptError(f'codes of shape {list(np.shape(codes))} do not fill source_grid {source_grid[0]} x {source_grid[1]}')
  sides = zip(('top', 'left'), source_grid, grid, (top, left))
  (to_rows, from_rows), (to_columns, from_columns) = (_place(*side) for side in sides)
  if source_grid == grid and top == left == 0:
    raise PromptError('the picture fills the grid, so nothing would be drawn; give a larger grid, or shift it by top and left')
  placed = np.full(grid, -1, np.int64)
  placed[to_rows, to_columns] = flat.reshape(source_grid)[from_rows, from_columns]
  return _with_free(placed.reshape(-1), placed.reshape(-1) < 0)


def variation(codes: np.ndarray | Sequence[int], *, keep: float, seed: int) -> FixedCodes:
  """Keeps a random share of the codes: the nearer `keep` is to 1, the more the result resembles the picture.

      codes 5 6 7 8    seed 0    keep 0.5     5 . 7 .
                                 keep 0.25    . . 7 .

  The nearest whole number of codes is kept, at least one is free. Which ones depends on the number of codes, `keep` and
  `seed` alone, and with one seed those of a smaller share are among those of a larger.

  Args:
    codes: of one picture, integers [h, w] or [n].
    keep: share of the codes that stays, in [0, 1).
    seed: not negative.

  Raises:
    PromptError: codes are negative or no integers, `keep` lies outside [0, 1), or `seed` is negative.
  """
  flat = _codes(codes)
  if not 0 <= keep < 1:
    raise PromptError(f'keep must lie in [0, 1), got {keep}; with 1 nothing would be drawn')
  if seed < 0:
    raise PromptError(f'seed must not be negative, got {seed}')
  n_kept = min(round(keep * len(flat)), len(flat) - 1)
  free = np.ones(len(flat), bool)
  free[np.random.default_rng(seed).permutation(len(flat))[:n_kept]] = False
  return _with_free(flat, free)


def mask_from_pixels(mask: Shaped[np.ndarray, '...'], grid: Grid) -> Bool[np.ndarray, 'h w']:
  """A painted mask becomes a mask of codes: a code is free where any pixel of its cell is marked.

      mask [4, 4]   0 0 0 9      grid (2, 2)     . x
                    0 0 0 0                      x x
                    0 0 9 9
                    9 0 9 9

  Args:
    mask: [H, W], bool, or uint8 where everything but 0 is marked.
    grid: rows and columns of codes; they must divide H and W.

  Raises:
    PromptError: the mask is of another form or type, its sides are no multiples of the grid's, or it marks nothing.
  """
  (rows, columns), shape = grid, list(mask.shape)
  if mask.ndim != 2 or mask.dtype not in (np.dtype(bool), np.dtype(np.uint8)):
    raise PromptError(f'a mask of pixels is bool or uint8 [H, W], got {mask.dtype} {shape}')
  if rows < 1 or columns < 1:
    raise PromptError(f'grid is {rows} x {columns}; both sides must be positive')
  if mask.size == 0 or shape[0] % rows or shape[1] % columns:
    raise PromptError(f'the mask has {shape[0]} x {shape[1]} pixels, no multiple of the {rows} x {columns} codes; resize it')
  if not mask.any():
    raise PromptError('the mask marks no pixel, so nothing would be drawn; everything but 0 counts as marked')
  return (mask != 0).reshape(rows, shape[0] // rows, columns, shape[1] // columns).any(axis=(1, 3))


def _codes(codes: np.ndarray | Sequence[int]) -> np.ndarray:
  """The codes as one line of integers, checked."""
  array = np.asarray(codes)
  if array.ndim not in (1, 2) or array.size == 0 or not np.issubdtype(array.dtype, np.integer):
    raise PromptError(f'codes of a picture must be integers [h, w] or [n], got {array.dtype} {list(array.shape)}')
  if array.min() < 0:
    raise PromptError(f'code {array.min()} is negative; give the codes of a picture, which count from 0')
  return array.reshape(-1)


def _place(name: str, size: int, whole: int, offset: int) -> tuple[slice, slice]:
  """Where a side of `size` codes goes in one of `whole`, and which part of it."""
  if size > whole:
    raise PromptError(f'a picture with a side of {size} codes does not fit a grid with one of {whole}; give a larger grid')
  least, most = (1 - whole, whole - 1) if size == whole else (0, whole - size)
  if not least <= offset <= most:
    raise PromptError(f'{name} is {offset}; a side of {size} codes in a grid with one of {whole} goes from {least} to {most}')
  first = max(offset, 0)
  end = min(offset + size, whole)
  return slice(first, end), slice(first - offset, end - offset)


def _with_free(codes: np.ndarray, free: np.ndarray) -> FixedCodes:
  return tuple(None if is_free else int(code) for code, is_free in zip(codes, free))
