"""Source `tfds:NAME` or `tfds:FOLDER`: a data set of tensorflow-datasets with pictures and text, read without TensorFlow.

    tfds:coco_captions                         prepared under ?data_dir=DIR, $TFDS_DATA_DIR or ~/tensorflow_datasets
    tfds:/data/coco_captions/2014/1.1.0        the folder of one version

It must be prepared in files that are read by index, which the default of tensorflow-datasets is not:

    tfds.builder('coco_captions', file_format='array_record').download_and_prepare()

The picture is the one feature of type Image, the captions are the feature of type Text called caption, captions, text, title or
description (inside sequences as well: COCO's `captions.text`), else the name of a ClassLabel. A data set without pictures gives plain text.

    ?image=FEATURE ?text=FEATURE   others, a dot between levels: ?text=captions.text
    ?form=... ?order=... (see pairs.py)   ?data_dir=DIR
    ?validation=SHARE (see files.py); a data set that has a split `validation` or `val` gives that
"""

import functools
import os
import pathlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from chameleon_jax.data.sources.files import VALIDATION_SHARE, SplitRecords
from chameleon_jax.data.sources.naming import SourceName, nearest
from chameleon_jax.data.sources.pairs import OPTIONS, PairForm, texts_of
from chameleon_jax.errors import DataError
from chameleon_jax.tokens.document import Document
from chameleon_jax.tokens.images import load_image

_TEXT_NAMES = ('caption', 'captions', 'text', 'title', 'description')
Path = tuple[str, ...]


class TfdsPairs:
  """Pictures and texts of a prepared data set, see the head of this file.

  Raises:
    DataError: not prepared, not in array_record, a file is missing or cut off, or no feature of the kinds.
  """

  def __init__(self, name: SourceName, split: str):
    name.allow('image', 'text', 'data_dir', 'validation', *OPTIONS)
    self._name, self._form = name, PairForm.of(name)
    self._builder = _builder(name)
    splits = self._builder.info.splits
    if 'train' not in splits:
      raise DataError(f'source {name.name!r} has no split train; it has {", ".join(splits)}')
    own = next((held_out for held_out in ('validation', 'val') if held_out in splits), None)
    share = name.share('validation', 0.0 if own else VALIDATION_SHARE)
    if 'validation' in name.options or own is None:
      self._split = 'train'
    else:
      self._split = own if split == 'validation' else 'train'
    features = dict(_leaves(self._builder.info.features))
    self._image = _chosen(name, 'image', {path for path, kind in features.items() if kind == 'Image'}, ())
    texts = {path for path, kind in features.items() if kind == 'Text'}
    labels = {path for path, kind in features.items() if kind == 'ClassLabel'}
    self._text = _chosen(name, 'text', texts | labels if 'text' in name.options or not texts else texts, _TEXT_NAMES)
    if self._text is None:
      raise DataError(f'source {name.name!r} has no feature with text or a label: its features are {", ".join(map(".".join, features))}')
    self._labels = self._feature(self._text) if self._text in labels else None
    self._check_files()
    n = splits[self._split].num_examples if share or self._split != 'train' or split == 'train' else 0
    self._records = SplitRecords([n], [self._builder.info.name], split=split, share=share if self._split == 'train' else 0.0)

  def _check_files(self) -> None:
    """Every file of the split is there and holds the examples that the data set's own table lists; their ends are read, no examples."""
    info = self._builder.info.splits[self._split]
    if 'array_record' not in str(getattr(self._builder.info, 'file_format', '')).lower():
      return  # `_data` says so
    from array_record.python import array_record_module

    for path, length in zip(info.filepaths, info.shard_lengths or ()):
      if not os.path.isfile(path):
        raise DataError(f'{path} is missing, which source {self._name.name!r} lists; copy it again, or prepare the data set anew')
      try:
        reader = array_record_module.ArrayRecordReader(str(path), 'readahead_buffer_size:0')
        found = reader.num_records()
      except (RuntimeError, ValueError) as error:
        raise DataError(f'{path} is cut off or damaged: {_one_line(error)}; copy it again, or prepare the data set anew') from error
      if found != length:
        raise DataError(f'{path} is cut off: {found:,} of {length:,} examples; copy it again, or prepare the data set anew')
      reader.close()

  def _feature(self, path: Path) -> Any:
    feature = self._builder.info.features
    for key in path:
      feature = getattr(feature, 'feature', feature)[key]
    return getattr(feature, 'feature', feature)

  @functools.cached_property
  def _data(self) -> Any:
    """The records, pictures still encoded: tensorflow-datasets would give them without the white behind transparency."""
    import tensorflow_datasets as tfds

    decoders = None
    if self._image is not None:
      decoder: Any = tfds.decode.SkipDecoding()
      for key in reversed(self._image):
        decoder = {key: decoder}
      decoders = decoder
    try:
      return self._builder.as_data_source(self._split, decoders=decoders)
    except Exception as error:  # it raises NotImplementedError, ValueError and its own for files in other formats
      raise DataError(f'source {self._name.name!r} cannot be read by index: {_one_line(error)}; {_advice(self._name)}') from error

  def __getstate__(self) -> dict[str, Any]:
    return {key: value for key, value in self.__dict__.items() if key != '_data'}

  def __len__(self) -> int:
    return len(self._records)

  def where(self, index: int) -> str:
    """Data set, split and number of an example."""
    return f'{self._builder.info.full_name}, {self._split}, example {self._records.place(index)[1]}'

  def fingerprint(self) -> str:
    """Of name, version, number of examples in each shard and bytes."""
    info = self._builder.info
    split = info.splits[self._split]
    return repr((info.full_name, self._split, split.shard_lengths, split.num_bytes, self._image, self._text))

  def document(self, index: int, rng: np.random.Generator) -> Document:
    """One example; the form may draw the order and the caption from `rng`."""
    assert self._text is not None
    try:
      example = self._data[self._records.place(index)[1]]
    except (RuntimeError, ValueError) as error:  # of array_record, for a record that is damaged
      raise DataError(f'{self.where(index)} cannot be read: {_one_line(error)}; copy the files again') from error
    try:
      found = _at(example, self._text)
      if self._labels is not None:
        found = [self._labels.int2str(int(label)).replace('_', ' ') for label in np.atleast_1d(found)]
      captions = texts_of([*found] if isinstance(found, (list, tuple, np.ndarray)) else found)
      if self._image is None:
        return Document.plain('\n'.join(captions))
      return self._form.document(captions, load_image(bytes(_at(example, self._image))), rng)
    except DataError as error:
      raise DataError(f'{self.where(index)}: {error}') from error


def _builder(name: SourceName) -> Any:
  import tensorflow_datasets as tfds

  try:
    if os.sep in name.argument or pathlib.Path(name.argument).is_dir():
      return tfds.builder_from_directory(name.argument)
    builder = tfds.builder(name.argument, data_dir=name.options.get('data_dir'), file_format='array_record')
  except Exception as error:  # not found, no such version, no folder: each its own kind
    raise DataError(f'source {name.name!r}: {_one_line(error)}') from error
  if not builder.info.splits:
    raise DataError(f'source {name.name!r} is not prepared under {builder.data_dir}; {_advice(name)}')
  return builder


def _advice(name: SourceName) -> str:
  python = os.path.basename(sys.executable or 'python')
  code = f"import tensorflow_datasets as t; t.builder({name.argument!r}, file_format='array_record').download_and_prepare()"
  return f'prepare it with: {python} -c "{code}"'


def _leaves(features: Any, path: Path = ()) -> Iterator[tuple[Path, str]]:
  """(path, kind) of each feature; a sequence counts as what it is a sequence of."""
  inner = getattr(features, 'feature', None)
  if inner is not None and not hasattr(features, 'items'):
    yield from _leaves(inner, path)
  elif hasattr(features, 'items'):
    for key, feature in features.items():
      yield from _leaves(feature, (*path, key))
  else:
    yield path, type(features).__name__


def _chosen(name: SourceName, option: str, paths: set[Path], preferred: tuple[str, ...]) -> Path | None:
  """The feature that an option names, else the only one, else the first of the preferred names."""
  known = {'.'.join(path): path for path in sorted(paths)}
  if option in name.options:
    asked = name.options[option]
    if asked not in known:
      hint = nearest(asked, known) if known else 'there is none of the kind'
      raise DataError(f'source {name.name!r} has no such feature {option}={asked}; {hint}')
    return known[asked]
  if len(known) <= 1:
    return next(iter(known.values()), None)
  for wanted in preferred:
    for path in known.values():
      if wanted in path:
        return path
  raise DataError(f'source {name.name!r} has several features for {option}; choose one with ?{option}=: {", ".join(known)}')


def _at(example: Any, path: Path) -> Any:
  """The value at a path; of a list of records the list of their values."""
  for number, key in enumerate(path):
    if isinstance(example, Mapping):
      example = example[key]
    else:
      return [_at(one, path[number:]) for one in example]
  return example


def _one_line(error: BaseException) -> str:
  return ' '.join(str(error).split())[:300] or type(error).__name__
