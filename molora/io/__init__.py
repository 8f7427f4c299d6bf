"""bytes ⇄ tensors: file formats, strict both ways; knows no module."""

from molora.io.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from molora.io.header import TensorInfo, read_header
from molora.io.hub import mixture_directory
from molora.io.manifest import BaseFingerprint, Manifest, dump_manifest, parse_manifest
from molora.io.native import MANIFEST, check_writable, read_manifest, read_tensors, write
from molora.io.rotation import (
    Rotation,
    checkpoint_directory,
    complete_checkpoints,
    delete_checkpoint,
    newest_complete,
    rotate,
)

__all__ = [
    "MANIFEST",
    "BaseFingerprint",
    "Checkpoint",
    "Manifest",
    "Rotation",
    "TensorInfo",
    "check_writable",
    "checkpoint_directory",
    "complete_checkpoints",
    "delete_checkpoint",
    "dump_manifest",
    "mixture_directory",
    "newest_complete",
    "parse_manifest",
    "read_checkpoint",
    "read_header",
    "read_manifest",
    "read_tensors",
    "rotate",
    "write",
    "write_checkpoint",
]
