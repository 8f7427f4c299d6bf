"""Bytes that autograd keeps between forward and backward of a decoder with a mixture: formulas.

They add up what the forwards of transformers' Llama (5.23, attention "sdpa", no padding, a loss
from logits) and of molora's kernel `dense` save, and equal what saved_tensors_hooks sees; held by
tests/train/test_memory_formulas.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from molora.train.shapes import Decoder, Experts

_FLOAT, _INDEX = 4, 8


@dataclass(frozen=True)
class Batch:
    """What one process computes at a time.

    Attributes:
        rows, length: of the batch, padding included.
        itemsize: bytes of an element of the base and of its activations; 2 is bfloat16.
    """

    rows: int
    length: int
    itemsize: int = 2

    @property
    def tokens(self) -> int:
        return self.rows * self.length


def saved(decoder: Decoder, experts: Experts, batch: Batch, *, checkpointing: bool = False) -> int:
    """What one forward leaves for its backward, parameters not counted."""
    head = batch.tokens * (decoder.vocab * _FLOAT + _INDEX) + _FLOAT
    if checkpointing:
        inputs = decoder.layers * batch.tokens * decoder.hidden * batch.itemsize
        return inputs + _norm(decoder, batch) + head
    # a cosine and a sine for every place and dimension of a head
    rotary = 2 * batch.length * (decoder.attention // decoder.heads) * batch.itemsize
    # the embeddings need no gradient: the first norm saves nothing, where the last one does
    return decoder.layers * layer(decoder, experts, batch) + rotary + head


def layer(decoder: Decoder, experts: Experts, batch: Batch) -> int:
    """What one layer saves, or holds while it is recomputed."""
    tokens, itemsize = batch.tokens, batch.itemsize
    attention = tokens * (
        # its input; queries and result; keys and values; the logarithm of each sum of scores
        (decoder.hidden + 2 * decoder.attention + 2 * decoder.kv) * itemsize
        + decoder.heads * _FLOAT
    )
    # its input; gate, its activation, up, their product
    ffn = tokens * (decoder.hidden + 4 * decoder.intermediate) * itemsize
    mixtures = sum(
        mixture(experts, batch, in_features=inputs) for inputs, _ in decoder.linears().values()
    )
    return 2 * _norm(decoder, batch) + attention + ffn + mixtures


def mixture(experts: Experts, batch: Batch, *, in_features: int) -> int:
    """What the mixture of one linear saves beside the linear's input.

    The router's softmax, top-k and its renormalisation, gates of all experts, and A x.
    """
    num_experts, k = experts.num_experts, experts.top_k
    routing = 2 * num_experts * _FLOAT + k * (_INDEX + _FLOAT) + 2 * _FLOAT
    intermediate = num_experts * experts.rank * batch.itemsize
    # a bool of each element
    dropped = in_features if experts.dropout else 0
    scaling = num_experts * _FLOAT
    return batch.tokens * (routing + intermediate + dropped) + scaling


def peak(decoder: Decoder, experts: Experts, batch: Batch, *, checkpointing: bool = False) -> int:
    """The most that forward and backward hold at a time, weights and gradients of trainables left
    out: at the loss, or in the last layer's backward where layers are recomputed.

    Two tensors of the size of the logits in float32 come beside those that are saved: a gradient,
    and what it becomes. The layer's own is exact to some per cent.
    """
    kept = saved(decoder, experts, batch, checkpointing=checkpointing)
    logits = batch.tokens * decoder.vocab * _FLOAT
    at_loss = kept + 2 * logits
    recomputed = layer(decoder, experts, batch) if checkpointing else 0
    return max(at_loss, kept - logits + recomputed + _working(decoder, batch))


def _working(decoder: Decoder, batch: Batch) -> int:
    """Of the backward pass of the FFN's down projection, the widest: the gradient of its input, and
    the router's part of it in float32."""
    part = 0 if batch.itemsize == _FLOAT else _FLOAT
    wide = decoder.intermediate * (batch.itemsize + part)
    return batch.tokens * (wide + 2 * decoder.hidden * batch.itemsize)


def _norm(decoder: Decoder, batch: Batch) -> int:
    """RMSNorm computes in float32, and saves its input as such and a factor of each row."""
    return batch.tokens * (decoder.hidden + 1) * _FLOAT
