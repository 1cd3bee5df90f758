"""Sources -> batches on the devices: mixture, shuffling, rendering, packing, batching, prefetch.

    source 'pairs'  range -> shuffle -> repeat -> document(index, rng) -> render -> fit -> every S-th --+
    source 'text'   range -> shuffle -> repeat -> ...                                                 --+-> mix by weight
       -> packed rows -> batches of one stage --+
                              the next stage  --+-> by step -> this host's rows of all S shards -> prefetch thread
       -> [numpy batch] -> to_devices

Everything is a function of (config, step): the same seed gives the same batches on every run and any number of hosts, and the
iterator's state, a small JSON-able dict, resumes them exactly. Shard s of the S = `data.shards` sees documents s, s + S, ... of
every source and makes batch_size / S rows of each batch; `shards.py` has which host runs which.

The weights of a stage count documents, not tokens. Shuffles differ between stages, so a source that stays in
the mixture is drawn in a new order. Does not know models; pictures arrive as codes, or become codes through the
function it is given.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grain
import jax
import numpy as np
from jax.sharding import Mesh

from chameleon_jax.array_types import Array
from chameleon_jax.config import DataConfig, StageConfig
from chameleon_jax.data.packing import Limits, PackedRows, Row, Traced, fit
from chameleon_jax.data.shards import ShardedBatches, held_pieces, rows_by_shard
from chameleon_jax.data.sources.fingerprint import fingerprint
from chameleon_jax.data.sources.source import DocumentSource, make_source
from chameleon_jax.errors import ConfigError, DataError
from chameleon_jax.partitioning import batch_sharding
from chameleon_jax.tokens.render import EncodeImages, Rendered, render
from chameleon_jax.tokens.text import TextTokenizer
from chameleon_jax.tokens.vocabulary import Vocabulary

_CACHED_TEXTS = 100_000  # rendered strings kept; names and phrases of instructions recur


class CachedText:
  """A text tokenizer that remembers short strings it has encoded."""

  def __init__(self, tokenizer: TextTokenizer, *, max_length: int = 200):
    self._tokenizer, self._max_length = tokenizer, max_length
    self._encode = functools.lru_cache(maxsize=_CACHED_TEXTS)(lambda text: tuple(tokenizer.encode(text)))

  @property
  def n_pieces(self) -> int:
    return self._tokenizer.n_pieces

  def encode(self, text: str) -> list[int]:
    """Piece ids of the text."""
    return list(self._encode(text)) if len(text) <= self._max_length else self._tokenizer.encode(text)

  def decode(self, pieces: Sequence[int]) -> str:
    """Text of the pieces."""
    return self._tokenizer.decode(list(pieces))

  def save(self, path: Any) -> None:
    """Saves the tokenizer itself."""
    self._tokenizer.save(path)


def with_noise(rendered: Rendered, vocabulary: Vocabulary, rng: np.random.Generator, *, answers: float, prompts: float) -> Rendered:
  """The document with some of its image tokens replaced by random image tokens in the input.

  The share is drawn from [0, `answers`] for image tokens that carry loss, from [0, `prompts`] for those that are only
  read. Targets and loss weights stay:
    tokens   begin 17 902 33 end        begin 17 411 33 end
    targets  17 902 33 end ..      ->   17 902 33 end ..
  """
  learned = np.concatenate([[False], rendered.loss_weights[:-1] > 0])  # a token's own weight stands where it is the target
  share = np.where(learned, answers * rng.random(), prompts * rng.random())
  replaced = vocabulary.is_image[rendered.tokens] & (rng.random(len(rendered)) < share)
  random_tokens = vocabulary.token_of_code[rng.integers(vocabulary.n_codes, size=len(rendered))]
  return Rendered(np.where(replaced, random_tokens, rendered.tokens), rendered.targets, rendered.loss_weights)


class RenderDocument:
  """(index, rng) -> the rendered document that fits into a row, or None. Picklable, for worker processes."""

  def __init__(
      self,
      source: DocumentSource,
      vocabulary: Vocabulary,
      text_tokenizer: TextTokenizer,
      *,
      limits: Limits,
      encode_images: EncodeImages | None = None,
      image_noise: float = 0.0,
      prompt_image_noise: float = 0.0,
      trace_as: int | None = None,
  ):
    self._trace_as = trace_as  # place of the source among the names of the run, to be remembered with each document
    self._source, self._vocabulary, self._text_tokenizer = source, vocabulary, text_tokenizer
    self._limits, self._encode_images = limits, encode_images
    self._image_noise, self._prompt_image_noise = image_noise, prompt_image_noise

  def __call__(self, index: int, rng: np.random.Generator) -> Rendered | None:
    if getattr(self._source, 'has_pieces', False):  # tokenized before, by the tokenizers of this run
      rendered = fit(self._source.rendered(int(index)), self._limits)  # type: ignore[attr-defined]
    else:
      document = self._source.document(int(index), rng)
      rendered = fit(render(document, self._vocabulary, self._text_tokenizer, encode_images=self._encode_images), self._limits)
    if rendered is None:
      return None
    seen = rendered
    if self._image_noise or self._prompt_image_noise:
      seen = with_noise(rendered, self._vocabulary, rng, answers=self._image_noise, prompts=self._prompt_image_noise)
    if self._trace_as is None:
      return seen
    return Traced(
        seen.tokens, seen.targets, seen.loss_weights, source=self._trace_as, document=int(index), clean_tokens=rendered.tokens
    )


def stage_ends(stages: Sequence[StageConfig], n_steps: int) -> list[int]:
  """The step at which each stage ends; the last is `n_steps`.

  Example:
    fractions 0.8, 0.2 of 1,000 steps -> [800, 1000]
  """
  total, ends = 0.0, []
  for stage in stages:
    total += stage.fraction
    ends.append(round(total * n_steps))
  ends[-1] = n_steps
  return ends


class StagedBatches(grain.IterDataset):
  """Batches of stage 0 up to its last step, then those of stage 1, and so on; ends after the last stage, or never if `endless`."""

  def __init__(self, stages: Sequence[grain.IterDataset], ends: Sequence[int], *, endless: bool = False):
    super().__init__(tuple(stages))
    self._ends, self._endless = tuple(ends), endless

  def __iter__(self) -> 'StagedBatchesIterator':
    return StagedBatchesIterator([stage.__iter__() for stage in self._parents], self._ends, endless=self._endless)


class StagedBatchesIterator(grain.DatasetIterator):
  """Iterator of `StagedBatches`."""

  def __init__(self, stages: Sequence[grain.DatasetIterator], ends: Sequence[int], *, endless: bool = False):
    super().__init__(tuple(stages))
    self._stages, self._ends, self._endless, self._step = tuple(stages), tuple(ends), endless, 0

  def _stage(self) -> int:
    return next((stage for stage, end in enumerate(self._ends) if self._step < end), len(self._ends) - 1)

  def __next__(self) -> Row:
    if self._step >= self._ends[-1] and not self._endless:
      raise StopIteration
    batch = next(self._stages[self._stage()])
    self._step += 1
    return batch

  def get_state(self) -> dict[str, Any]:
    return {'step': self._step, 'stage': self._stages[self._stage()].get_state()}

  def set_state(self, state: Mapping[str, Any]) -> None:
    self._step = state['step']
    self._stages[self._stage()].set_state(state['stage'])


def _seed(*parts: int) -> int:
  return int(np.random.SeedSequence(parts).generate_state(1)[0])


def source_names(config: DataConfig) -> tuple[str, ...]:
  """Every source of the run once, in the order of the stages; `sources` of a traced batch are places in it."""
  return tuple(dict.fromkeys(name for stage in config.stages for name, _ in stage.weights))


def make_batches(
    config: DataConfig,
    vocabulary: Vocabulary,
    text_tokenizer: TextTokenizer,
    *,
    n_steps: int,
    split: str = 'train',
    codes: np.ndarray | None = None,
    encode_images: EncodeImages | None = None,
    rows: np.ndarray | None = None,
    traced: bool = False,
    endless: bool = False,
) -> grain.DatasetIterator:
  """Returns an iterator of `n_steps` numpy batches with `get_state` and `set_state`.

  Args:
    config: stages, sizes and seed.
    vocabulary: the token table.
    text_tokenizer: fits into the vocabulary.
    n_steps: steps of the whole run, which the fractions of the stages divide.
    split: 'train' or 'validation'.
    codes: int32 [pictures, n_image_tokens], one row per picture of an in-memory world, see `make_source`.
    encode_images: for sources whose documents hold pixels.
    rows: int [n] in rising order, which rows of each batch to make, see `shards.host_rows`; all by default.
    traced: the same batches and positions, with the three arrays of `packing.Traced` beside the others.
    endless: go on with the last stage after `n_steps` batches, for a run that throws some away (`training/spikes.py`).

  Returns:
    Batches {tokens, targets, loss_weights, segment_ids, positions}, each [n, seq_len].

  Raises:
    ConfigError: no stages.
    DataError: a source is unknown, empty, damaged, or was tokenized for other tokenizers. `set_state` raises it for data that changed.
  """
  if not config.stages:
    raise ConfigError('data.stages is empty: name at least one stage with its sources')
  rows = np.arange(config.batch_size) if rows is None else rows
  wanted = rows_by_shard(rows, n_rows=config.batch_size, n_shards=config.shards)
  limits = Limits(config.seq_len, vocabulary.begin_image, vocabulary.end_image, vocabulary.pad)
  cached = CachedText(text_tokenizer)
  names = source_names(config)
  sources = {name: _fitted(make_source(name, split, codes=codes), vocabulary, text_tokenizer, encode_images) for name in names}
  read_options = grain.ReadOptions(num_threads=config.read_threads, prefetch_buffer_size=8 * config.read_threads)

  def documents(name: str, number: int, shard: int) -> grain.MapDataset:
    source = sources[name]
    if len(source) == 0:
      raise DataError(f'source {name!r} has no documents in split {split!r}; take it out of data.stages')
    noise = {'image_noise': config.image_noise, 'prompt_image_noise': config.prompt_image_noise} if split == 'train' else {}
    trace_as = names.index(name) if traced else None
    to_rendered = RenderDocument(source, vocabulary, cached, limits=limits, encode_images=encode_images, trace_as=trace_as, **noise)
    seed = _seed(config.shuffle_seed, number, *name.encode())
    every = grain.MapDataset.range(len(source)).shuffle(seed=seed).repeat().random_map(to_rendered, seed=seed)
    return every[shard :: config.shards] if config.shards > 1 else every

  def batches(stage: StageConfig, number: int, shard: int) -> grain.IterDataset:
    parts, weights = [documents(name, number, shard) for name, _ in stage.weights], [weight for _, weight in stage.weights]
    mixed = grain.MapDataset.mix(parts, weights=weights)
    packed = PackedRows(mixed.to_iter_dataset(read_options, allow_nones=True), n_rows=config.packing_bins, limits=limits)
    return packed.batch(config.batch_size // config.shards, drop_remainder=True)

  def staged(shard: int) -> grain.IterDataset:
    stages = [batches(stage, number, shard) for number, stage in enumerate(config.stages)]
    return StagedBatches(stages, stage_ends(config.stages, n_steps), endless=endless)

  sharded = ShardedBatches(
      {shard: staged(shard) for shard in wanted},
      wanted,
      n_shards=config.shards,
      fingerprints={name: fingerprint(source) for name, source in sources.items()} if split == 'train' else {},  # others save no position
      accept_changed=config.changed == 'accept',
  )
  if config.prefetch:
    return iter(grain.experimental.ThreadPrefetchIterDataset(sharded, prefetch_buffer_size=config.prefetch))
  return iter(sharded)


def _fitted(source: DocumentSource, vocabulary: Vocabulary, text_tokenizer: TextTokenizer, encode_images: EncodeImages | None) -> Any:
  """The source, checked against the run where it was made with tokenizers of its own (`TokenizedDocuments.fitted`)."""
  fitted = getattr(source, 'fitted', None)
  return source if fitted is None else fitted(vocabulary, text_tokenizer, getattr(encode_images, 'fingerprint', None))


def dropped_documents(iterator: grain.DatasetIterator) -> int:
  """Documents of the current stage that the shards of this host had to drop so far (see `packing.fit`)."""

  def count(state: Any) -> int:
    return sum(int(value) if name == 'dropped' else count(value) for name, value in state.items()) if isinstance(state, Mapping) else 0

  return count(iterator.get_state())


def to_devices(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, Array]:
  """Joins the rows of all hosts into global arrays, rows split over the mesh axes `data` and `fsdp`.

  Args:
    batch: of this host the rows `shards.host_rows`, each array [rows, ...].
    mesh: the devices of all hosts. Row r of the global array is row r of the batch, wherever its device is.
  """
  sharding, pieces = batch_sharding(mesh), held_pieces(mesh)
  n_pieces = mesh.shape['data'] * mesh.shape['fsdp']

  def join(value: np.ndarray) -> Array:
    size = len(value) // len(pieces)

    def piece(index: Any) -> np.ndarray:  # a tuple of slices
      place = pieces.index((index[0].start or 0) // size)
      return value[place * size : (place + 1) * size]

    return jax.make_array_from_callback((size * n_pieces, *value.shape[1:]), sharding, piece)

  return {name: join(value) for name, value in batch.items()}


def validation_batches(
    config: DataConfig, vocabulary: Vocabulary, text_tokenizer: TextTokenizer, **options: Any
) -> dict[str, Iterator[Row]]:
  """Batches of each source of the last stage by itself, from its validation split; sources without one are left out.

  Args:
    config: as for training; stages and prefetch are replaced.
    vocabulary: the token table.
    text_tokenizer: fits into the vocabulary.
    **options: `n_steps` (batches of each source), `codes`, `encode_images`, `rows` as for `make_batches`.
  """
  found: dict[str, Iterator[Row]] = {}
  for name, _ in config.stages[-1].weights:
    alone = dataclasses.replace(config, stages=(StageConfig(1.0, ((name, 1.0),)),), prefetch=0)
    if len(make_source(name, 'validation', codes=options.get('codes'))) > 0:
      found[name] = make_batches(alone, vocabulary, text_tokenizer, split='validation', **options)
  return found
