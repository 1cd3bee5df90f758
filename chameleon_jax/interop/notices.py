"""What goes beside converted weights: the licences that lay beside the source, and NOTICE.txt.

In Meta's layout licences lie in the folder that holds `models/` and `tokenizer/`; that is looked through too, and no other folder
above the weights, which might be of a project with a licence of its own:

    data/LICENSE   data/USE_POLICY.md   data/models/7b/   data/tokenizer/
Meta's release asks that a notice be kept with its weights. The wording it asks for is gated and not known here, so
NOTICE.txt says in other words where the weights came from and that theirs is the licence that counts.
"""

import os
import pathlib
import shutil

from chameleon_jax import __version__
from chameleon_jax.interop.lazy import LazyModel
from chameleon_jax.interop.meta.files import MODELS, TOKENIZER

NOTICE = 'NOTICE.txt'
LICENCES = ('LICENSE*', 'USE_POLICY*', 'NOTICE*')
_FAMILY = {'meta': "Meta's Chameleon form", 'huggingface': "Hugging Face's Chameleon form"}


def write_notices(folder: pathlib.Path, source: pathlib.Path, model: LazyModel, *, tokenizer: pathlib.Path | None = None) -> None:
  """Copies licences and notices of the source, and says in NOTICE.txt where the weights came from.

  A NOTICE.txt of the source goes on in the new one, so weights converted twice tell of both. Of two files of one name in different
  places the one nearest to the weights is kept.

  Args:
    folder: where to write.
    source: the weights.
    model: the same, opened.
    tokenizer: the folder that was given for the tokenizers.
  """
  for place in _places(source, tokenizer):
    for path in (path for pattern in LICENCES for path in sorted(place.glob(pattern))):
      if path.is_file() and not (folder / path.name).exists():
        shutil.copyfile(path, folder / path.name)
  text = notice(model)
  if text is None:
    return
  before = (folder / NOTICE).read_text(encoding='utf-8', errors='replace') if (folder / NOTICE).exists() else ''
  if text not in before:
    (folder / NOTICE).write_text(f'{before.rstrip()}\n\n{text}'.lstrip(), encoding='utf-8')


def _places(source: pathlib.Path, tokenizer: pathlib.Path | None) -> list[pathlib.Path]:
  """Where licences of the weights may lie, the nearest first."""
  source = pathlib.Path(os.path.abspath(source))
  found = [source, *([] if tokenizer is None else [tokenizer])]
  above = source.parent.parent if source.parent.name == MODELS else source.parent
  if source.parent.name == MODELS or (above / TOKENIZER).is_dir():
    found += [above / TOKENIZER, above]
  if (source / MODELS).is_dir() or (source / TOKENIZER).is_dir():  # a `data` folder, given whole
    found += [*sorted((source / MODELS).glob('*')), source / TOKENIZER]
  return [place for place in dict.fromkeys(found) if place.is_dir()]


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
