"""One packed row as an HTML page: what the network read, what it had to say, and what that counted.

    segment 2   emoji_pairs, document 1234    tokens 17 to 92, 71 learned
      [picture as read] [picture as learned]  a cat face <end>

A token is shaded by the weight of the loss at its place, where it predicts its target; hovering over it tells id, target, weight,
position and segment. Each is also an attribute (data-id, data-target, ...), so that a program can read the page.

Does not know how the row came about; knows its arrays, the vocabulary and the tokenizers.
"""

import html
from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import UInt8

from chameleon_jax.models.vqgan.model import decode_pixels
from chameleon_jax.sampling import page
from chameleon_jax.tokens import images
from chameleon_jax.training.losses import effective_weights
from chameleon_jax.training.replay import SeenBatch
from chameleon_jax.training.step import modalities_of

_STYLE = """
.segment { margin: 1.25rem 0; padding: .9rem 1rem; background: var(--panel); border: 1px solid var(--line); border-radius: .6rem; }
.segment h3 { font-size: 1rem; margin: 0 0 .35rem; }
.tokens { line-height: 1.9; overflow-wrap: anywhere; }
.t { border-radius: .2rem; padding: .1rem .05rem; white-space: pre-wrap; background: rgb(46 160 110 / calc(var(--w, 0) * 45%)); }
.t.special { font-size: .75rem; color: var(--soft); border: 1px solid var(--line); padding: 0 .25rem; }
.t.code { display: inline-block; min-width: 2.6rem; text-align: right; font: .65rem ui-monospace, monospace; margin: 1px; }
.t.noise { outline: 1px solid #d0503c; }
.legend .t { padding: .1rem .5rem; }
"""


def row_html(seen: SeenBatch, row: int, *, workdir: str = '') -> str:
  """The page of one row of a batch, as a string."""
  arrays = {name: value[row] for name, value in seen.arrays.items()}
  weights = _weights(seen, arrays)
  start = 'the start of the run' if seen.read_from is None else f'the checkpoint of step {seen.read_from:,}'
  thrown = f', batch {seen.number:,} of the data' if seen.number != seen.step else ''
  n_documents, used = int(arrays['segment_ids'].max()), int(np.count_nonzero(arrays['segment_ids']))
  note = (
    f'{workdir}\nRow {row} of {len(seen.arrays["tokens"])}{thrown}; the data was read from {start}.\n'
    f'{n_documents} documents, {used:,} of {len(weights):,} places used, {int(np.count_nonzero(weights)):,} tokens learned.'
  )
  body = [_legend(weights), *_segments(seen, arrays, weights)]
  return page.shell(body, title=f'Step {seen.step:,}, row {row}', note=note.strip(), style=_STYLE)


def _weights(seen: SeenBatch, arrays: dict[str, np.ndarray]) -> np.ndarray:
  """Weight of every place in the loss: that of its document times that of its kind of target (`training/losses.py`)."""
  return np.asarray(effective_weights(arrays['targets'][None], arrays['loss_weights'][None], modalities_of(seen.config)))[0]


def _legend(weights: np.ndarray) -> str:
  most = float(weights.max(initial=0))
  return (
    f'<p class="note legend">Loss weight at a token, where the next one is predicted: <span class="t" style="--w:0">0</span> '
    f'<span class="t" style="--w:1">{most:g}</span>; <span class="t noise">replaced by noise in what was read</span></p>'
  )


def _segments(seen: SeenBatch, arrays: dict[str, np.ndarray], weights: np.ndarray) -> Iterator[str]:
  token = _token_writer(seen, arrays, weights)
  segments = arrays['segment_ids']
  edges = [0, *(np.flatnonzero(np.diff(segments)) + 1).tolist(), len(segments)]
  for start, end in zip(edges, edges[1:]):
    segment = int(segments[start])
    if segment == 0:
      yield f'<section class="segment padding" data-segment="0" data-start="{start}" data-end="{end}"><h3>padding</h3>'
      yield f'<div class="caption">{end - start:,} places, {start:,} to {end - 1:,}</div></section>'
      continue
    source, document = seen.sources[int(arrays['sources'][start])], int(arrays['documents'][start])
    learned = int(np.count_nonzero(weights[start:end]))
    yield (
      f'<section class="segment" data-segment="{segment}" data-source="{html.escape(source)}" data-document="{document}" '
      f'data-start="{start}" data-end="{end}">'
    )
    yield f'<h3>{segment}. {html.escape(source)}, document {document:,}</h3>'
    yield f'<div class="caption">places {start:,} to {end - 1:,}, {learned:,} of {end - start:,} learned</div><div class="tokens">'
    place = start
    while place < end:
      stop = place
      while stop < end and seen.vocabulary.is_image[arrays['tokens'][stop]]:
        stop += 1
      if stop == place:
        yield token(place)
        place += 1
      else:
        yield _picture(seen, arrays, place, stop)
        yield '<details><summary>codes</summary>' + ''.join(map(token, range(place, stop))) + '</details>'
        place = stop
    yield '</div></section>'


def _token_writer(seen: SeenBatch, arrays: dict[str, np.ndarray], weights: np.ndarray) -> Callable[[int], str]:
  vocabulary, text = seen.vocabulary, seen.parts.text_tokenizer
  most = max(float(weights.max(initial=0)), 1e-9)
  tokens, targets, clean = arrays['tokens'], arrays['targets'], arrays['clean_tokens']

  def spelt(token: int) -> str:
    if vocabulary.is_image[token]:
      return str(vocabulary.code_of_token[token])
    if not vocabulary.is_text[token]:
      return vocabulary.names[token]
    piece = token - vocabulary.text_start
    return '\ufffd' if text is None or piece >= text.n_pieces else text.decode([piece])

  def write(place: int) -> str:
    token, target, weight = int(tokens[place]), int(targets[place]), float(weights[place])
    kinds = ['t']
    kinds += ['code'] if vocabulary.is_image[token] else ['special'] if vocabulary.is_special[token] else []
    replaced = token != clean[place]
    kinds += ['noise'] if replaced else []
    position, segment = int(arrays['positions'][place]), int(arrays['segment_ids'][place])
    noise = f', noise for {clean[place]}' if replaced else ''
    told = f'id {token}{noise}; target {target} {spelt(target)!r}; weight {weight:g}; position {position}; segment {segment}'
    shown = spelt(token) or '\u2205'
    return (
      f'<span class="{" ".join(kinds)}" style="--w:{weight / most:.3g}" title="{html.escape(told)}" data-id="{token}" '
      f'data-target="{target}" data-weight="{weight:g}" data-position="{position}" data-segment="{segment}"'
      f'{f""" data-clean="{clean[place]}" """ if replaced else ""}>{html.escape(shown)}</span>'
    )

  return write


def _picture(seen: SeenBatch, arrays: dict[str, np.ndarray], start: int, stop: int) -> str:
  """The picture as it was read and, where noise changed it, as its targets have it."""
  config, params = seen.parts.vqgan_config, seen.parts.vqgan_params
  read, clean = (seen.vocabulary.code_of_token[arrays[name][start:stop]] for name in ('tokens', 'clean_tokens'))
  n_replaced = int(np.count_nonzero(read != clean))
  if config is None or 'decoder' not in (params or {}) or stop - start != config.n_image_tokens:
    why = 'cut off' if config is not None and stop - start != config.n_image_tokens else 'no picture decoder'
    return f'<span class="unfinished">picture of {stop - start} codes, {n_replaced} replaced ({why})</span>'

  def decoded(codes: np.ndarray) -> UInt8[np.ndarray, 'H W 3']:
    return images.to_uint8(decode_pixels(config, params, codes[None]))[0]

  figures = [page.figure(decoded(read), f'as read: {n_replaced} of {stop - start} codes replaced' if n_replaced else 'as read')]
  figures += [page.figure(decoded(clean), 'as learned')] if n_replaced else []
  return '<div class="pictures">' + ''.join(figures) + '</div>'
