"""Builds tests/golden/peft: an adapter as Hugging Face's `peft` writes it, and the logits of transformers with it.

    pip install 'peft==0.21.2'          # beside the `parity` extra
    python tools/golden_peft.py

The base is tests/golden/models/hf_30b_like, whose key/value heads are grouped. An oracle of its own: nothing of this package is imported.
"""

import json
import pathlib
import shutil
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import ChameleonForConditionalGeneration

GOLDEN = pathlib.Path(__file__).resolve().parent.parent / 'tests' / 'golden'
TARGETS = ['q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj']


def main() -> None:
  output = GOLDEN / 'peft'
  base = ChameleonForConditionalGeneration.from_pretrained(GOLDEN / 'models' / 'hf_30b_like', dtype=torch.float64)
  config = LoraConfig(r=2, lora_alpha=5, target_modules=r'model\.layers\..*\.(' + '|'.join(TARGETS) + ')')
  model = get_peft_model(base, config).eval()
  generator = torch.Generator().manual_seed(0)
  for name, parameter in model.named_parameters():
    if 'lora_' in name:
      parameter.data = (0.3 * torch.randn(parameter.shape, generator=generator)).half().to(parameter.dtype)
  rng = np.random.default_rng(0)
  tokens = rng.integers(40, base.config.vocab_size, (1, 12))
  with torch.no_grad():
    tuned = model(input_ids=torch.tensor(tokens)).logits
    with model.disable_adapter():
      plain = model(input_ids=torch.tensor(tokens)).logits
  shutil.rmtree(output, ignore_errors=True)
  model.half().save_pretrained(output)
  (output / 'README.md').unlink(missing_ok=True)  # a card with blanks
  written = json.loads((output / 'adapter_config.json').read_text())
  written['base_model_name_or_path'] = 'hf_30b_like'  # not where it lay on this machine
  (output / 'adapter_config.json').write_text(json.dumps(written, indent=2) + '\n')
  (output / 'adapter_model.safetensors').chmod(0o644)
  kept = (plain > -1e30).all(dim=(0, 1)).numpy()  # the port masks the columns of picture tokens
  values: dict[str, Any] = {'tokens': tokens.astype(np.int32), 'kept': np.flatnonzero(kept).astype(np.int32)}
  for name, logits in (('plain', plain), ('tuned', tuned)):
    values[name] = logits.numpy()[:, :, kept].astype(np.float32)
  np.savez_compressed(output / 'logits.npz', **values)


if __name__ == '__main__':
  main()
