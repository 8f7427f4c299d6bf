"""Saved mixtures to damage, and what must be left of a model that refused one."""

from __future__ import annotations

import copy
import hashlib
import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tiny_models import batch_for, randomize, tiny
from torch import Tensor, nn

import molora

MANIFEST = "molora.json"
LORA_A = "model.layers.1.mlp.down_proj.experts.lora_A"
"""A tensor of `save_tiny`'s mixtures; E, r and in all differ."""
ROUTER = "model.layers.0.self_attn.q_proj.router.weight"


def save_tiny(directory: Path, *, seed: int = 0) -> molora.Mixture:
    """A mixture with 3 and 5 experts of rank 4 on a tiny Llama, with random values, saved."""
    config = molora.presets.mola(num_experts=[3, 5], top_k=2, rank=4)
    mixture = molora.attach(tiny("llama"), config)
    randomize(mixture, seed=seed)
    mixture.save(directory)
    return mixture


def logits(model: nn.Module) -> Tensor:
    """Of a fixed ragged batch."""
    with torch.no_grad():
        out: Tensor = model(**batch_for(model, labels=False)).logits
    return out


@dataclass(frozen=True)
class Snapshot:
    """Everything that attaching changes on a model."""

    parameters: dict[str, Tensor]
    trainable: dict[str, bool]
    modules: list[str]
    attributes: dict[str, list[str]]
    num_hooks: int
    settings: dict[str, Any]

    @classmethod
    def of(cls, model: nn.Module) -> Snapshot:
        modules = dict(model.named_modules())
        return cls(
            parameters={n: p.detach().clone() for n, p in model.named_parameters()},
            trainable={n: p.requires_grad for n, p in model.named_parameters()},
            modules=list(modules),
            attributes={name: sorted(module.__dict__) for name, module in modules.items()},
            num_hooks=sum(
                len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules.values()
            ),
            settings=copy.deepcopy(model.config.to_dict()),
        )

    def assert_same(self, model: nn.Module) -> None:
        """Bit-equal parameters, the same flags, modules, attributes, hooks and settings."""
        now = Snapshot.of(model)
        assert now.parameters.keys() == self.parameters.keys()
        for name, value in self.parameters.items():
            assert torch.equal(now.parameters[name], value), name
        assert now.trainable == self.trainable
        assert now.modules == self.modules
        assert now.attributes == self.attributes
        assert now.num_hooks == self.num_hooks
        assert now.settings == self.settings


def tensors_path(directory: Path) -> Path:
    """The one safetensors file."""
    (path,) = directory.glob("*.safetensors")
    return path


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """As the library reads them, not molora."""
    return load_file(tensors_path(directory))


def edit_tensors(directory: Path, edit: Callable[[dict[str, Tensor]], None]) -> None:
    """Change the tensor file in place; the manifest stays."""
    tensors = read_tensors(directory)
    edit(tensors)
    path = tensors_path(directory)
    path.unlink()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def read_manifest(directory: Path) -> dict[str, Any]:
    """The JSON as it stands."""
    data: dict[str, Any] = json.loads((directory / MANIFEST).read_text())
    return data


def edit_manifest(
    directory: Path, edit: Callable[[dict[str, Any]], None], *, sealed: bool = True
) -> None:
    """Change the manifest; `sealed`: with a checksum that fits, as a hostile author would."""
    data = read_manifest(directory)
    edit(data)
    if sealed:
        data.pop("checksum", None)
        text = json.dumps(data, sort_keys=True, separators=(",", ":"))
        data["checksum"] = hashlib.sha256(text.encode()).hexdigest()
    (directory / MANIFEST).write_text(json.dumps(data, indent=2))


def seal(directory: Path) -> None:
    """Make the manifest, all hashes included, agree with a changed tensor file."""
    path = tensors_path(directory)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    path.rename(directory / f"molora-{digest[:16]}.safetensors")
    listed = {
        name: {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
        for name, tensor in read_tensors(directory).items()
    }
    edit_manifest(directory, lambda data: data.update(tensors=listed, sha256=digest))


def split_header(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and values of a safetensors file."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join_header(path: Path, header: str, values: bytes) -> None:
    """Write a safetensors file with any text for a header."""
    text = header.encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + values)
