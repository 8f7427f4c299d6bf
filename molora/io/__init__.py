"""bytes ⇄ tensors: file formats, strict both ways; knows no module."""

from molora.io.header import TensorInfo, read_header
from molora.io.manifest import BaseFingerprint, Manifest, dump_manifest, parse_manifest
from molora.io.native import MANIFEST, check_writable, read_manifest, read_tensors, write

__all__ = [
    "MANIFEST",
    "BaseFingerprint",
    "Manifest",
    "TensorInfo",
    "check_writable",
    "dump_manifest",
    "parse_manifest",
    "read_header",
    "read_manifest",
    "read_tensors",
    "write",
]
