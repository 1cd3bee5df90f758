"""Chameleon-7B and -34B with the settings of the paper: pre-training and supervised fine-tuning, each on the machines it was planned for.

  chameleon train --config=experiments/chameleon.py:SIZE,STAGE,MACHINES --config.tokenizers=MODEL_FOLDER --workdir=runs/NAME

  SIZE      7b | 34b
  STAGE     pretrain   both stages in one run and one schedule, as in the paper: 9.2 T tokens, the mixture changes after 80 % of the steps
            stage_1    the first 80 % by themselves, down the same curve of learning rates
            stage_2    the last 20 %, from the model folder of stage_1 (--config.init_from=FOLDER): moments start anew, rates go on
            sft        from a pre-trained model folder (--config.init_from=FOLDER)
  MACHINES  v5e-256 | v5p-128 (64 chips: Google counts two cores a chip) | 8xh100 | 8xh200 | 64xh100

Claim:     the published recipe in one file. Pre-training: rows of 4,096 tokens, 2,048 of them a step (7B) or 3,072 (34B), AdamW (0.9,
           0.95, eps 1e-5, decay 0.1), 1e-4 after 4,000 steps of warm-up, exponential decay to 0, clipping at 1, z-loss 1e-5, QK-norm;
           7B with dropout 0.1 and norms before the blocks, 34B without dropout and with norms behind them. Fine-tuning: 128 rows, cosine
           from 1e-5, dropout 0.05 for both, loss on answers only.
Source:    arXiv 2405.09818, sections 2.2, 2.3 and 3, Tables 1 to 3. Not published, chosen here: the constant of the decay (ln 100), the
           initialisation (0.02), the mixture of stage 2 beyond "half the weight", the 100 steps of warm-up of stage 2 and of fine-tuning,
           two passes of fine-tuning, and the meshes.
Data:      the corpora are not public. The sources named here are those of the package, in the proportions of the paper: 2.9 T tokens of
           text, 1.4 billion pairs, 0.4 T tokens of interleaved pages; weights count documents, in billions, with 1,000 tokens for a
           text and 4,000 for a page. Of fine-tuning, Table 3's samples: everything is conversations. Put your own sources in their place,
           --config.data.stages.0.weights="(('NAME', WEIGHT), ...)".
Memory:    float32 masters and moments take 12 bytes a parameter, gradients 4, and 4 more where they are accumulated; all of it is split
           over fsdp x tensor. With full rematerialisation a row leaves 2 * 4,096 * d_model bytes a layer, 1.1 GB in 7B and 3.2 GB in
           34B. Rows at a time are batch / (accumulate * data * fsdp).

           | size, machines | mesh (data, fsdp, tensor) | state + gradients | rows at a time |
           |----------------|---------------------------|-------------------|----------------|
           | 7b,  v5e-256   | 1, 256, 1                 | 0.5 GB            | 2 (2.1 GB)     |
           | 7b,  v5p-128   | 1, 64, 1                  | 2.2 GB            | 8 (8.6 GB)     |
           | 7b,  8xh100    | 1, 8, 1                   | 17.5 GB           | 8 (8.6 GB)     |
           | 7b,  8xh200    | 1, 8, 1                   | 17.5 GB           | 16 (17.2 GB)   |
           | 7b,  64xh100   | 8, 8, 1: shards in a node | 17.5 GB           | 8 (8.6 GB)     |
           | 34b, v5e-256   | 1, 256, 1                 | 2.7 GB            | 1 (3.2 GB)     |
           | 34b, v5p-128   | 1, 64, 1                  | 10.7 GB           | 4 (12.9 GB)    |
           | 34b, 8xh200    | 1, 8, 1                   | 85.7 GB           | 4 (12.9 GB)    |
           | 34b, 64xh100   | 1, 64, 1                  | 10.7 GB           | 4 (12.9 GB)    |
           Arithmetic, not measured: none of these runs has been made by us. 34b does not fit 8xh100: 85.7 GB of 80. Fine-tuning has 128
           rows, fewer than v5e-256 has chips: there two chips share a row (tensor 2), its residual stream in two pieces.
Hardware:  in the paper 1,024 A100 of 80 GB for 7B (856,481 GPU hours) and 3,072 for 34B (4,282,407).
Launch:    experiments/launch: Slurm, TPU VMs, Kubernetes.
"""

import dataclasses
import math

import ml_collections

from chameleon_jax import presets
from chameleon_jax.cli.flags import editable
from chameleon_jax.config import (
  CheckpointConfig,
  DataConfig,
  MeshConfig,
  OptimizerConfig,
  StageConfig,
  TrainConfig,
  TransformerConfig,
)

STAGE_1 = (('emoji_text', 2.9), ('emoji_pairs', 1.4), ('emoji_interleaved', 0.1))
INSTRUCTIONS = (('emoji_chat', 2.2),)
STAGE_2 = (*((name, weight / 2) for name, weight in STAGE_1), *INSTRUCTIONS)
SHARES = (0.8, 0.2)  # of the steps

MODELS = {'7b': presets.chameleon_7b, '34b': presets.chameleon_34b}
ROW_LENGTH, TOKENS = 4096, 9.2e12
ROWS = {'7b': 2048, '34b': 3072}
SFT_ROWS, SFT_TOKENS, SFT_PASSES = 128, 1.103e9, 2  # Table 3 sums to 1.103 billion tokens

# (size, machines) -> mesh, and rows a device has at a time in pre-training.
MESHES: dict[tuple[str, str], tuple[MeshConfig, int]] = {
  ('7b', 'v5e-256'): (MeshConfig(1, 256, 1), 2),
  ('7b', 'v5p-128'): (MeshConfig(1, 64, 1), 8),
  ('7b', '8xh100'): (MeshConfig(1, 8, 1), 8),
  ('7b', '8xh200'): (MeshConfig(1, 8, 1), 16),
  ('7b', '64xh100'): (MeshConfig(8, 8, 1), 8),
  ('34b', 'v5e-256'): (MeshConfig(1, 256, 1), 1),
  ('34b', 'v5p-128'): (MeshConfig(1, 64, 1), 4),
  ('34b', '8xh200'): (MeshConfig(1, 8, 1), 4),
  ('34b', '64xh100'): (MeshConfig(1, 64, 1), 4),
}
MACHINES = tuple(dict.fromkeys(machines for _, machines in MESHES))


def get_config(argument: str = '7b,pretrain,v5e-256') -> ml_collections.ConfigDict:
  """The config of SIZE,STAGE,MACHINES.

  Raises:
    ValueError: no such size, stage or machines, or the model does not fit there.
  """
  size, stage, machines = _choice(argument)
  stages = {'pretrain': _pretrain, 'stage_1': _stage_1, 'stage_2': _stage_2, 'sft': _sft}
  if stage not in stages:
    raise ValueError(f'no stage {stage!r}: choose one of {", ".join(stages)}')
  return editable(stages[stage](size, machines))


def _choice(argument: str) -> tuple[str, str, str]:
  parts = argument.split(',')
  if len(parts) != 3:
    raise ValueError(f'give SIZE,STAGE,MACHINES such as 34b,sft,v5p-128, not {argument!r}')
  size, stage, machines = parts
  if size not in MODELS:
    raise ValueError(f'no size {size!r}: choose one of {", ".join(MODELS)}')
  if machines not in MACHINES:
    raise ValueError(f'no machines {machines!r}: choose one of {", ".join(MACHINES)}')
  if (size, machines) not in MESHES:
    fitting = ', '.join(name for some, name in MESHES if some == size)
    need = '20 bytes a parameter of state and gradients come to 85.7 GB a device'
    raise ValueError(f'{size} does not fit {machines}: {need}; it fits {fitting}')
  return size, stage, machines


def _data(stages: tuple[StageConfig, ...], rows: int) -> DataConfig:
  shards = math.gcd(rows, 256)  # so that any number of hosts that divides it, up to 256, gives the same batches
  return DataConfig(stages=stages, seq_len=ROW_LENGTH, batch_size=rows, shards=shards, packing_bins=64, read_threads=16, prefetch=4)


def _pretrain(size: str, machines: str) -> TrainConfig:
  mesh, rows_at_a_time = MESHES[size, machines]
  rows = ROWS[size]
  return TrainConfig(
      model=MODELS[size](),
      vocabulary=presets.released_vocabulary(),
      data=_data((StageConfig(SHARES[0], STAGE_1), StageConfig(SHARES[1], STAGE_2)), rows),
      optimizer=OptimizerConfig(accumulate_steps=rows // (mesh.data * mesh.fsdp * rows_at_a_time)),
      z_loss=1e-5,
      loss_chunks=16,
      n_steps=round(TOKENS / (rows * ROW_LENGTH)),
      mesh=mesh,
      checkpoint=CheckpointConfig(every_steps=1000),
  )


def _stage_1(size: str, machines: str) -> TrainConfig:
  """The curve of the whole run as far as stage 1 goes: it ends above 0."""
  whole = _pretrain(size, machines)
  k, steps, warmup = whole.optimizer.decay_rate, round(SHARES[0] * whole.n_steps), whole.optimizer.warmup_steps
  gone = (steps - warmup) / (whole.n_steps - warmup)  # of the decay
  end = (math.exp(-k * gone) - math.exp(-k)) / (1 - math.exp(-k))
  return dataclasses.replace(
      whole,
      data=_data((StageConfig(1.0, STAGE_1),), ROWS[size]),
      optimizer=dataclasses.replace(whole.optimizer, decay_rate=k * gone, end_fraction=end),
      n_steps=steps,
  )


def _stage_2(size: str, machines: str) -> TrainConfig:
  """The rest of the curve; 100 steps of warm-up, as the moments are new."""
  whole, first = _pretrain(size, machines), _stage_1(size, machines)
  rest = whole.optimizer.decay_rate - first.optimizer.decay_rate
  optimizer = dataclasses.replace(
      whole.optimizer, learning_rate=whole.optimizer.learning_rate * first.optimizer.end_fraction, decay_rate=rest, warmup_steps=100
  )
  return dataclasses.replace(
      whole, data=_data((StageConfig(1.0, STAGE_2),), ROWS[size]), optimizer=optimizer, n_steps=whole.n_steps - first.n_steps
  )


def _sft(size: str, machines: str) -> TrainConfig:
  mesh, rows_at_a_time = MESHES[size, machines]
  devices = mesh.data * mesh.fsdp
  model: TransformerConfig = dataclasses.replace(MODELS[size](), dropout=0.05)
  if devices > SFT_ROWS:
    mesh = MeshConfig(1, SFT_ROWS, devices // SFT_ROWS)
    model = dataclasses.replace(model, sequence_parallel=True)
  rows = SFT_ROWS // (mesh.data * mesh.fsdp)
  return TrainConfig(
      model=model,
      vocabulary=presets.released_vocabulary(),
      data=_data((StageConfig(1.0, INSTRUCTIONS),), SFT_ROWS),
      optimizer=OptimizerConfig(
          learning_rate=1e-5, schedule='cosine', warmup_steps=100, accumulate_steps=max(1, rows // rows_at_a_time)
      ),
      z_loss=1e-5,
      loss_chunks=16,
      n_steps=round(SFT_PASSES * SFT_TOKENS / (SFT_ROWS * ROW_LENGTH)),
      eval_every=200,
      mesh=mesh,
      checkpoint=CheckpointConfig(every_steps=500),
  )
