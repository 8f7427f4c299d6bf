"""What module paths and child names mean, in every Hugging Face family that molora knows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from molora.errors import AttachError

LINEAR_TYPES = (nn.Linear, Conv1D)
"""Modules that can carry experts; quantised linears of bitsandbytes and torchao are subclasses of
nn.Linear."""

OUTPUT_NAMES = ("o_proj", "out_proj", "down_proj", "c_proj", "wo", "o", "dense")
"""Linears that lead out of a block, in every family here; the others may read the block's input."""

ROUTER_NAMES = ("gate", "router", "shared_expert_gate")
"""Linears with which a mixture-of-experts base model routes; `all` and `ffn` leave them alone."""


@dataclass(frozen=True)
class FeedForwardLayout:
    """The children of an FFN module.

    Attributes:
        inputs: linears that read x: (gate, up) if gated, else one.
        down: linear that leads back.
        activation: attribute that holds the activation function.
        fused: whether the only input projection holds gate and up, in this order.
        inner_dropout: attribute of a dropout before the down projection, if any.
        outer_dropout: attribute of a dropout after it, if any.
    """

    inputs: tuple[str, ...]
    down: str
    activation: str
    fused: bool = False
    inner_dropout: str | None = None
    outer_dropout: str | None = None

    def fits(self, module: nn.Module) -> bool:
        """Whether `module` has these children."""
        linears = all(
            isinstance(getattr(module, name, None), LINEAR_TYPES)
            for name in (*self.inputs, self.down)
        )
        return linears and callable(getattr(module, self.activation, None))


FEED_FORWARD_LAYOUTS = (
    FeedForwardLayout(
        ("gate_proj", "up_proj"), "down_proj", "act_fn"
    ),  # Llama, Mistral, Qwen, Gemma
    FeedForwardLayout(("gate_up_proj",), "down_proj", "activation_fn", fused=True),  # Phi-3
    FeedForwardLayout(("c_fc",), "c_proj", "act", outer_dropout="dropout"),  # GPT-2
    FeedForwardLayout(("wi_0", "wi_1"), "wo", "act", inner_dropout="dropout"),  # T5 v1.1
    FeedForwardLayout(("wi",), "wo", "act", inner_dropout="dropout"),  # T5
)


def feed_forward_layout(module: nn.Module) -> FeedForwardLayout | None:
    """The layout of an FFN module; None if it is not one that molora knows."""
    return next((layout for layout in FEED_FORWARD_LAYOUTS if layout.fits(module)), None)


@dataclass(frozen=True)
class Layer:
    """Position in a stack of layers."""

    stack: str
    index: int
    depth: int
    """Number of layers of the stack."""

    @property
    def path(self) -> str:
        return f"{self.stack}.{self.index}"


def layer_of(model: nn.Module, path: str) -> Layer | None:
    """The layer that the module at `path` belongs to: the outermost nn.ModuleList on its path.

    None outside.
    """
    parts = path.split(".")
    for i, part in enumerate(parts[:-1]):
        if part.isdigit():
            stack = ".".join(parts[:i])
            modules = model.get_submodule(stack)
            if isinstance(modules, nn.ModuleList):
                return Layer(stack, int(part), len(modules))
    return None


def is_attention(path: str) -> bool:
    """Whether a component of the path names an attention block."""
    return any("attn" in part or "attention" in part for part in path.lower().split("."))


def in_out_features(module: nn.Module) -> tuple[int, int]:
    """Sizes read from attributes: under ZeRO-3 `weight.shape` is (0,)."""
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    features: Any = module
    return int(features.in_features), int(features.out_features)


def plain_linear(module: nn.Module) -> str | None:
    """ "linear" or "conv1d" for a linear that is its product with a weight and nothing else.

    None for subclasses, quantised weights and forwards that a library took over.
    """
    kinds: dict[type[nn.Module], str] = {nn.Linear: "linear", Conv1D: "conv1d"}
    whole = type(module.weight) is nn.Parameter and "forward" not in module.__dict__
    return kinds.get(type(module)) if whole else None


def hidden_size(model: nn.Module) -> int:
    """Features of the final hidden state.

    Raises:
        AttachError: a model whose configuration does not say it.
    """
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    size = getattr(text, "hidden_size", None) or getattr(text, "n_embd", None)
    if not isinstance(size, int):
        raise AttachError(
            f"{type(model).__name__} has no config.hidden_size, so that the width of its final "
            "hidden state is unknown. Use a router that reads each linear's input."
        )
    return size


def block_in_features(block: nn.Module) -> int:
    """Features of the input of an attention block, an FFN block or a layer.

    Those of its first linear that does not lead out of it, since some families register the
    output projection first.
    """
    linears = [(n, m) for n, m in block.named_modules() if isinstance(m, LINEAR_TYPES)]
    inner = [m for name, m in linears if name.rpartition(".")[2] not in OUTPUT_NAMES]
    return in_out_features(inner[0] if inner else linears[0][1])[0]


def stream_of(model: nn.Module, path: str) -> str:
    """Whose padding mask the input of a linear follows.

    "input", or "encoder" or "decoder" of a model that has both.
    """
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return "input"
    parts = path.split(".")
    if "decoder" not in parts:
        return "encoder"
    return "encoder" if is_cross_attention_memory(path) else "decoder"


def is_cross_attention_memory(path: str) -> bool:
    """Whether the linear makes cross-attention's keys or values from the encoder's output."""
    *parents, name = path.split(".")
    crosses = any(part in ("EncDecAttention", "encoder_attn", "crossattention") for part in parents)
    return crosses and name in ("k", "v", "k_proj", "v_proj", "key", "value")
