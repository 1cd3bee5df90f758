"""Draws curves of one or more runs from their metrics.jsonl files into one picture.

    python tools/plot_metrics.py --output=curves.png \
        --panel='Image tokenizer|PSNR (dB)|runs/image_tokenizer/metrics.jsonl|validation/psnr,train/psnr' \
        --panel='Update ratios|update / parameter|runs/pretrain/metrics.jsonl|diagnostics/update_ratio/layer_*' ...

A panel is `title|axis label|metrics file[+more files]|names`; files of runs that follow one another (pre-training,
then fine-tuning) are joined end to end. A `*` in a name stands for anything but a slash, so that one name draws every layer.
To compare runs, name each: `title|axis label|NAME=file+file;NAME=file|metric`.
Needs matplotlib (extra `dev`). Does not smooth: what is drawn is what was logged.
"""

import dataclasses
import json
import pathlib
import re
from collections.abc import Sequence

from absl import app, flags

FLAGS = flags.FLAGS


@dataclasses.dataclass(frozen=True)
class Panel:
  """One chart: names of metrics over the steps of runs that follow one another; or one metric of several runs, each under its name."""

  title: str
  label: str
  files: tuple[pathlib.Path, ...]
  names: tuple[str, ...]
  compared: tuple[tuple[str, tuple[pathlib.Path, ...]], ...] = ()  # (name of a run, its files); then `files` is empty

  @classmethod
  def parse(cls, text: str) -> 'Panel':
    """Reads `title|label|file+file|name,name`, or `title|label|run=file;run=file|name`.

    Raises:
      ValueError: the text has another number of parts, or a file is missing.
    """
    parts = text.split('|')
    if len(parts) != 4:
      raise ValueError(f'panel {text!r} has {len(parts)} parts; write title|axis label|file+file|name,name')
    named = [run.partition('=') for run in parts[2].split(';')] if re.match(r'[\w .+-]+=', parts[2]) else []
    compared = tuple((name, tuple(map(pathlib.Path, joined.split('+')))) for name, _, joined in named)
    files = () if compared else tuple(pathlib.Path(file) for file in parts[2].split('+'))
    for file in (*files, *(file for _, each in compared for file in each)):
      if not file.is_file():
        raise ValueError(f'panel {parts[0]!r}: {file} does not exist')
    return cls(parts[0], parts[1], files, tuple(parts[3].split(',')), compared)


def read_curve(files: Sequence[pathlib.Path], name: str) -> tuple[list[int], list[float]]:
  """Steps and values of one metric; the steps of a later file go on after the last of the one before.

  Of two lines with the same step in one file the later one counts (a run that was resumed).
  """
  steps: list[int] = []
  values: list[float] = []
  offset = 0
  for file in files:
    found: dict[int, float] = {}
    last = 0
    for line in file.read_text(encoding='utf-8').splitlines():
      record = json.loads(line)
      last = max(last, record['step'])
      if name in record and not isinstance(record[name], str):
        found[record['step']] = record[name]
    steps += [offset + step for step in sorted(found)]
    values += [found[step] for step in sorted(found)]
    offset += last
  return steps, values


def matching(files: Sequence[pathlib.Path], pattern: str) -> list[str]:
  """Names of the metrics that a name with `*` stands for, in order; a name without one stands for itself.

  Raises:
    ValueError: it stands for nothing in these files.
  """
  if '*' not in pattern:
    return [pattern]
  names = {name for file in files for line in file.read_text(encoding='utf-8').splitlines() for name in json.loads(line)}
  found = sorted(name for name in names if re.fullmatch('[^/]*'.join(map(re.escape, pattern.split('*'))), name))
  if not found:
    raise ValueError(f'{pattern!r} matches no metric in {", ".join(map(str, files))}')
  return found


def draw(panels: Sequence[Panel], output: pathlib.Path) -> None:
  """Writes the picture; the type follows from the ending of `output`."""
  import matplotlib

  matplotlib.use('Agg')
  import matplotlib.pyplot as plt

  figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.2), squeeze=False, layout='constrained')
  for axis, panel in zip(axes[0], panels):
    for pattern in panel.names:
      for run, files in panel.compared or (('', panel.files),):
        for name in matching(files, pattern):
          axis.plot(*read_curve(files, name), label=run or name, linewidth=1.2)
    axis.set(title=panel.title, xlabel='step', ylabel=panel.label)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
  figure.savefig(output, dpi=110)
  plt.close(figure)


def main(argv: Sequence[str]) -> None:
  del argv
  draw([Panel.parse(text) for text in FLAGS.panel], pathlib.Path(FLAGS.output))


if __name__ == '__main__':
  flags.DEFINE_multi_string('panel', None, 'title|axis label|file+file|name,name', required=True)
  flags.DEFINE_string('output', 'curves.png', 'Picture to write.')
  app.run(main)
