"""Golden values of every preset on a small stack, made in float64 from the written-out formulas.

    PYTHONPATH=tests python -m golden.make_goldens [DIRECTORY]

writes presets.safetensors (here by default). Nothing here imports molora: weights are drawn, the
output, the auxiliary loss and all gradients are computed by `preset_references`, and molora has to
reproduce them. `stack` is the model: residual blocks of two linears and a gated FFN, with tanh to
keep their inputs small.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from preset_references import METHODS, Adapted, Method
from safetensors.torch import save_file
from torch import Tensor

FILE = "presets.safetensors"
HIDDEN, BOTTLENECK, INNER, RANK = 6, 5, 9, 3
LENGTHS = (5, 3, 4)
STD = {"lora_A": 0.4, "lora_B": 0.2, "weight": 0.8}  # experts that act, on activations of order 1
SIZES = {  # linear → (in, out)
    "self_attn.q_proj": (HIDDEN, BOTTLENECK),
    "self_attn.o_proj": (BOTTLENECK, HIDDEN),
    "mlp.gate_proj": (HIDDEN, INNER),
    "mlp.up_proj": (HIDDEN, INNER),
    "mlp.down_proj": (INNER, HIDDEN),
}


def num_layers(name: str) -> int:
    """Four for MoLA, whose shape has four quarters."""
    return 4 if name == "mola" else 2


def stack(adapted: Adapted, x: Tensor, base: Mapping[str, Tensor], layers: int) -> Tensor:
    """(B, S, HIDDEN) → the same shape."""
    for layer in range(layers):
        attn, mlp = f"layers.{layer}.self_attn", f"layers.{layer}.mlp"
        inner = adapted.linear(f"{attn}.q_proj", x.tanh(), base[f"{attn}.q_proj.weight"]).tanh()
        x = x + adapted.linear(f"{attn}.o_proj", inner, base[f"{attn}.o_proj.weight"])
        names = ("gate_proj", "up_proj", "down_proj")
        x = x + adapted.ffn(mlp, x.tanh(), {name: base[f"{mlp}.{name}.weight"] for name in names})
    return x


def state_shapes(name: str, method: Method) -> dict[str, tuple[int, ...]]:
    """The tensors of a mixture, from the method's description."""
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(num_layers(name)):
        routed = {"lora": 1, "mola": 2 * (layer + 1)}.get(name, 4)
        for linear, (fan_in, fan_out) in SIZES.items():
            path, in_ffn = f"layers.{layer}.{linear}", linear.startswith("mlp")
            if not (in_ffn or method.attention):
                continue
            experts = routed if in_ffn or method.ffn is None else 1
            shapes[f"{path}.experts.lora_A"] = (experts, RANK, fan_in)
            shapes[f"{path}.experts.lora_B"] = (experts, fan_out, RANK)
            if experts > 1 and method.ffn is None:
                shapes[f"{path}.router.weight"] = (experts, fan_in)
        if method.ffn is not None:
            shapes[f"layers.{layer}.mlp.router.weight"] = (routed, HIDDEN)
    return shapes


def make() -> dict[str, Tensor]:
    """Every tensor of the file: inputs and weights in float32, results rounded to it."""
    source = torch.Generator().manual_seed(2312)

    def draw(*shape: int, std: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=source, dtype=torch.float64).float() * std

    base = {
        f"layers.{layer}.{linear}.weight": draw(fan_out, fan_in, std=fan_in**-0.5)
        for layer in range(4)
        for linear, (fan_in, fan_out) in SIZES.items()
    }
    x = draw(len(LENGTHS), max(LENGTHS), HIDDEN)
    valid = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    types = torch.tensor([1, 0, 0])
    goldens = {"x": x, "mask": valid, "task_types": types}
    goldens |= {f"base.{name}": tensor for name, tensor in base.items()}
    for name, method in METHODS.items():
        state = {
            key: draw(*shape, std=STD[key.rpartition(".")[2]])
            for key, shape in state_shapes(name, method).items()
        }
        leaves = {key: tensor.double().requires_grad_() for key, tensor in state.items()}
        adapted = Adapted(method, leaves, valid)
        wide = {key: tensor.double() for key, tensor in base.items()}
        y = stack(adapted, x.double(), wide, num_layers(name))
        aux = adapted.aux(types)
        (0.5 * (y[valid] ** 2).sum() + aux).backward()
        results = {"y": y, "aux": aux} | {f"grad.{key}": leaf.grad for key, leaf in leaves.items()}
        goldens |= {f"{name}.state.{key}": tensor for key, tensor in state.items()}
        goldens |= {f"{name}.{key}": value.detach().float() for key, value in results.items()}
    return goldens


def main(directory: Path) -> None:
    save_file({name: tensor.contiguous() for name, tensor in make().items()}, directory / FILE)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
