"""Opens a checkpoint of any format, told apart by its files, and puts its weights on the devices.

    orbax         config.json with "format": "chameleon_jax"                    `native.lazy`
    meta          params.json beside consolidated*.pth, or vqgan.ckpt            `meta`
    huggingface   config.json of a Chameleon network beside its weights          `huggingface`
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from chameleon_jax.array_types import Array, Params, PyTree
from chameleon_jax.config import Dtype, Quantization, TransformerConfig
from chameleon_jax.errors import CheckpointError, ConfigError
from chameleon_jax.interop.dtypes import stored_dtype
from chameleon_jax.interop.lazy import NO_DECODER, NO_IMAGE_TOKENIZER, NO_TEXT, Format, LazyModel, TensorSource
from chameleon_jax.interop.native.checksums import FILE as CHECKSUMS
from chameleon_jax.interop.native.files import CONFIG_FILE, FORMAT
from chameleon_jax.interop.native.folder import ModelParts, abstract_transformer, abstract_vqgan, check_fit
from chameleon_jax.interop.native.lazy import open_native
from chameleon_jax.interop.staging import file_errors
from chameleon_jax.interop.trees import TreeFiller, flat, nested
from chameleon_jax.models.transformer.quantization import QuantizedKernel, contracted_axes, quantize, quantized_shardings
from chameleon_jax.partitioning import shardings_of

_MOST_LISTED = 8  # entries of a folder named in a message
_SEARCH_DEPTH = 2  # folders below the given one in which a checkpoint is looked for, to name it in a message
_SEARCH_WIDTH = 64


def detect_format(folder: pathlib.Path) -> Format | None:
  """What kind of checkpoint a folder is, by its files; None where it is none. Never raises."""
  try:
    checked = (folder / CHECKSUMS).is_file()  # there even where a damaged config.json is not readable
  except OSError:
    checked = False
  if checked or _is_native(folder):
    return 'orbax'
  from chameleon_jax.interop.huggingface.reader import is_huggingface  # these load libraries that our own folders do not need
  from chameleon_jax.interop.meta.reader import is_meta

  if is_huggingface(folder):
    return 'huggingface'
  return 'meta' if is_meta(folder) else None


def open_checkpoint(
    path: str | os.PathLike[str], *, tokenizer: str | os.PathLike[str] | None = None, verify_checklist: bool = False
) -> LazyModel:
  """Opens a checkpoint of any format; no tensor is read. Close it, or use it in a `with`.

  Args:
    path: the folder with the weights.
    tokenizer: folder with text_tokenizer.json and vqgan.ckpt, where Meta's weights have them neither beside them nor in
      the layout of the release (`models/7b` beside `tokenizer`). Of other formats it gives the parts that they lack.
    verify_checklist: compare all files of a Meta checkpoint with checklist.chk, which reads them whole; without it the small
      ones are, where there is a checklist.

  Raises:
    CheckpointError: there is no checkpoint, or it is damaged or cannot be read; where one is found further down, the line names it.
  """
  with file_errors(f'checkpoint folder {os.fspath(path)} cannot be read'):
    return _opened(path, tokenizer, verify_checklist)


def _opened(path: str | os.PathLike[str], tokenizer: str | os.PathLike[str] | None, verify_checklist: bool) -> LazyModel:
  folder = pathlib.Path(path).absolute()
  beside = None if tokenizer is None else pathlib.Path(tokenizer).absolute()
  if not folder.exists():
    raise CheckpointError(f'checkpoint folder {folder} does not exist')
  if not folder.is_dir():
    raise CheckpointError(f'{folder} is a file; give the folder that holds it')
  if beside is not None and not beside.is_dir():
    raise CheckpointError(f'tokenizer folder {beside} does not exist')
  kind = detect_format(folder)
  if kind is None:
    raise _unknown(folder)
  if verify_checklist and kind != 'meta':
    raise CheckpointError(f"{folder} is not in Meta's form, which alone comes with a checklist.chk; leave the check out")
  if kind == 'orbax' and beside is None:
    return open_native(folder)
  from chameleon_jax.interop.huggingface.reader import open_huggingface
  from chameleon_jax.interop.meta.reader import open_meta

  if kind == 'meta':
    return open_meta(folder, tokenizer=beside, verify_checklist=verify_checklist)
  model = open_native(folder) if kind == 'orbax' else open_huggingface(folder)
  if beside is None:
    return model
  try:
    return _completed(model, open_meta(beside))
  except BaseException:
    model.close()
    raise


def _is_native(folder: pathlib.Path) -> bool:
  try:
    values = json.loads((folder / CONFIG_FILE).read_text(encoding='utf-8'))
  except (OSError, ValueError, RecursionError):
    return False
  return isinstance(values, dict) and values.get('format') == FORMAT


def _completed(model: LazyModel, tokenizers: LazyModel) -> LazyModel:
  """The model with those parts of the tokenizers it has not got itself, its missing picture decoder included.

  Raises:
    CheckpointError: they do not fit the model, or the decoder is of an image tokenizer with another codebook.
  """
  model.resources.callback(tokenizers.close)
  added: dict[str, Any] = {}
  if tokenizers.vqgan is not None and (model.vqgan is None or not _has_decoder(model.vqgan)):
    added |= {'vqgan_config': tokenizers.vqgan_config, 'vqgan': _with_decoder(model, tokenizers)}
  if model.text_tokenizer is None and tokenizers.text_tokenizer is not None:
    added['text_tokenizer'] = tokenizers.text_tokenizer
    if model.vocabulary is None:
      added['vocabulary'] = tokenizers.vocabulary
  filled = {note for note, now in ((NO_IMAGE_TOKENIZER, 'vqgan'), (NO_TEXT, 'text_tokenizer')) if now in added}
  if 'vqgan' in added and _has_decoder(added['vqgan']):
    filled.add(NO_DECODER)
  notes = [note for note in model.notes if note not in filled]
  if NO_IMAGE_TOKENIZER in filled and not _has_decoder(added['vqgan']):
    notes.append(NO_DECODER)
  model = dataclasses.replace(model, notes=tuple(notes), **added)
  names = ('transformer_config', 'vqgan_config', 'vocabulary', 'text_tokenizer')
  check_fit(ModelParts(**{name: getattr(model, name) for name in names}), where=f'{model.path} and {tokenizers.path}')
  return model


def _has_decoder(source: TensorSource) -> bool:
  return any(name.startswith('decoder/') for name in source.specs)


def _with_decoder(model: LazyModel, tokenizers: LazyModel) -> TensorSource:
  """The model's own image tokenizer, if it has one, with the decoder of the other."""
  own, other = model.vqgan, tokenizers.vqgan
  assert other is not None  # the caller looked
  if own is None or not _has_decoder(other):
    return other if own is None else own
  codebook = 'quantize/embedding'
  if own.specs.keys() - other.specs.keys() or any(own.specs[name].shape != other.specs[name].shape for name in own.specs):
    raise CheckpointError(f'the image tokenizers of {model.path} and {tokenizers.path} are of different sizes; leave out the second')
  if not np.array_equal(own.read(codebook).astype(np.float32), other.read(codebook).astype(np.float32)):
    raise CheckpointError(f'the image tokenizers of {model.path} and {tokenizers.path} have different codebooks; leave out the second')
  return TensorSource({**other.specs, **own.specs}, lambda name: (own if name in own.specs else other).read(name))


def _unknown(folder: pathlib.Path) -> CheckpointError:
  inside = list(_checkpoints_below(folder, _SEARCH_DEPTH))
  if len(inside) == 1:
    return CheckpointError(f'{folder} is no checkpoint, but it holds one: give {inside[0]}')
  if inside:
    listed = ', '.join(str(path) for path in inside[:_MOST_LISTED])
    return CheckpointError(f'{folder} is no checkpoint, but it holds {len(inside)}: give one of {listed}')
  names = sorted(path.name for path in folder.iterdir())
  there = ', '.join(names[:_MOST_LISTED]) + (f' and {len(names) - _MOST_LISTED} more' if len(names) > _MOST_LISTED else '')
  return CheckpointError(
      f'{folder} is no checkpoint: looked for config.json with "format": "{FORMAT}" (ours), params.json with consolidated*.pth (Meta), '
      f'config.json of a Chameleon network with *.safetensors or pytorch_model*.bin (Hugging Face); found {there or "nothing"}'
  )


def _checkpoints_below(folder: pathlib.Path, depth: int) -> Iterator[pathlib.Path]:
  try:
    below = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith('.'))[:_SEARCH_WIDTH]
  except OSError:
    return
  for path in below:
    if detect_format(path) is not None:
      yield path
    elif depth > 1:
      yield from _checkpoints_below(path, depth - 1)


# ------------------------------------------------------------------------------------------- to the devices


def check_quantization(name: str | None) -> None:
  """Raises ConfigError for a quantization that there is not."""
  if name not in (None, *get_args(Quantization)):
    raise ConfigError(f"quantization {name!r} is not known; 'int8' stores weights in int8, None leaves them as they are")


def load_parts(
    model: LazyModel, *, dtype: Dtype | None = None, mesh: Mesh | None = None, quantization: Quantization | None = None
) -> ModelParts:
  """Reads a checkpoint onto the devices, one array per layer (`scan_layers=False`), one tensor in host memory at a time.

  Args:
    model: the checkpoint.
    dtype: of the transformer's parameters and of its computation; by default those of a model folder's config, else the
      type the weights are stored in. The image tokenizer is kept in float32: rounding would change its codes.
    mesh: devices to lie on, each parameter split as `partitioning.RULES` says; None means the default device.
    quantization: 'int8' rounds the transformer's matrices and its embedding table (`models.transformer.quantization`), for sampling
      and scoring only.

  Raises:
    CheckpointError: a tensor is damaged, or holds a value that is not finite and is to be quantized.
    ConfigError: there is no such quantization.
  """
  check_quantization(quantization)
  values: dict[str, Any] = {'vocabulary': model.vocabulary, 'text_tokenizer': model.text_tokenizer}
  if model.transformer_config is not None and model.transformer is not None:
    config = _loaded_config(model.transformer_config, model, dtype)
    shardings = None if mesh is None else _transformer_shardings(config, mesh)
    values['transformer_config'] = config
    values['transformer_params'] = _place(model.transformer, config.param_dtype, shardings, quantization)
  if model.vqgan_config is not None and model.vqgan is not None:
    shardings = None if mesh is None else flat(shardings_of(abstract_vqgan(model.vqgan_config), mesh))
    values['vqgan_config'] = model.vqgan_config
    values['vqgan_params'] = _place(model.vqgan, 'float32', shardings)
  return ModelParts(**values)


def load_for_training(
    path: str | os.PathLike[str], *, scan_layers: bool, on_tensor: Callable[[str, np.ndarray], None] | None = None
) -> ModelParts:
  """The transformer and the vocabulary of a checkpoint of any format, in host memory, its layers stacked or not as asked for.

  `on_tensor` is called with the unrolled name and the stored values of each tensor.

  Raises:
    CheckpointError: there is no checkpoint, or it is damaged.
  """
  with open_checkpoint(path) as model:
    if model.transformer_config is None or model.transformer is None:
      return ModelParts(vocabulary=model.vocabulary)
    config = dataclasses.replace(_loaded_config(model.transformer_config, model, None), scan_layers=scan_layers)
    fill = TreeFiller(config)
    for name in model.transformer.specs:
      values = model.transformer.read(name)
      if on_tensor is not None:
        on_tensor(name, values)
      fill.put(name, values)
    return ModelParts(transformer_config=config, transformer_params=fill.tree(), vocabulary=model.vocabulary)


def load_tokenizers(path: str | os.PathLike[str]) -> ModelParts:
  """Vocabulary and tokenizers of a checkpoint of any format, without its transformer.

  Raises:
    CheckpointError: there is no checkpoint, or it is damaged.
  """
  with open_checkpoint(path) as model:
    return load_parts(dataclasses.replace(model, transformer_config=None, transformer=None))


def _loaded_config(config: TransformerConfig, model: LazyModel, dtype: Dtype | None) -> TransformerConfig:
  config = dataclasses.replace(config, scan_layers=False, remat='none', sequence_parallel=False, attention_implementation='auto')
  if dtype is None:
    if model.format == 'orbax' or model.transformer is None:
      return config
    dtype = stored_dtype(model.transformer.specs)
  return dataclasses.replace(config, dtype=dtype, param_dtype=dtype)


def _transformer_shardings(config: TransformerConfig, mesh: Mesh) -> dict[str, NamedSharding]:
  """Name -> sharding. All layers are alike, so one of them is traced, not dozens."""
  one: PyTree = abstract_transformer(dataclasses.replace(config, n_layers=1))
  found = flat(shardings_of(one, mesh))
  layer = {name.removeprefix('layers_0/'): sharding for name, sharding in found.items() if name.startswith('layers_0/')}
  layers = {f'layers_{index}/{name}': sharding for index in range(config.n_layers) for name, sharding in layer.items()}
  return layers | {name: sharding for name, sharding in found.items() if not name.startswith('layers_0/')}


def _place(
    source: TensorSource, dtype: str, shardings: dict[str, NamedSharding] | None, quantization: Quantization | None = None
) -> Params:
  placed: dict[str, Any] = {}
  for name in source.specs:
    sharding = None if shardings is None else shardings[name]
    axes = None if quantization is None else contracted_axes(name.split('/')[-1])
    placed[name] = _placed(source.read(name), dtype, sharding) if axes is None else _quantized(name, source.read(name), axes, sharding)
  return nested(placed)


def _quantized(name: str, values: np.ndarray, axes: tuple[int, ...], sharding: NamedSharding | None) -> QuantizedKernel:
  kernel = quantize(values, axes)
  if not np.isfinite(kernel.scale).all():
    raise CheckpointError(f'{name} holds a value that is not finite and cannot be quantized; load the weights without quantization')
  if sharding is None:
    return jax.block_until_ready(jax.tree.map(jnp.asarray, kernel))
  return jax.block_until_ready(jax.device_put(kernel, quantized_shardings(_fitting(sharding, kernel.shape), axes)))


def _placed(values: np.ndarray, dtype: str, sharding: NamedSharding | None) -> Array:
  """On the devices, and gone from the host; never a view of the file, which may be changed or closed later."""
  values = np.array(values, jnp.dtype(dtype), order='C')
  placed = jnp.asarray(values) if sharding is None else jax.device_put(values, _fitting(sharding, values.shape))
  return jax.block_until_ready(placed)


def _fitting(sharding: NamedSharding, shape: tuple[int, ...]) -> NamedSharding:
  """The sharding without the axes that do not divide the shape: such a dimension lies whole on every device."""
  sizes = dict(sharding.mesh.shape)

  def fits(n: int, axes: Any) -> bool:
    names = axes if isinstance(axes, tuple) else (axes,)
    return n % int(np.prod([sizes[name] for name in names])) == 0

  spec = [axes if axes is None or fits(n, axes) else None for n, axes in zip(shape, sharding.spec)]
  return NamedSharding(sharding.mesh, PartitionSpec(*spec))
