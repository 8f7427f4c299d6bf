"""How fast: plain tensors in, plain tensors out.

Every op has a readable reference with the same signature.
"""

from molora.kernels.backend import BACKENDS, Backend, backend, count_calls
from molora.kernels.base import Base

__all__ = ["BACKENDS", "Backend", "Base", "backend", "count_calls"]
