"""Formulas of memory and traffic: against models, against autograd, and against hand counts.

What engines really hold and send is compared in tests/benchmarks/test_scaling.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import molora
from molora.train import activations
from molora.train.activations import Batch
from molora.train.footprint import footprint, gathered_bytes, whole_bytes
from molora.train.shapes import Decoder, Experts, Tensors, tensors
from molora.train.traffic import Fetches, fetched, ideal, traffic

# in ≠ out everywhere, fewer keys than queries, E ≠ R
DECODER = Decoder(48, 112, layers=3, heads=6, kv_heads=2, vocab=80, head_dim=12)
EXPERTS = Experts(num_experts=5, rank=3)
ZERO: dict[str, Any] = {
    "stage": 3,
    "reduce_bucket_size": 1000,
    "stage3_param_persistence_threshold": 0,
    "stage3_max_reuse_distance": 10**9,
    "stage3_max_live_parameters": 10**9,
    "stage3_prefetch_bucket_size": 10**8,
}
# F = 2 · 600 bytes, G = 4 · 100
TENSORS = Tensors(frozen=(500, 100), trained=(60, 40))


def adapted(
    decoder: Decoder = DECODER, experts: Experts = EXPERTS, *, dtype: torch.dtype = torch.bfloat16
) -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=decoder.hidden,
        intermediate_size=decoder.intermediate,
        num_hidden_layers=decoder.layers,
        num_attention_heads=decoder.heads,
        num_key_value_heads=decoder.kv_heads,
        vocab_size=decoder.vocab,
        head_dim=decoder.head_dim or decoder.hidden // decoder.heads,
        tie_word_embeddings=decoder.tied,
    )
    model = LlamaForCausalLM(config).to(dtype).train()
    mola = molora.presets.mola(
        num_experts=experts.num_experts,
        rank=experts.rank,
        top_k=experts.top_k,
        dropout=0.1 if experts.dropout else 0.0,
        losses=(),
        backend="dense",
    )
    molora.attach(model, mola)
    return model


@pytest.mark.parametrize("tied", [False, True])
def test_sizes_are_those_of_the_model(tied: bool) -> None:
    decoder = Decoder(**{**vars(DECODER), "tied": tied})
    with torch.device("meta"):
        model = adapted(decoder)
    sizes = tensors(decoder, EXPERTS)
    frozen = [p.numel() for p in model.parameters() if not p.requires_grad]
    trained = [p.numel() for p in model.parameters() if p.requires_grad]
    assert sorted(sizes.frozen) == sorted(frozen)
    assert sorted(sizes.trained) == sorted(trained)
    assert sizes.frozen_bytes == 2 * sum(frozen)
    assert sizes.trained_bytes == 4 * sum(trained)


def saved_by_autograd(model: LlamaForCausalLM, batch: Batch) -> int:
    """Bytes of distinct storages, parameters left out."""
    ids_BS = torch.randint(0, DECODER.vocab, (batch.rows, batch.length))
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    found: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = model(input_ids=ids_BS, labels=ids_BS, use_cache=False)
    assert out.loss.requires_grad
    return sum(found.values())


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("dropout", [False, True], ids=["", "dropout"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_saved_activations_are_counted_to_the_byte(
    dtype: torch.dtype, dropout: bool, checkpointing: bool
) -> None:
    experts = Experts(num_experts=5, rank=3, dropout=dropout)
    model = adapted(experts=experts, dtype=dtype)
    if checkpointing:
        model.activation_checkpointing_enable(
            {"use_reentrant": False, "context_fn": molora.checkpoint_context}
        )
    batch = Batch(rows=2, length=17, itemsize=dtype.itemsize)
    expected = activations.saved(DECODER, experts, batch, checkpointing=checkpointing)
    assert saved_by_autograd(model, batch) == expected
    # seen to tell sizes apart
    wider = Experts(num_experts=5, rank=4, dropout=dropout)
    other = activations.saved(DECODER, wider, batch, checkpointing=checkpointing)
    assert (other == expected) is checkpointing


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_peak_holds_what_is_saved_and_the_logits_gradient(checkpointing: bool) -> None:
    batch = Batch(rows=2, length=17)
    saved = activations.saved(DECODER, EXPERTS, batch, checkpointing=checkpointing)
    peak = activations.peak(DECODER, EXPERTS, batch, checkpointing=checkpointing)
    assert peak >= saved + 2 * 4 * batch.tokens * DECODER.vocab
    # a large vocabulary hides the recomputed layer
    words = Decoder(**{**vars(DECODER), "vocab": 10**6})
    saved = activations.saved(words, EXPERTS, batch, checkpointing=checkpointing)
    peak = activations.peak(words, EXPERTS, batch, checkpointing=checkpointing)
    assert peak == saved + 2 * 4 * batch.tokens * words.vocab


@pytest.mark.parametrize(
    ("zero", "processes", "expected"),
    [
        # weights, trainables, gradients, moments, buffers, in passing
        (None, 1, (1200, 400, 400, 800, 0, 0)),
        (None, 4, (1200, 400, 400, 800, 400, 0)),
        ({"stage": 0}, 4, (1200, 400, 400, 800, 400, 0)),
        ({**ZERO, "stage": 1}, 4, (1200, 500, 100, 200, 0, 4400)),
        ({**ZERO, "stage": 2}, 4, (1200, 500, 100, 200, 0, 4400)),
        ({**ZERO, "stage": 2, "reduce_bucket_size": 15}, 4, (1200, 500, 100, 200, 0, 120)),
        # the update's copy of the share
        ({**ZERO, "stage": 2, "reduce_bucket_size": 1}, 4, (1200, 500, 100, 200, 0, 100)),
        # all is gathered at once, 1600, and arrives as so much more
        (ZERO, 4, (300, 200, 100, 200, 4000, 3200)),
    ],
    ids=["one", "ddp", "zero0", "zero1", "zero2", "zero2_bucket", "zero2_share", "zero3"],
)
def test_footprint_of_an_engine(
    zero: dict[str, Any] | None, processes: int, expected: tuple[int, ...]
) -> None:
    held = footprint(TENSORS, processes=processes, zero=zero)
    found = (held.weights, held.trainables, held.gradients, held.moments, held.buffers)
    assert (*found, held.transient) == expected
    assert held.host == 0
    assert held.held == sum(expected[:5])
    assert held.peak == sum(expected)


def test_offload_leaves_the_bucket_and_what_is_gathered_to_the_device() -> None:
    offload = {"device": "cpu"}
    zero = {**ZERO, "offload_param": offload, "offload_optimizer": offload}
    held = footprint(TENSORS, processes=4, zero=zero)
    assert held.held == 4000
    assert held.transient == 3200
    # F/n, and the share's values, copy, gradients twice and moments
    assert held.host == 300 + 6 * 100


def test_small_tensors_are_whole_under_zero3() -> None:
    zero = {**ZERO, "stage3_param_persistence_threshold": 100}
    assert whole_bytes(TENSORS, zero) == 2 * 100 + 4 * (60 + 40)
    assert footprint(TENSORS, processes=4, zero=zero).weights == 300 + 600
    assert gathered_bytes(TENSORS, zero) == 2 * 500
    assert whole_bytes(TENSORS, ZERO) == 0


@pytest.mark.parametrize(
    ("zero", "sums", "expected"),
    [
        (None, 3, 600),
        ({**ZERO, "stage": 1}, 3, 600 + 300),
        ({**ZERO, "stage": 2}, 3, 3 * 600 + 300),
        ({**ZERO, "stage": 2}, 1, 600 + 300),
        ({**ZERO, "stage": 2, "use_multi_rank_bucket_allreduce": False}, 1, 300 + 300),
        # gradients to their owners, and what is fetched: 7 · 2 + 5 · 4 bytes, of it 3/4
        (ZERO, 1, 300 + 0.75 * 34),
        (ZERO, 3, 3 * (300 + 0.75 * 34)),
    ],
    ids=["ddp", "zero1", "zero2", "zero2_one", "zero2_owners", "zero3_one", "zero3"],
)
def test_traffic_of_an_engine(zero: dict[str, Any] | None, sums: int, expected: float) -> None:
    fetches = Fetches(frozen=7, trained=5)
    sent = traffic(TENSORS, processes=4, zero=zero, accumulation=sums, fetches=fetches)
    assert sent.total == expected
    assert ideal(TENSORS, processes=4) == 600
    assert traffic(TENSORS, processes=1, zero=zero, accumulation=sums, fetches=fetches).total == 0


LAYERS = sum(inputs * outputs for inputs, outputs in DECODER.linears().values()) * DECODER.layers
EMBEDDINGS = DECODER.vocab * DECODER.hidden
ROUTED = sum(EXPERTS.weights(DECODER))
TIGHT = {**ZERO, "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}


@pytest.mark.parametrize(
    ("zero", "checkpointing", "expected"),
    [
        # everything stays: once
        (ZERO, False, (LAYERS + 2 * EMBEDDINGS, ROUTED)),
        # layers and head in both passes, the embeddings in the first
        (TIGHT, False, (2 * LAYERS + 3 * EMBEDDINGS, 2 * ROUTED)),
        # layers once more
        (TIGHT, True, (3 * LAYERS + 3 * EMBEDDINGS, 3 * ROUTED)),
    ],
    ids=["all_stay", "none_stays", "checkpointing"],
)
def test_what_zero3_fetches(
    zero: dict[str, Any], checkpointing: bool, expected: tuple[int, int]
) -> None:
    found = fetched(DECODER, EXPERTS, zero=zero, checkpointing=checkpointing)
    assert (found.frozen, found.trained) == expected


def test_what_is_used_again_soon_is_fetched_once() -> None:
    # at the turn there lie the head, twice, and on both sides of it what is kept
    distances = [0, 2 * EMBEDDINGS + 10_000, 2 * EMBEDDINGS + 40_000, 10**9]
    found = [
        fetched(DECODER, EXPERTS, zero={**TIGHT, "stage3_max_reuse_distance": distance})
        for distance in distances
    ]
    frozen = [fetches.frozen for fetches in found]
    assert frozen == sorted(frozen, reverse=True)
    assert len(set(frozen)) == len(frozen)
    # frozen weights that a recomputation fetched do not stay, however near
    recomputed = fetched(DECODER, EXPERTS, zero=ZERO, checkpointing=True)
    assert recomputed.trained == ROUTED
    last = DECODER.intermediate * DECODER.hidden * DECODER.layers
    assert recomputed.frozen == 2 * LAYERS - last + 2 * EMBEDDINGS
