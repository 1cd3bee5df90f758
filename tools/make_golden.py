"""Builds tests/golden: tiny random checkpoints in every layout, and what torch and transformers make of them.

    python tools/make_golden.py                # writes tests/golden anew
    python tools/make_golden.py --output=DIR

Needs the `parity` extra. An oracle of its own: nothing of this package is imported. Networks run in float64 and the values are rounded, so
that another machine finds the same; a float32 run beside it bounds what float32 costs (see the table in tests/golden/README.md).
"""

import argparse
import pathlib
import shutil
import zlib
from collections.abc import Callable
from typing import Any

import golden_huggingface
import golden_meta
import golden_text
import golden_vqgan
import numpy as np
import tokenizers
import torch
import transformers
from golden_huggingface import PortArgs
from golden_meta import MetaArgs
from golden_vqgan import Network, VQArgs

OUTPUT = pathlib.Path(__file__).resolve().parent.parent / 'tests' / 'golden'
MAX_BYTES = 3 << 20  # of the folder, packed as git packs it
LENGTH = 16
META_VQ = VQArgs()
PICTURE_SIZES = ((16, 23), (37, 20), (50, 50), (21, 16), (9, 13))  # height, width: odd, and each resized otherwise

META = (
  MetaArgs('meta_7b_like', 64, 2, 4, None, 64, swin_norm=False),
  MetaArgs('meta_30b_like', 64, 2, 8, 4, 32, swin_norm=True, model_parallel_size=4),
  MetaArgs(
    *('meta_fused', 64, 2, 4, 2, 32, False),
    model_parallel_size=2,
    ffn_dim_multiplier=1.3,
    rope_theta=20_000.0,
    dtype='float32',
    fused=True,
  ),
)
PORT = (
  PortArgs('hf_7b_like', 64, 192, 2, 4, 4, False, released_spelling=True, vqgan=VQArgs(ch_mult=(1, 1), num_res_blocks=2)),
  PortArgs('hf_30b_like', 64, 160, 2, 8, 4, True, model_parallel_size=4, vqgan=VQArgs(ch_mult=(1, 1, 1)), shard_bytes=200_000),
  PortArgs('anole_like', 64, 192, 2, 4, 4, False, vqgan=VQArgs(ch_mult=(1, 1)), image_tokenizer='both'),
  PortArgs('lumina_like', 64, 160, 2, 8, 4, True, model_parallel_size=4, image_tokenizer='none', norms_per_rank=True),
)

Run = Callable[[torch.dtype], tuple[list[torch.Tensor], torch.Tensor]]


def check(condition: Any, message: str) -> None:
  """Stops where a fixture would test nothing, or the oracles disagree."""
  if not condition:
    raise RuntimeError(message)


def draw_tokens(layout: str) -> torch.Tensor:
  """Ids [2, 16]: a prompt that a picture begins in, and ids of the whole vocabulary."""
  prompt = golden_meta.draw(f'{layout}/prompt', (5,), np.arange(golden_text.TEXT_START, golden_meta.N_TOKENS))
  codes = golden_meta.draw(f'{layout}/codes', (LENGTH - 7,), np.arange(4, 4 + golden_text.N_CODES))
  row = torch.cat([torch.zeros(1), prompt, torch.tensor([5.0 + golden_text.N_CODES]), codes])
  return torch.stack([row, golden_meta.draw(f'{layout}/any', (LENGTH,), np.arange(golden_meta.N_TOKENS))]).long()


def language_values(layout: str, run: Run, tokens: torch.Tensor, errors: dict[str, Any]) -> dict[str, np.ndarray]:
  """Tokens, logits and residual streams."""
  (stream, logits), (_, single) = run(torch.float64), run(torch.float32)
  error = float((single.double() - logits).abs().max())
  spread = float(logits.std())
  check(0.5 < spread < 2, f'{layout}: logits have standard deviation {spread:.3f}, not about 1')
  check(error < 2e-5, f'{layout}: float32 and float64 differ by {error:.2g}')
  errors[layout] = {'logits': f'{error:.1g}', 'spread': f'{spread:.2f}'}
  values = {'tokens': tokens.numpy().astype(np.int32), 'logits': logits.numpy().astype(np.float32)}
  return values | {f'hidden_{index}': x.numpy().astype(np.float32) for index, x in enumerate(stream)}


def picture_values(layout: str, network: Network, errors: dict[str, Any]) -> dict[str, np.ndarray]:
  """Pictures of the model's size, their codes in both conventions, and what comes back."""
  side, n_codes = network.args.resolution, network.args.n_embed
  pictures = np.stack([golden_vqgan.draw_picture(f'{layout}/{index}', side, side) for index in range(3)])
  codes, margin = network.encode(golden_vqgan.scale_meta(pictures))
  other_codes, other_margin = network.encode(golden_vqgan.scale_huggingface(pictures))
  single = Network(network.args, network.weights, torch.float32)
  same = single.encode(golden_vqgan.scale_meta(pictures))[0] == codes
  check(same[margin > 1e-4].all(), f'{layout}: float32 finds other codes than float64')
  check(len(np.unique(codes)) >= n_codes // 4, f'{layout}: only {len(np.unique(codes))} codes are used')
  values = {'pictures': pictures, 'codes': codes, 'code_margin': margin}
  values |= {'codes_huggingface': other_codes, 'code_margin_huggingface': other_margin}
  errors[layout] |= {'margin': f'{min(margin.min(), other_margin.min()):.1g}', 'conventions': f'{(codes != other_codes).mean():.0%}'}
  if 'decoder.conv_in.weight' in network.weights:
    values['decoded'] = golden_vqgan.to_uint8(network.decode(codes))
    check(40 < values['decoded'].std() < 120, f'{layout}: decoded pictures have little contrast')
    apart = np.abs(golden_vqgan.to_uint8(single.decode(codes)).astype(int) - values['decoded']).max()
    check(apart <= 1, f'{layout}: float32 decodes {apart} levels away from float64')
  return values


def source_values(layout: str, network: Network, pixels: Callable[[np.ndarray], torch.Tensor]) -> dict[str, np.ndarray]:
  """Pictures of odd sizes and the codes that the whole path from uint8 gives them."""
  values: dict[str, np.ndarray] = {}
  for index, size in enumerate(PICTURE_SIZES):
    picture = golden_vqgan.draw_picture(f'{layout}/source/{index}', *size)
    codes, margin = network.encode(pixels(picture))
    values |= {f'source_{index}': picture, f'source_codes_{index}': codes[0], f'source_margin_{index}': margin[0]}
  return values


def save(folder: pathlib.Path, values: dict[str, np.ndarray]) -> None:
  """Writes golden.npz; numpy gives every entry the same date."""
  folder.mkdir(parents=True)
  np.savez_compressed(folder / 'golden.npz', allow_pickle=False, **values)


def write_tokenizer(folder: pathlib.Path) -> Network:
  """The tokenizer folder that lies beside Meta's models; returns its network in float64."""
  folder.mkdir(parents=True)
  tokenizer = golden_text.build()
  tokenizer.save(str(folder / 'text_tokenizer.json'), pretty=False)
  weights = golden_vqgan.draw_weights('tokenizer', META_VQ, decoder=True)
  extras = {'loss.logvar': (), 'loss.discriminator.main.0.weight': (4, 3, 4, 4), 'loss.perceptual_loss.lin0.model.1.weight': (1, 8, 1, 1)}
  extras_drawn = {name: golden_meta.draw(f'tokenizer/{name}', shape, golden_meta.GRID / 8) for name, shape in extras.items()}
  rest = {'epoch': 3, 'global_step': 1200, 'pytorch-lightning_version': '1.0.8', 'callbacks': {}, 'lr_schedulers': []}
  torch.save(rest | {'state_dict': weights | extras_drawn}, folder / 'vqgan.ckpt')
  (folder / 'vqgan.yaml').write_text(golden_vqgan.yaml_text(META_VQ))
  golden_meta.write_checklist(folder)
  return Network(META_VQ, weights, torch.float64)


def make_meta(output: pathlib.Path, errors: dict[str, Any]) -> None:
  """Meta's layouts with the tokenizer folder beside them."""
  network = write_tokenizer(output / 'tokenizer')
  golden_text.write_json(output / 'encodings.json', golden_text.encodings(golden_text.build()))
  for args in META:
    shards = golden_meta.draw_shards(args)
    golden_meta.write_checkpoint(args, shards, output / 'models' / args.name)
    tokens = draw_tokens(args.name)
    values = language_values(args.name, lambda dtype: golden_meta.forward(args, shards, tokens, dtype), tokens, errors)  # noqa: B023
    ported = golden_huggingface.forward(golden_huggingface.from_meta(args, shards), tokens)[1]
    apart = np.abs(ported.numpy() - values['logits']).max()
    check(apart < 2e-5, f'{args.name}: transformers with the same weights is {apart:.2g} away')
    errors[args.name]['transformers'] = f'{apart:.0e}'
    values |= picture_values(args.name, network, errors)
    if args is META[0]:
      crop = lambda picture: golden_vqgan.scale_meta(golden_vqgan.crop_meta(picture, META_VQ.resolution)[None])
      values |= source_values(args.name, network, crop)
    if args.model_parallel_size > 1:
      check_ranks(args, shards, tokens, values['logits'])
    save(output / args.name, values)


def check_ranks(args: MetaArgs, shards: list[golden_meta.Tensors], tokens: torch.Tensor, logits: np.ndarray) -> None:
  """A reader that averages the norms over ranks, or takes the first rank's, must be far off."""
  names = [name for name in shards[0] if '_normalization.' in name]
  for kind in ('mean', 'first'):
    same = {name: torch.stack([shard[name].float() for shard in shards]).mean(0) if kind == 'mean' else shards[0][name] for name in names}
    wrong = golden_meta.forward(args, [shard | same for shard in shards], tokens, torch.float32)[1]
    check(np.abs(wrong.numpy() - logits).max() > 0.1, f'{args.name}: norms of the ranks are too much alike to tell')


def make_port(output: pathlib.Path, errors: dict[str, Any]) -> None:
  """The layouts of transformers and its forks."""
  for args in PORT:
    folder = output / 'models' / args.name
    folder.mkdir(parents=True)
    weights = golden_huggingface.write_checkpoint(args, folder)
    models = {dtype: golden_huggingface.load(args, folder, dtype) for dtype in (torch.float32, torch.float64)}
    tokens = draw_tokens(args.name)
    values = language_values(args.name, lambda dtype: golden_huggingface.forward(models[dtype], tokens), tokens, errors)  # noqa: B023
    if weights:
      network = Network(args.vqgan, weights, torch.float64)
      values |= picture_values(args.name, network, errors)
      for key, pixels in (('codes', golden_vqgan.scale_meta), ('codes_huggingface', golden_vqgan.scale_huggingface)):
        found = golden_huggingface.encode(models[torch.float64], pixels(values['pictures']))
        check((found == values[key]).all(), f'{args.name}: transformers finds other codes')
      if args is PORT[0]:
        values |= source_values(args.name, network, lambda picture: torch.tensor(golden_huggingface.preprocess(args, picture)[None]))  # noqa: B023
    check_tokenizer(folder)
    save(output / args.name, values)


def check_tokenizer(folder: pathlib.Path) -> None:
  """Transformers opens the tokenizer files, and differs from Meta's form by the leading `<s>` alone."""
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  for sample in golden_text.encodings(golden_text.build()):
    found = tokenizer(sample['text']).input_ids
    check(found == [0, *sample['ids']], f'{folder.name}: transformers reads {sample["text"]!r} as {found}')


def packed_bytes(folder: pathlib.Path) -> int:
  """Size of the files as git packs each."""
  return sum(len(zlib.compress(path.read_bytes())) for path in folder.rglob('*') if path.is_file())


def readme(errors: dict[str, Any], size: int) -> str:
  """Where the values come from."""
  columns = ('logits', 'transformers', 'spread', 'margin', 'conventions')
  rows = [f'| `{name}` | ' + ' | '.join(found.get(column, '') for column in columns) + ' |' for name, found in errors.items()]
  versions = f'torch {torch.__version__.split("+")[0]}, transformers {transformers.__version__}, tokenizers {tokenizers.__version__}'
  return f"""# Golden values

Tiny checkpoints with random weights in every layout of the Chameleon family, and what torch and transformers make of them.
No weight of any release is in here. Made by `python tools/make_golden.py` (seed {golden_meta.SEED}) with
{versions}, numpy {np.__version__}; {size / 2**20:.1f} MiB packed.
The same versions give the same bytes. Where the `parity` extra is installed, `tests/interop/test_golden.py` makes everything anew
and compares.

| path | content |
|---|---|
| `models/NAME/` | checkpoint |
| `tokenizer/` | text and image tokenizer beside Meta's layouts |
| `NAME/golden.npz` | inputs and outputs |
| `encodings.json` | texts and their ids by the tokenizers library |

| key of `golden.npz` | content |
|---|---|
| `tokens` | int32 [B, T] |
| `logits` | float32 [B, T, V], raw, image columns included |
| `hidden_0` .. `hidden_L` | float32 [B, T, D], the residual stream after the embedding and each layer |
| `pictures` | uint8 [B, H, W, 3] of the model's size |
| `codes`, `codes_huggingface` | int32 [B, n], with the release's scaling of pixels and with the port's |
| `code_margin`, `code_margin_huggingface` | float32 [B, n], by how much (squared distance) the second nearest entry is farther away |
| `decoded` | uint8 [B, H, W, 3] from `codes`, where there is a decoder |
| `source_i`, `source_codes_i`, `source_margin_i` | uint8 pictures of other sizes and their codes |

Meta's layouts run in a plain torch network written from published facts, one rank after the other; the others in transformers' own.
The image tokenizer is plain torch, and transformers' encoder found the same codes. Networks run in float64 and values are rounded to
float32. In the table: the largest difference of logits to a float32 run of the same network, and to transformers' network with Meta's
weights in it (its angles are float32 throughout); the standard deviation of the logits; the smallest margin of a code; how many codes
differ between the two scalings of pixels. Pictures of other sizes go through the release's preprocessing in `meta_7b_like`, and through
the port's in `hf_7b_like`.

| layout | float32 | transformers | deviation | margin | scalings |
|---|---|---|---|---|---|
{chr(10).join(rows)}
"""


def make(output: pathlib.Path) -> None:
  """Writes everything into `output`, which must not hold anything yet."""
  transformers.logging.set_verbosity_error()
  transformers.logging.disable_progress_bar()
  torch.manual_seed(0)  # of weights that are drawn again right after
  errors: dict[str, Any] = {}
  with torch.no_grad():
    make_meta(output, errors)
    make_port(output, errors)
  size = packed_bytes(output)
  check(size < MAX_BYTES, f'{size} bytes packed are too many for the repository')
  (output / 'README.md').write_text(readme(errors, size))


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--output', type=pathlib.Path, default=OUTPUT, help='Folder; what has the same names in it is replaced.')
  output = parser.parse_args().output
  aside = output.with_name(f'.{output.name}.writing')
  shutil.rmtree(aside, ignore_errors=True)
  make(aside)
  output.mkdir(parents=True, exist_ok=True)
  for new in aside.iterdir():  # other golden values may lie beside these
    old = output / new.name
    if old.is_dir():
      shutil.rmtree(old)
    new.replace(old)
  aside.rmdir()
  print((output / 'README.md').read_text())


if __name__ == '__main__':
  main()
