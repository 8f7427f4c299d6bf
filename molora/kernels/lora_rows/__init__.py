"""delta_TKF = scaling · B A x of every chosen expert, one file per backend."""

from molora.kernels.lora_rows import dense, gather, grouped, reference

__all__ = ["dense", "gather", "grouped", "reference"]
