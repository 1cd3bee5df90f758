"""Our own model folder. What the rest of the program uses is named here; `lazy` reads and writes it tensor by tensor."""

from chameleon_jax.interop.native.folder import (
    ModelParts,
    abstract_transformer,
    abstract_vqgan,
    check_fit,
    load_model,
    make_vocabulary,
    save_model,
)

__all__ = ['ModelParts', 'abstract_transformer', 'abstract_vqgan', 'check_fit', 'load_model', 'make_vocabulary', 'save_model']
