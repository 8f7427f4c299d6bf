"""How fast: plain tensors in, plain tensors out.

Every op has a readable reference with the same signature.
"""

from molora.kernels.backend import BACKENDS, Backend, backend

__all__ = ["BACKENDS", "Backend", "backend"]
