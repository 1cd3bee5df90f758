"""Text tokenizer of the emoji world: 2,034 pieces in a vocabulary of 3,072.

Claim:     one small BPE serves emoji names, instructions and Python's documentation: a word of a skin tone or of a common
           base is one piece ('woman', ' astronaut', ':', ' medium', '-', 'dark', ' skin', ' tone').
Source:    paper section 2.1 (new BPE, sentencepiece); layout of the released vocabulary with 1,024 codes, no sentinels and
           8 reserved tokens, the first of which is end_turn; text starts at 1,038.
Data:      training split of emoji_text (Python's documentation) and emoji_chat (instructions) once, emoji_pairs (names)
           four times: with once, ' astronaut' still falls into five pieces, with 16 times the documentation needs 5 % more.
Hardware:  one CPU core, 7 seconds.
Expected:  held-out bytes per piece: emoji_text 3.28, emoji_pairs 4.42, emoji_chat 4.17; no raw bytes; 6.5 pieces for a
           training name, 8.9 for a held-out one (they have tone and gender). The same model file every time.
Command:   chameleon train-text-tokenizer --config=experiments/emoji_text_tokenizer.py --workdir=runs/emoji/text_tokenizer
"""

import ml_collections

from chameleon_jax.cli.flags import editable
from chameleon_jax.config import TextTokenizerTrainConfig, VocabularyConfig


def get_config() -> ml_collections.ConfigDict:
  """The config of this experiment."""
  return editable(
      TextTokenizerTrainConfig(
          vocabulary=VocabularyConfig(size=3072, n_codes=1024, n_sentinels=0, n_reserved=8),
          sources=(('emoji_text', 1), ('emoji_pairs', 4), ('emoji_chat', 1)),
          character_coverage=1.0,
      )
  )
