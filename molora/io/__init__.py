"""bytes ⇄ tensors: file formats, strict both ways; knows no module."""

from molora.io.native import BaseFingerprint, Manifest, read_manifest, read_tensors, write

__all__ = ["BaseFingerprint", "Manifest", "read_manifest", "read_tensors", "write"]
