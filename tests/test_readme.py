"""README's Python runs as printed, on the shipped weights."""

import pathlib
import re

import numpy as np

README = pathlib.Path(__file__).resolve().parent.parent / 'README.md'


def test_the_python_examples_work_as_printed(capsys):
  blocks = re.findall(r'```python\n(.*?)```', README.read_text(encoding='utf-8'), re.DOTALL)
  assert len(blocks) == 2
  names = {}
  for block in blocks:
    exec(compile(block, 'README.md', 'exec'), names)
  assert names['picture'].shape == (64, 64, 3) and names['picture'].dtype == np.uint8
  printed = capsys.readouterr().out.splitlines()
  assert {'0 TextPiece', '0 Ended', '1 PictureStarted', '1 PictureRows', '1 PictureDone', '1 Ended'} <= set(printed)
  kept = names['model'].encode_images(names['picture'][None])[0]
  fixed = names['redraw'].fixed_codes
  assert fixed[:32] == (None,) * 32 and fixed[32:] == tuple(int(code) for code in names['codes'][0][32:])
  assert kept.shape == (64,)
  assert names['inpainted'].pictures[0].pixels.shape == names['best'].pictures[0].pixels.shape == (64, 64, 3)
