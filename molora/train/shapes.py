"""The sizes of a decoder and of the mixture on it, which memory and traffic are computed from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Decoder:
    """A Llama-like decoder: RMSNorm, rotary grouped-query attention, gated FFN, no biases."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    head_dim: int | None = None
    """`hidden` / `heads` if not given."""
    tied: bool = False
    """Whether the head's weight is that of the embeddings."""

    @property
    def attention(self) -> int:
        """Width of all queries."""
        return self.heads * (self.head_dim or self.hidden // self.heads)

    @property
    def kv(self) -> int:
        """Width of all keys, and of all values."""
        return self.attention // self.heads * self.kv_heads

    def linears(self) -> dict[str, tuple[int, int]]:
        """Projection of a layer → (in, out), in the order of the forward."""
        return {
            "q_proj": (self.hidden, self.attention),
            "k_proj": (self.hidden, self.kv),
            "v_proj": (self.hidden, self.kv),
            "o_proj": (self.attention, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }

    def weights(self) -> Iterator[int]:
        """Elements of every tensor."""
        yield self.vocab * self.hidden
        if not self.tied:
            yield self.vocab * self.hidden
        yield self.hidden
        for _ in range(self.layers):
            yield from (inputs * outputs for inputs, outputs in self.linears().values())
            yield from (self.hidden, self.hidden)


@dataclass(frozen=True)
class Experts:
    """A router and equal experts at every linear of every layer, top-k renormalised, as in MoLA."""

    num_experts: int
    rank: int
    top_k: int = 2
    dropout: bool = False

    def weights(self, decoder: Decoder) -> Iterator[int]:
        """Elements of every tensor: A, B and the router of each linear."""
        for _ in range(decoder.layers):
            for inputs, outputs in decoder.linears().values():
                yield self.num_experts * self.rank * inputs
                yield self.num_experts * self.rank * outputs
                yield self.num_experts * inputs


@dataclass(frozen=True)
class Tensors:
    """Sizes of a model's tensors, frozen and trained."""

    frozen: tuple[int, ...]
    trained: tuple[int, ...]
    frozen_itemsize: int = 2
    """Bytes an element: 2 is bfloat16."""
    trained_itemsize: int = 4

    @property
    def frozen_bytes(self) -> int:
        return sum(self.frozen) * self.frozen_itemsize

    @property
    def trained_bytes(self) -> int:
        return sum(self.trained) * self.trained_itemsize


def tensors(decoder: Decoder, experts: Experts, *, frozen_itemsize: int = 2) -> Tensors:
    """What a decoder with a mixture consists of."""
    return Tensors(
        tuple(decoder.weights()), tuple(experts.weights(decoder)), frozen_itemsize=frozen_itemsize
    )
