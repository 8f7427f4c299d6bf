"""Singular values of B A from the factors, against dense algebra in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from molora.compose.lowrank import inner_products, low_rank_svd, prototype, spectral_factor
from molora.io.peft_adapter import AdapterModule


def factors(*batch: int, R: int, D: int, F: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(seed)
    lora_A_RD = torch.randn(*batch, R, D, generator=source, dtype=torch.float64)
    lora_B_FR = torch.randn(*batch, F, R, generator=source, dtype=torch.float64)
    return lora_A_RD, lora_B_FR


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-12) -> bool:
    return bool((found - expected).norm() <= tolerance * expected.norm())


@settings(max_examples=60, deadline=None)
@given(
    R=st.integers(1, 9), D=st.integers(1, 12), F=st.integers(1, 12), seed=st.integers(0, 9),
    scaling=st.floats(0.1, 10) | st.floats(-10, -0.1),
)  # fmt: skip
def test_the_decomposition_is_that_of_the_dense_update(
    R: int, D: int, F: int, seed: int, scaling: float
) -> None:
    lora_A, lora_B = factors(R=R, D=D, F=F, seed=seed)
    dense = scaling * lora_B @ lora_A
    svd = low_rank_svd(lora_A, lora_B, scaling)
    assert (svd.U.shape, svd.S.shape, svd.Vh.shape) == ((F, R), (R,), (R, D))
    assert close(svd.U @ torch.diag(svd.S) @ svd.Vh, dense)
    real = min(R, D, F)
    expected = torch.linalg.svdvals(dense)
    assert close(svd.S[:real], expected[:real])
    assert not svd.S[real:].any()
    assert not svd.Vh[real:].any()
    assert not svd.U[:, real:].any()
    identity = torch.eye(real, dtype=torch.float64)
    assert close(svd.U[:, :real].T @ svd.U[:, :real], identity)
    assert close(svd.Vh[:real] @ svd.Vh[:real].T, identity)
    assert (svd.S >= 0).all()
    assert (svd.S[:-1] >= svd.S[1:]).all()
    assert not close(svd.U @ torch.diag(svd.S * 1.01) @ svd.Vh, dense)


def test_batches_have_a_scaling_each() -> None:
    lora_A, lora_B = factors(3, 2, R=3, D=7, F=5)
    scaling = torch.tensor([[0.5, -2.0], [3.0, 0.0], [1.0, 4.0]])
    svd = low_rank_svd(lora_A, lora_B, scaling)
    for e in range(3):
        for m in range(2):
            one = low_rank_svd(lora_A[e, m], lora_B[e, m], float(scaling[e, m]))
            assert torch.equal(svd.S[e, m], one.S)
            assert close(svd.Vh[e, m], one.Vh)
            assert close(svd.U[e, m], one.U)
    assert not svd.S[1, 1].any()


@pytest.mark.parametrize("seed", range(5))
def test_signs_do_not_depend_on_how_the_update_is_factored(seed: int) -> None:
    lora_A, lora_B = factors(R=3, D=9, F=8, seed=seed)
    mixer = torch.tensor([[0.0, -2, 0], [1, 0, 0.5], [0, 0, -1]], dtype=torch.float64)
    one = low_rank_svd(lora_A, lora_B)
    other = low_rank_svd(mixer @ lora_A, lora_B @ torch.linalg.inv(mixer))
    assert close(other.Vh, one.Vh, 1e-10)
    assert close(other.U, one.U, 1e-10)
    largest = one.Vh.abs().argmax(dim=1)
    assert (one.Vh[torch.arange(3), largest] > 0).all()
    turned = low_rank_svd(lora_A, lora_B, -1.0)  # the right vectors stay, the left ones turn
    assert close(turned.Vh, one.Vh)
    assert close(turned.U, -one.U)


def test_updates_of_zero_are_finite() -> None:
    lora_A, lora_B = factors(2, R=3, D=6, F=5)
    lora_B[0] = 0
    lora_A[1] = 0
    svd = low_rank_svd(lora_A, lora_B, 2.0)
    assert not svd.S.any()
    assert svd.U.isfinite().all()
    assert svd.Vh.isfinite().all()
    assert close(prototype(svd).norm(dim=-1), torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_factors_are_decomposed_in_float32_or_as_asked(kind: torch.dtype) -> None:
    lora_A, lora_B = (factor.to(kind) for factor in factors(R=3, D=9, F=8))
    dense = lora_B.double() @ lora_A.double()
    single, double = low_rank_svd(lora_A, lora_B), low_rank_svd(lora_A, lora_B, dtype=torch.float64)
    assert single.S.dtype == torch.float32
    assert double.S.dtype == torch.float64
    assert close((single.U * single.S) @ single.Vh, dense.float(), 1e-6)
    assert close((double.U * double.S) @ double.Vh, dense, 1e-13)


def test_the_prototype_is_the_input_with_the_largest_output() -> None:
    lora_A, lora_B = factors(4, R=3, D=9, F=8)
    dense = lora_B @ lora_A
    svd = low_rank_svd(lora_A, lora_B, 0.5)
    vectors = prototype(svd)
    gains = (dense @ vectors[..., None]).norm(dim=(-2, -1))
    assert close(gains, torch.linalg.matrix_norm(dense, 2))
    reference = torch.linalg.svd(dense).Vh[:, 0]
    cosine = (vectors * reference).sum(-1).abs()
    assert close(cosine, torch.ones(4, dtype=torch.float64))
    other = (svd.Vh[:, 1] * reference).sum(-1).abs()  # the second vector is not it
    assert (other < 0.1).all()


def test_the_spectral_factor_keeps_the_norms_of_outputs() -> None:
    lora_A, lora_B = factors(4, R=3, D=9, F=8)
    x_DT = torch.randn(9, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    svd = low_rank_svd(lora_A, lora_B, 0.5)
    outputs = (0.5 * lora_B @ lora_A @ x_DT).norm(dim=-2)
    assert close((spectral_factor(svd) @ x_DT).norm(dim=-2), outputs)
    assert not close((svd.Vh @ x_DT).norm(dim=-2), outputs)


def test_inner_products_of_ragged_ranks_are_those_of_dense_updates() -> None:
    modules, dense = [], []
    for seed, (R, scaling) in enumerate([(1, 0.5), (4, 2.0), (13, -1.0), (2, 3.0)]):
        lora_A, lora_B = factors(R=R, D=9, F=7, seed=seed)
        modules.append(AdapterModule(lora_A.float(), lora_B.float(), scaling, 0.0))
        dense.append((scaling * lora_B.float().double() @ lora_A.float().double()).flatten())
    expected_EE = torch.stack(dense) @ torch.stack(dense).T
    found_EE = inner_products(modules)
    assert close(found_EE, expected_EE)
    assert torch.allclose(found_EE, found_EE.T)
    assert close(inner_products(modules, dtype=torch.float32), expected_EE.float(), 1e-5)
    modules[1] = AdapterModule(modules[1].lora_A, modules[1].lora_B, 1.0, 0.0)
    assert not close(inner_products(modules), expected_EE, 0.1)
