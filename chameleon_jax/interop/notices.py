"""What goes beside converted weights: the licences that lay beside the source, and NOTICE.txt.

Meta's release asks that a notice be kept with its weights. The wording it asks for is gated and not known here, so
NOTICE.txt says in other words where the weights came from and that theirs is the licence that counts.
"""

import pathlib
import shutil

from chameleon_jax import __version__
from chameleon_jax.interop.lazy import LazyModel

NOTICE = 'NOTICE.txt'
LICENCES = ('LICENSE*', 'USE_POLICY*', 'NOTICE*')
_FAMILY = {'meta': "Meta's Chameleon form", 'huggingface': "Hugging Face's Chameleon form"}


def write_notices(folder: pathlib.Path, source: pathlib.Path, model: LazyModel) -> None:
  """Copies licences and notices of the source, and says in NOTICE.txt where the weights came from.

  A NOTICE.txt of the source goes on in the new one, so weights converted twice tell of both.
  """
  for pattern in LICENCES:
    for path in sorted(source.glob(pattern)):
      if path.is_file() and not (folder / path.name).exists():
        shutil.copyfile(path, folder / path.name)
  text = notice(model)
  if text is None:
    return
  before = (folder / NOTICE).read_text(encoding='utf-8', errors='replace') if (folder / NOTICE).exists() else ''
  if text not in before:
    (folder / NOTICE).write_text(f'{before.rstrip()}\n\n{text}'.lstrip(), encoding='utf-8')


def notice(model: LazyModel) -> str | None:
  """The text of NOTICE.txt; None for weights that were made with this package."""
  if model.origin.format == 'orbax':
    return None
  files = ', '.join(sorted(name for name in model.origin.files if not name.endswith('.tree.json'))) or 'none'  # those list keys, see `meta`
  return (
      f'The weights in this folder were converted by chameleon_jax {__version__} from a checkpoint in {_FAMILY[model.origin.format]}.\n'
      f'Files that came with it: {files}.\n'
      'Names, order of the axes and sharding were changed, and the type of the values where that was asked for; nothing was trained.\n'
      '\n'
      "The weights stay under the licence under which their makers released them; the licence of chameleon_jax is for its code alone.\n"
      "Weights of Meta's Chameleon release, and those derived from them, are under the Chameleon Research License, which permits\n"
      'non-commercial research only and asks that its own notice goes with every copy. That wording comes with the release, to those\n'
      'who accepted its terms, and is not repeated here: keep it beside these files.\n'
  )
