"""Our model folder, read and written tensor by tensor; never more than one group of it (a layer, the embedding, ...) in memory.

What a foreign checkpoint holds beside the model lies in DIR/origin/, so that converting back gives the same files:

    DIR/origin/files/NAME           its small text files, byte by byte
    DIR/origin/extras.safetensors   tensors without a place in our tree, named `FILE/NAME`

Folders of version 1 hold the transformer as one tree, so reading any of it reads all of it once.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from chameleon_jax.config import TransformerConfig
from chameleon_jax.errors import CheckpointError
from chameleon_jax.interop.dtypes import cast, stored_dtype
from chameleon_jax.interop.files.safetensors_file import SafetensorsFile, SafetensorsWriter
from chameleon_jax.interop.lazy import NO_DECODER, LazyModel, Origin, TensorSource, TensorSpec
from chameleon_jax.interop.meta.params import image_output_note, port_output_note
from chameleon_jax.interop.native.checksums import check_files, read_checksums, write_checksums
from chameleon_jax.interop.native.files import (
  IMAGE_TOKENIZER,
  TRANSFORMER,
  VERSION,
  Header,
  load_text_tokenizer,
  read_header,
  save_text_tokenizer,
  write_header,
)
from chameleon_jax.interop.native.folder import ModelParts, check_fit
from chameleon_jax.interop.trees import check_groups, check_n_layers, check_shapes, flat, group_shapes, nested, stored_vqgan_shapes
from chameleon_jax.training.tree_files import describe_tree, load_tree, save_tree

_FILES = pathlib.Path('origin', 'files')
_EXTRAS = pathlib.Path('origin', 'extras.safetensors')
_FORMATS = ('orbax', 'meta', 'huggingface')


# ------------------------------------------------------------------------------------------------ reading


def open_native(folder: pathlib.Path) -> LazyModel:
  """Opens a model folder of either version; only its small files are read.

  Raises:
    CheckpointError: the folder is missing, foreign or damaged, or its parts do not fit each other.
  """
  folder = pathlib.Path(folder).absolute()
  header, checksums = read_header(folder), read_checksums(folder)
  trees = _Trees(folder, checksums)
  values: dict[str, Any] = {'vocabulary': header.vocabulary, 'text_tokenizer': load_text_tokenizer(folder, checksums)}
  if header.transformer is not None:
    values['transformer_config'] = header.transformer
    values['transformer'] = _open_transformer(folder / TRANSFORMER, header.transformer, header.version, trees)
  if header.vqgan is not None:
    path = folder / IMAGE_TOKENIZER
    found = flat(describe_tree(path))
    check_shapes(path, found, stored_vqgan_shapes(header.vqgan, found))
    values['vqgan_config'] = header.vqgan
    values['vqgan'] = TensorSource({name: _spec(leaf) for name, leaf in found.items()}, lambda name: trees.leaf(path, name))
  parts = {name: values.get(name) for name in ('transformer_config', 'vqgan_config', 'vocabulary', 'text_tokenizer')}
  check_fit(ModelParts(**parts), where=str(folder))
  check_files(folder, _EXTRAS.parent.as_posix(), checksums)
  origin = _read_origin(folder, header.origin)
  notes = image_output_note(origin.files) if origin.format == 'meta' else ()
  if header.vqgan is not None and not any(name.startswith('decoder/') for name in values['vqgan'].specs):
    notes = (*notes, NO_DECODER)
    if origin.format == 'huggingface' and header.transformer is not None:
      notes += port_output_note(header.transformer, decoder=False)
  model = LazyModel(path=str(folder), format='orbax', origin=origin, notes=notes, **values)
  model.resources.callback(trees.clear)
  if (folder / _EXTRAS).exists():
    extras = SafetensorsFile(folder / _EXTRAS)
    model.resources.callback(extras.close)
    origin = dataclasses.replace(model.origin, extras=TensorSource(extras.specs, extras.read))
    return dataclasses.replace(model, origin=origin)
  return model


class _Trees:
  """Stored trees, of which the last one read is kept: names come group by group."""

  def __init__(self, folder: pathlib.Path, checksums: Mapping[str, int] | None) -> None:
    self._folder, self._checksums = folder, checksums
    self._path: pathlib.Path | None = None
    self._leaves: dict[str, np.ndarray] = {}

  def leaf(self, path: pathlib.Path, name: str) -> np.ndarray:
    if path != self._path:
      self.clear()  # before the next is read, so that there are never two
      check_files(self._folder, path.relative_to(self._folder).as_posix(), self._checksums)
      self._leaves, self._path = flat(load_tree(path)), path
    if name not in self._leaves:
      raise CheckpointError(f'{path} has changed since it was opened: it lacks {name}; open it again')
    return self._leaves[name]

  def clear(self) -> None:
    self._path, self._leaves = None, {}


def _open_transformer(folder: pathlib.Path, config: TransformerConfig, version: int, trees: _Trees) -> TensorSource:
  found = None if version > 1 else flat(describe_tree(folder))
  check_n_layers(folder, config, found)
  groups = group_shapes(config)
  specs: dict[str, TensorSpec] = {}
  if found is None:
    check_groups(folder, groups)
    for group, shapes in groups.items():
      leaves = flat(describe_tree(folder / group))
      check_shapes(folder / group, leaves, shapes)
      specs |= {name: _spec(leaves[name]) for name in shapes}
    return TensorSource(specs, lambda name: trees.leaf(folder / name.split('/')[0], name))

  if not config.scan_layers:
    check_shapes(folder, found, {name: shape for shapes in groups.values() for name, shape in shapes.items()})
    return TensorSource({name: _spec(found[name]) for shapes in groups.values() for name in shapes}, lambda name: trees.leaf(folder, name))
  stacked: dict[str, tuple[int, ...]] = {}
  places: dict[str, tuple[str, int | None]] = {}  # our name -> (stored name, layer)
  for group, shapes in groups.items():
    for name, shape in shapes.items():
      _, _, rest = name.partition('/')
      layer = int(group.removeprefix('layers_')) if group.startswith('layers_') else None
      places[name] = (name, None) if layer is None else (f'layers/{rest}', layer)
      stacked[places[name][0]] = shape if layer is None else (config.n_layers, *shape)
  check_shapes(folder, found, stacked)

  def read(name: str) -> np.ndarray:
    stored, layer = places[name]
    values = trees.leaf(folder, stored)
    return values if layer is None else values[layer]

  for name, (stored, layer) in places.items():
    whole = _spec(found[stored])
    specs[name] = whole if layer is None else TensorSpec(whole.shape[1:], whole.dtype)
  return TensorSource(specs, read)


def _spec(leaf: Any) -> TensorSpec:
  return TensorSpec(tuple(leaf.shape), np.dtype(leaf.dtype))


def _read_origin(folder: pathlib.Path, stored: dict[str, Any] | None) -> Origin:
  """The origin without its extras."""
  if stored is None:
    return Origin()
  kind, n_shards = stored['format'], stored['n_shards']
  if kind not in _FORMATS or type(n_shards) is not int or n_shards < 1:
    what = f'an origin of format {kind!r} with {n_shards!r} shards'
    raise CheckpointError(f'{folder}: config.json has {what}; was this written by a newer version?')
  files = {}
  if (folder / _FILES).is_dir():
    try:
      files = {path.name: path.read_bytes() for path in sorted((folder / _FILES).iterdir())}
    except OSError as error:
      raise CheckpointError(f'{folder / _FILES} cannot be read: {error.strerror or error}') from error
  return Origin(kind, n_shards, files)


# ------------------------------------------------------------------------------------------------ writing


def write_native(folder: pathlib.Path, model: LazyModel, *, dtype: str | None = None) -> None:
  """Writes a model folder, one group in memory at a time.

  Args:
    folder: exists and is empty.
    model: where the tensors come from.
    dtype: type to store the transformer's floating values in; None keeps the type of every tensor. The image tokenizer always
      keeps its own: rounding it would change the codes of pictures.

  Raises:
    CheckpointError: the model is damaged or incomplete, or writing failed.
  """
  folder = pathlib.Path(folder)
  config = model.transformer_config
  if config is not None and model.transformer is not None:
    groups = group_shapes(config)
    check_shapes(model.path, model.transformer.specs, {name: shape for shapes in groups.values() for name, shape in shapes.items()})
    for group, shapes in groups.items():
      _save(folder / TRANSFORMER / group, model.transformer, list(shapes), dtype)
    config = _stored_config(config, model, dtype)
  if model.vqgan_config is not None and model.vqgan is not None:
    check_shapes(model.path, model.vqgan.specs, stored_vqgan_shapes(model.vqgan_config, model.vqgan.specs))
    _save(folder / IMAGE_TOKENIZER, model.vqgan, list(model.vqgan.specs), None)
  try:
    save_text_tokenizer(folder, model.text_tokenizer)
    origin = _write_origin(folder, model.origin)
    write_header(folder, Header(VERSION, config, model.vqgan_config, model.vocabulary, origin))
    write_checksums(folder)
  except OSError as error:
    raise CheckpointError(f'{folder} could not be written: {error.strerror or error}') from error


def _save(path: pathlib.Path, source: TensorSource, names: list[str], dtype: str | None) -> None:
  """A function of its own, so that the group is gone before the next is read."""
  save_tree(path, nested({name: np.asarray(cast(source.read(name), dtype, name), order='C') for name in names}), compress=False)


def _stored_config(config: TransformerConfig, model: LazyModel, dtype: str | None) -> TransformerConfig:
  """The config with the type the parameters are now stored in; weights from elsewhere also compute in it."""
  if model.transformer is None:
    return config
  stored = {name: TensorSpec(spec.shape, cast(np.empty(0, spec.dtype), dtype).dtype) for name, spec in model.transformer.specs.items()}
  kept = stored_dtype(stored)
  return dataclasses.replace(config, param_dtype=kept, dtype=config.dtype if model.format == 'orbax' else kept)


def _write_origin(folder: pathlib.Path, origin: Origin) -> dict[str, Any] | None:
  if origin.format == 'orbax':
    return None
  (folder / _FILES).mkdir(parents=True)
  for name, data in origin.files.items():
    if name != pathlib.PurePath(name).name:
      raise CheckpointError(f'a file of the source is named {name!r}, which is no plain file name')
    (folder / _FILES / name).write_bytes(data)
  if origin.extras.specs:
    beside = folder / _EXTRAS.parent
    with SafetensorsWriter(beside, origin.extras.specs, max_shard_bytes=2**62) as writer:
      for name in origin.extras.specs:
        writer.write(name, origin.extras.read(name))
    (beside / 'model.safetensors').rename(folder / _EXTRAS)
  return {'format': origin.format, 'n_shards': origin.n_shards}
