"""bytes ⇄ tensors: file formats, strict both ways; knows no module."""

from molora.io.header import TensorInfo, read_header
from molora.io.manifest import BaseFingerprint, Manifest
from molora.io.native import MANIFEST, check_replaceable, read_manifest, read_tensors, write

__all__ = [
    "MANIFEST",
    "BaseFingerprint",
    "Manifest",
    "TensorInfo",
    "check_replaceable",
    "read_header",
    "read_manifest",
    "read_tensors",
    "write",
]
