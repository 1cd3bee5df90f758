"""How many shards a Meta checkpoint has, where no file says so; and sizes that no checkpoint can have."""

import shutil
import time

import numpy as np
import pytest

from chameleon_jax.interop.meta.reader import open_meta, write_meta
from tests.interop import meta_reference as reference
from tests.interop.meta.test_reader import TOKENS, our_logits, refused
from tests.interop.meta_reference import Tiny


@pytest.mark.parametrize('ranks', [1, 2, 4])
def test_shapes_tell_the_number_of_shards_where_no_file_does(tmp_path, ranks):
  tiny = Tiny(ranks=ranks)
  tensors = reference.make_ranks(tiny)
  folder = reference.save_model(tmp_path / 'm', tensors, tiny)
  (folder / 'consolidate_params.json').unlink()
  with open_meta(folder) as model:
    assert model.origin.n_shards == ranks and model.transformer_config.d_model == tiny.dim
    np.testing.assert_allclose(our_logits(model, TOKENS), reference.logits(tensors, tiny, TOKENS), atol=2e-4, rtol=0)
    write_meta(tmp_path / 'back', model)
  (back,) = (tmp_path / 'back' / 'models').iterdir()
  with open_meta(back) as model:
    assert model.origin.n_shards == ranks


def test_shapes_that_do_not_tell_the_number_of_shards(tmp_path):
  tiny = Tiny(ranks=2)
  ranks = reference.make_ranks(tiny)

  def saved(ranks):
    shutil.rmtree(tmp_path / 'm', ignore_errors=True)
    folder = reference.save_model(tmp_path / 'm', ranks, tiny, consolidate={'dtype': 'fp32'})
    (folder / 'consolidate_params.json').unlink()
    return folder

  lacking = [{('x' if name == 'norm.weight' else name): array for name, array in rank.items()} for rank in ranks]
  refused(r'nothing tells how many shards .* norm.weight \[\]', saved(lacking))
  short = [rank | {'norm.weight': rank['norm.weight'][:30]} for rank in ranks]
  refused(r'norm.weight \[30\] and tok_embeddings.weight \[64, 16\]', saved(short))
  refused('has 4 shards, but their shapes are those of a checkpoint in 2 .* keep those of one checkpoint', saved([*ranks, *ranks]))
  refused('has 1 shards, but their shapes are those of a checkpoint in 2', saved(ranks[:1]))
  refused('are those of a checkpoint in 1 ', saved(reference.make_ranks(Tiny()) * 4))


def test_absurd_numbers_in_the_argument_files_are_refused_at_once(tmp_path):
  tiny = Tiny()
  for name in ('n_layers', 'dim', 'n_heads', 'n_kv_heads', 'vocab_size', 'multiple_of', 'model_parallel_size'):
    for value in (10**9, 2**31 - 1, 10**40):
      params = reference.params_of(tiny)
      params['model'][name] = value
      folder = reference.save_model(tmp_path / 'm', reference.make_ranks(tiny), tiny, params=params, consolidate={'dtype': 'fp32'})
      before = time.perf_counter()
      if name == 'multiple_of' and value < 2**31:  # the tensors win, with a note
        with open_meta(folder) as model:
          assert 'the tensors are followed' in model.notes[0]
      else:
        refused(name, folder)
      assert time.perf_counter() - before < 2
