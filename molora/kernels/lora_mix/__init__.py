"""delta_TF = Σ_k gate_k · scaling · B A x, one file per backend."""

from molora.kernels.lora_mix import dense, gather, grouped, reference

__all__ = ["dense", "gather", "grouped", "reference"]
