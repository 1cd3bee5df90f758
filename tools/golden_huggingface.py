"""The port's layouts for `make_golden.py`: tiny random checkpoints as transformers writes them, and transformers' own networks to run them.

Written: mainline folders with the encoder half of the image tokenizer (in the spelling of the released configs and in today's), one
with the decoder added as Anole has it, one without an image tokenizer and with one norm per rank as Lumina-mGPT has it
(spec model.md 1.4, 3). Does not know: the package that these values test.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import golden_meta
import golden_text
import numpy as np
import torch
from golden_meta import GRID, N_TOKENS, MetaArgs, draw, norm_values, scale
from golden_vqgan import VQArgs, draw_weights
from safetensors.torch import load_file, save_file
from transformers import ChameleonConfig, ChameleonForConditionalGeneration
from transformers.models.chameleon.image_processing_pil_chameleon import ChameleonImageProcessorPil

Tensors = dict[str, torch.Tensor]
VQ_PREFIX = 'model.vqmodel.'


@dataclasses.dataclass(frozen=True)
class PortArgs:
  """One layout; fields are those of config.json unless said otherwise."""

  name: str  # of the folder
  hidden_size: int
  intermediate_size: int
  num_hidden_layers: int
  num_attention_heads: int
  num_key_value_heads: int
  swin_norm: bool
  model_parallel_size: int = 1
  rope_theta: float = 10_000.0
  rms_norm_eps: float = 1e-5
  vqgan: VQArgs = VQArgs()
  image_tokenizer: str = 'encoder'  # which half is there: 'encoder', 'both', 'none'
  released_spelling: bool = False  # config.json as of 2024
  shard_bytes: int = 2**40
  norms_per_rank: bool = False  # q and k norms [ranks, head_dim] in place of [heads, head_dim]


def make_config(args: PortArgs) -> ChameleonConfig:
  """Config of transformers, old names of the image tokenizer's fields beside the new ones as in the released files."""
  vocabulary_map = dict(sorted(vocabulary(port=True).items(), key=lambda item: item[1]))
  same = {name: getattr(args, name) for name in ('hidden_size', 'intermediate_size', 'num_hidden_layers', 'num_attention_heads')}
  same |= {name: getattr(args, name) for name in ('num_key_value_heads', 'swin_norm', 'model_parallel_size', 'rms_norm_eps')}
  rope = {'rope_theta': args.rope_theta, 'rope_type': 'default'}
  return ChameleonConfig(vocab_size=N_TOKENS, vocabulary_map=vocabulary_map, vq_config=vq_fields(args), rope_parameters=rope, **same)


def vq_fields(args: PortArgs) -> dict[str, Any]:
  """`vq_config`."""
  vq = args.vqgan
  new = {'embed_dim': vq.embed_dim, 'num_embeddings': vq.n_embed, 'double_latent': False, 'latent_channels': vq.z_channels}
  new |= {'resolution': vq.resolution, 'in_channels': 3, 'base_channels': vq.ch, 'channel_multiplier': list(vq.ch_mult)}
  new |= {'num_res_blocks': vq.num_res_blocks, 'attn_resolutions': [], 'dropout': 0.0, 'attn_type': 'vanilla'}
  if args.released_spelling:
    new |= {'ch': vq.ch, 'ch_mult': list(vq.ch_mult), 'n_embed': vq.n_embed, 'out_ch': 3, 'out_channels': 3, 'double_z': False}
    new |= {'z_channels': vq.z_channels}
  if args.image_tokenizer == 'both':
    side = vq.resolution // 2 ** (len(vq.ch_mult) - 1)
    new |= {'out_channels': 3, 'quant_state_dims': [side, side]}
  return new


def vocabulary(*, port: bool) -> dict[str, int]:
  """Name -> id of all tokens, in the port's names or Meta's."""
  tokenizer = golden_text.build()
  return (golden_text.to_huggingface(tokenizer) if port else tokenizer).get_vocab()


def draw_transformer(args: PortArgs, model: torch.nn.Module) -> Tensors:
  """Bfloat16 tensors of the language model, norms spread to heads: all heads of a rank share theirs, as after a conversion."""
  tensors = {}
  for name, value in model.state_dict().items():
    at = f'{args.name}/{name}'
    if name.startswith(VQ_PREFIX):
      continue
    if '.q_norm.' in name or '.k_norm.' in name:
      heads, width = value.shape
      index = int(name.endswith('.bias'))
      ranks = [draw(f'{at}/{rank}', (width,), norm_values(rank)[index]) for rank in range(args.model_parallel_size)]
      drawn = torch.stack(ranks).repeat_interleave(heads // args.model_parallel_size, 0)
    elif value.ndim == 1:
      drawn = draw(at, value.shape, 1 + GRID / 8)
    else:
      drawn = draw(at, value.shape, GRID / 2 if 'embed_tokens' in name else GRID * scale(value.shape[1]))
    tensors[name] = drawn.to(torch.bfloat16)
  return tensors


def write_checkpoint(args: PortArgs, folder: pathlib.Path) -> Tensors:
  """Writes the folder; returns the weights of the image tokenizer under Meta's names (none where the layout has none)."""
  config = make_config(args)
  model = ChameleonForConditionalGeneration(config).eval()
  model.load_state_dict(draw_transformer(args, model), strict=False)
  weights = {} if args.image_tokenizer == 'none' else draw_weights(args.name, args.vqgan, decoder=args.image_tokenizer == 'both')
  known = set(model.state_dict())
  own = {f'{VQ_PREFIX}{name}': value for name, value in weights.items()}
  model.load_state_dict({name: value for name, value in own.items() if name in known}, strict=False)
  for name, parameter in model.named_parameters():
    if not name.startswith(VQ_PREFIX):
      parameter.data = parameter.data.to(torch.bfloat16)
  model.save_pretrained(folder, max_shard_size=args.shard_bytes)
  extra = {name: value for name, value in own.items() if name not in known}
  if args.norms_per_rank or extra:
    _rewrite(args, folder, model.state_dict() | extra)
  _respell(args, folder / 'config.json')
  write_processor(args, folder)
  return weights


def _rewrite(args: PortArgs, folder: pathlib.Path, tensors: Mapping[str, torch.Tensor]) -> None:
  """The single file again, as the forks of the port have it."""
  kept = {}
  for name, value in tensors.items():
    if name.startswith(VQ_PREFIX) and args.image_tokenizer == 'none':
      continue
    if args.norms_per_rank and ('.q_norm.' in name or '.k_norm.' in name):
      value = value[:: len(value) // args.model_parallel_size]
    kept[name] = value.contiguous()
  save_file(kept, folder / 'model.safetensors', metadata={'format': 'pt'})


def _respell(args: PortArgs, path: pathlib.Path) -> None:
  config = json.loads(path.read_text())
  if args.released_spelling:
    config['rope_theta'] = config.pop('rope_parameters')['rope_theta']
    config['rope_scaling'] = None
    config['torch_dtype'] = config.pop('dtype')
    del config['image_token_id']
  if args.norms_per_rank:
    config |= {'architectures': ['ChameleonXLLMXForConditionalGeneration'], 'z_loss_weight': 1e-05, 'dropout': 0.05}
  golden_text.write_json(path, config)


def write_processor(args: PortArgs, folder: pathlib.Path) -> None:
  """Tokenizer and processor files (spec model.md 3.4)."""
  vq = args.vqgan
  golden_text.to_huggingface(golden_text.build()).save(str(folder / 'tokenizer.json'), pretty=False)
  tokens = {'bos_token': '<s>', 'eos_token': '</s>', 'pad_token': '<pad>', 'unk_token': '<unk>'}
  tokens['sep_token'] = golden_text.special_names()[golden_text.END_TURN]
  golden_text.write_json(folder / 'special_tokens_map.json', tokens)
  more = {'tokenizer_class': 'LlamaTokenizerFast', 'legacy': False, 'clean_up_tokenization_spaces': False}
  golden_text.write_json(folder / 'tokenizer_config.json', tokens | more)
  codes = (vq.resolution // 2 ** (len(vq.ch_mult) - 1)) ** 2
  processor = {'image_seq_length': codes, 'image_token': '<image>', 'processor_class': 'ChameleonProcessor'}
  golden_text.write_json(folder / 'processor_config.json', processor)
  switches = dict.fromkeys(('do_resize', 'do_center_crop', 'do_rescale', 'do_normalize', 'do_convert_rgb'), True)
  sizes = {'size': {'shortest_edge': vq.resolution}, 'crop_size': {'height': vq.resolution, 'width': vq.resolution}}
  values = {'resample': 1, 'rescale_factor': 0.0078, 'image_mean': [1.0] * 3, 'image_std': [1.0] * 3}
  pictures = switches | sizes | values | {'image_processor_type': 'ChameleonImageProcessor', 'processor_class': 'ChameleonProcessor'}
  golden_text.write_json(folder / 'preprocessor_config.json', pictures)


def load(args: PortArgs, folder: pathlib.Path, dtype: torch.dtype) -> ChameleonForConditionalGeneration:
  """Opens the folder in transformers, as it is where the layout is transformers' own."""
  if args.norms_per_rank:
    tensors = load_file(folder / 'model.safetensors')
    for name, value in tensors.items():
      if '.q_norm.' in name or '.k_norm.' in name:
        heads = args.num_attention_heads if '.q_norm.' in name else args.num_key_value_heads
        tensors[name] = value.repeat_interleave(heads // len(value), 0)
    model: Any = ChameleonForConditionalGeneration(make_config(args))
    found = model.load_state_dict(tensors, strict=False)
    if found.unexpected_keys or not all(name.startswith(VQ_PREFIX) for name in found.missing_keys):
      raise RuntimeError(f'{args.name}: transformers finds {found}')
  else:
    opened: Any = ChameleonForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    model, info = opened
    allowed = {f'{VQ_PREFIX}{name}' for name in draw_weights('', args.vqgan, decoder=True)} - set(model.state_dict())
    unexpected = set(info['unexpected_keys'])
    if info['missing_keys'] or info['mismatched_keys'] or unexpected != (allowed if args.image_tokenizer == 'both' else set()):
      raise RuntimeError(f'{args.name}: transformers finds {info}')
  model.set_attn_implementation('eager')
  return model.to(dtype).eval()


def forward(model: ChameleonForConditionalGeneration, tokens: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
  """Residual stream after the embedding and each layer, and logits before transformers masks the image columns."""
  stream: list[torch.Tensor] = []
  raw: list[torch.Tensor] = []

  def keep(_module: Any, _inputs: Any, output: Any) -> None:
    stream.append(output[0] if isinstance(output, tuple) else output)

  def keep_raw(_module: Any, _inputs: Any, output: torch.Tensor) -> None:
    raw.append(output.clone())  # the mask is written in place

  hooks = [module.register_forward_hook(keep) for module in (model.model.embed_tokens, *model.model.layers)]
  hooks.append(model.lm_head.register_forward_hook(keep_raw))
  with torch.no_grad():
    masked = model(input_ids=tokens, use_cache=False).logits
  for hook in hooks:
    hook.remove()
  images = slice(4, 4 + golden_text.N_CODES)
  if not (masked[..., images] == torch.finfo(masked.dtype).min).all():
    raise RuntimeError('transformers leaves the image columns as they are; the description of the port is out of date')
  masked[..., images] = raw[0][..., images]
  if not torch.equal(masked, raw[0]):
    raise RuntimeError('transformers changes logits beside the image columns')
  return stream, raw[0]


def from_meta(args: MetaArgs, shards: list[dict[str, Any]]) -> ChameleonForConditionalGeneration:
  """Transformers' network with the weights of Meta's shards, in float64 (spec model.md 1.5, 2.4)."""
  ranks = [golden_meta.separate(args, shard) for shard in shards]

  def merged(name: str, axis: int) -> torch.Tensor:
    return torch.cat([rank[name] for rank in ranks], axis)

  def half_split(x: torch.Tensor) -> torch.Tensor:
    return x.unflatten(0, (-1, args.head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)

  tensors = {'model.embed_tokens.weight': merged('tok_embeddings.weight', 1), 'lm_head.weight': merged('output.weight', 0)}
  tensors['model.norm.weight'] = ranks[0]['norm.weight']
  for layer in range(args.n_layers):
    old, new = f'layers.{layer}', f'model.layers.{layer}'
    for part, heads in (('q', args.n_heads), ('k', args.kv_heads)):
      tensors[f'{new}.self_attn.{part}_proj.weight'] = half_split(merged(f'{old}.attention.w{part}.weight', 0))
      for kind in ('weight', 'bias'):
        norms = [half_split(rank[f'{old}.attention.{part}_normalization.{kind}']) for rank in ranks]
        tensors[f'{new}.self_attn.{part}_norm.{kind}'] = torch.stack(norms).repeat_interleave(heads // len(ranks), 0)
    names = (('attention.wv', 'self_attn.v_proj', 0), ('attention.wo', 'self_attn.o_proj', 1), ('feed_forward.w1', 'mlp.gate_proj', 0))
    for before, after, axis in (*names, ('feed_forward.w3', 'mlp.up_proj', 0), ('feed_forward.w2', 'mlp.down_proj', 1)):
      tensors[f'{new}.{after}.weight'] = merged(f'{old}.{before}.weight', axis)
    tensors[f'{new}.input_layernorm.weight'] = ranks[0][f'{old}.attention_norm.weight']
    tensors[f'{new}.post_attention_layernorm.weight'] = ranks[0][f'{old}.ffn_norm.weight']
  sizes = (args.dim, args.ffn_dim, args.n_layers, args.n_heads, args.kv_heads)
  model = ChameleonForConditionalGeneration(make_config(PortArgs(args.name, *sizes, args.swin_norm, rope_theta=args.rope_theta)))
  found = model.load_state_dict(tensors, strict=False)
  if found.unexpected_keys or not all(name.startswith(VQ_PREFIX) for name in found.missing_keys):
    raise RuntimeError(f'{args.name}: transformers finds {found}')
  model.set_attn_implementation('eager')
  return model.double().eval()


def encode(model: ChameleonForConditionalGeneration, pixels: torch.Tensor) -> np.ndarray:
  """Codes int32 [B, n] by transformers' own encoder."""
  with torch.no_grad():
    codes = model.model.vqmodel.encode(pixels.to(model.dtype)).image_tokens
  return codes.view(len(pixels), -1).numpy().astype(np.int32)


def preprocess(args: PortArgs, picture: np.ndarray) -> np.ndarray:
  """Uint8 [H, W, 3] of any size -> float32 [3, side, side] by transformers' own processor."""
  side = args.vqgan.resolution
  processor = ChameleonImageProcessorPil(size={'shortest_edge': side}, crop_size={'height': side, 'width': side})
  return np.asarray(processor(picture, return_tensors='np')['pixel_values'][0], np.float32)
