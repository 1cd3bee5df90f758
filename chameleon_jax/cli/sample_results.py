"""What `chameleon sample --output` leaves: PNG files, results.jsonl, index.html; all of it or none of it.

results.jsonl has one line a request, in order, malformed ones too, each with the same keys:

    id, prompt, text, pictures (names of files), reason, tokens (ids), options, error

`text` has the name of each picture in brackets at its place. `reason` is why it ended (stop, length, picture); it and
`tokens` are null with --best_of. `error` is null unless the request failed, and then everything unknown is null.
"""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from chameleon_jax.cli.sample_requests import Malformed, Request
from chameleon_jax.sampling import page
from chameleon_jax.tokens.document import Document

_LONGEST_NAME = 80


@dataclasses.dataclass(frozen=True)
class Result:
  """What came of a request: a document, or an error of one line."""

  request: Request | Malformed
  document: Document | None = None
  reason: str | None = None
  tokens: tuple[int, ...] | None = None
  error: str | None = None


def picture_names(ids: Sequence[str], *, from_flags: bool) -> list[str]:
  """Name of each request's pictures, without number and ending: safe as a file name, and no two alike.

  From flags they are `picture`, or `picture_1`, `picture_2`, ... of several; from a file what is safe of the id.
  """
  if from_flags:
    return ['picture'] if len(ids) == 1 else [f'picture_{place + 1}' for place in range(len(ids))]
  names: list[str] = []
  taken: set[str] = set()
  for given in ids:
    plain = re.sub(r'[^A-Za-z0-9._-]+', '-', given).strip('.-')[:_LONGEST_NAME] or 'request'
    name, n = plain, 1
    while name.lower() in taken:  # some file systems do not tell case
      n += 1
      name = f'{plain}-{n}'
    taken.add(name.lower())
    names.append(name)
  return names


def write_results(folder: Path, results: Sequence[Result], names: Sequence[str], *, note: str) -> Path:
  """Writes everything; returns the path of the page. Files of the same names are replaced, others stay.

  Args:
    folder: made if missing.
    results: in the order of the requests.
    names: of each one's pictures, see `picture_names`.
    note: a line for the page.

  Raises:
    OSError: from the file system; the folder is then as it was.
  """
  with _written_aside(folder) as draft:
    lines = []
    for result, name in zip(results, names):
      files = [path.name for path in page.write_pictures(draft, result.document, name=name)] if result.document is not None else []
      lines.append(json.dumps(_line(result, files)) + '\n')  # ASCII: some readers end a line at U+2028
    (draft / 'results.jsonl').write_text(''.join(lines), encoding='utf-8')
    page.write_page(draft / 'index.html', [_section(results, note)])
  return folder / 'index.html'


def _line(result: Result, files: Sequence[str]) -> dict[str, Any]:
  request, document = result.request, result.document
  return {
    'id': request.id,
    'prompt': request.given if isinstance(request, Request) else None,
    'text': None if document is None else page.document_text(document, picture_names=files),
    'pictures': None if document is None else files,
    'reason': result.reason,
    'tokens': result.tokens,
    'options': dataclasses.asdict(request.options) if isinstance(request, Request) else None,
    'error': result.error,
  }


def _section(results: Sequence[Result], note: str) -> page.Section:
  examples = []
  for result in results:
    request = result.request
    if not isinstance(request, Request):
      continue
    caption = request.id if request.where else ''
    if result.document is not None:
      examples.append(page.Example(page.joined(request.prompt, result.document), caption=caption))
    else:
      examples.append(page.Example(request.prompt, caption=f'{caption}: {result.error}'))
  n_failed = sum(result.error is not None for result in results)
  failed = f'\n{n_failed} of {len(results)} requests failed; results.jsonl says why.' if n_failed else ''
  return page.Section('Samples', tuple(examples), note=note + failed, wide=len(examples) == 1)


@contextlib.contextmanager
def _written_aside(folder: Path) -> Iterator[Path]:
  """A folder inside `folder` whose files move into it when the block ends without an error."""
  is_new = not folder.exists()
  folder.mkdir(parents=True, exist_ok=True)
  draft = Path(tempfile.mkdtemp(prefix='.writing-', dir=folder))
  try:
    yield draft
    for path in sorted(draft.iterdir(), key=lambda path: (path.name == 'index.html', path.name)):
      os.replace(path, folder / path.name)
  except BaseException:
    shutil.rmtree(draft, ignore_errors=True)
    if is_new:
      with contextlib.suppress(OSError):
        folder.rmdir()
    raise
  draft.rmdir()
