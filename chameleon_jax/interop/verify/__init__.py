"""The parity certificate: `verify` compares two checkpoints, or one with golden values."""

from chameleon_jax.interop.verify.certificate import verify

__all__ = ['verify']
