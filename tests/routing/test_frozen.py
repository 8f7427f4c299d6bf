"""Routers of which nothing is trained: dense formulas, few and many rows, gradients, types."""

from __future__ import annotations

import pytest
import torch

from molora.routing import LinearRouter, frozen
from molora.routing.frozen import FixedRouter, UpdateNormRouter

EXPERTS, RANK, IN = 9, 3, 7


def factors() -> tuple[torch.Tensor, torch.Tensor]:
    source = torch.Generator().manual_seed(1)
    factor_ERD = torch.randn(EXPERTS, RANK, IN, generator=source)
    return factor_ERD, torch.randn(EXPERTS, IN, generator=source)


@pytest.fixture(params=[0, 10**9], ids=["rows sorted", "all experts"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to the norms of preselected experts."""
    monkeypatch.setattr(frozen, "SORTING_PAYS", request.param)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("rows", [1, 50])
@pytest.mark.parametrize("preselect", [1, 4, 9, 30])
@pytest.mark.parametrize("absent", [(), (2, 5)])
def test_preselected_experts_have_the_same_norms_and_the_others_none(
    rows: int, preselect: int, absent: tuple[int, ...]
) -> None:
    factor_ERD, weight_ED = factors()
    weight_ED[list(absent)] = 0
    router = UpdateNormRouter(factor_ERD, weight_ED, temperature=0.7, preselect=preselect)
    present_E = torch.tensor([e not in absent for e in range(EXPERTS)])
    if absent:
        router.register_buffer("present", present_E)
    x_TD = torch.randn(rows, IN)
    norms_TE = torch.einsum("erd,td->ter", factor_ERD, x_TD).norm(dim=-1) / 0.7
    near_TE = (x_TD @ weight_ED.T).abs().masked_fill(~present_E, -1)
    chosen_TE = torch.zeros_like(near_TE, dtype=torch.bool)
    chosen_TE.scatter_(1, near_TE.topk(min(preselect, EXPERTS), dim=-1).indices, True)
    expected_TE = norms_TE.masked_fill(~chosen_TE, -torch.inf)
    torch.testing.assert_close(router(x_TD), expected_TE, rtol=1e-5, atol=1e-5)
    every = UpdateNormRouter(factor_ERD, temperature=0.7)
    torch.testing.assert_close(every(x_TD), norms_TE, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("preselect", [None, 4])
def test_gradients_go_through_to_the_input(preselect: int | None) -> None:
    factor_ERD, weight_ED = factors()
    weights = None if preselect is None else weight_ED
    router = UpdateNormRouter(factor_ERD, weights, preselect=preselect)
    x_TD = torch.randn(20, IN, requires_grad=True)
    logits_TE = router(x_TD)
    kept = logits_TE.isfinite()
    found = torch.autograd.grad((logits_TE * torch.arange(9.0)).masked_fill(~kept, 0).sum(), x_TD)
    norms_TE = torch.einsum("erd,td->ter", factor_ERD, x_TD).norm(dim=-1)
    expected = torch.autograd.grad(((norms_TE * torch.arange(9.0)) * kept).sum(), x_TD)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert all(not p.requires_grad for p in router.parameters())
    zero = torch.zeros(2, IN, requires_grad=True)
    slope = torch.autograd.grad(router(zero).softmax(dim=-1).square().sum(), zero)[0]
    assert slope.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_logits_are_of_float32_at_least_and_factors_keep_their_type(dtype: torch.dtype) -> None:
    factor_ERD, weight_ED = factors()
    x_TD = torch.randn(5, IN)
    for router in (
        UpdateNormRouter(factor_ERD),
        UpdateNormRouter(factor_ERD, weight_ED, preselect=4),
        FixedRouter(torch.tensor([0.5, -1.0, 0.1])),
    ):
        expected = router(x_TD.to(dtype).float())
        moved = router.to(dtype)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = moved(x_TD.to(dtype))
        assert found.dtype in (torch.float32, torch.float64)
        torch.testing.assert_close(found.float(), expected, rtol=1e-5, atol=1e-5)
        assert not router.trainable
        assert {t.dtype for t in moved.state_dict().values()} <= {torch.float32}


def test_what_a_linear_router_reads() -> None:
    weight_ED = torch.randn(4, IN)
    x_TD = torch.randn(6, IN) * 3 + 1
    centred = x_TD - x_TD.mean(dim=1, keepdim=True)
    read = {
        "as it is": x_TD,
        "layer_norm": centred / (centred.square().mean(dim=1, keepdim=True) + 1e-5).sqrt(),
        "unit": x_TD / x_TD.norm(dim=1, keepdim=True),
    }
    for reads, expected in read.items():
        for absolute in (False, True):
            router = LinearRouter(
                weight_ED, temperature=0.5, reads=reads, absolute=absolute, trainable=False
            )
            logits_TE = expected @ weight_ED.T / 0.5
            logits_TE = logits_TE.abs() if absolute else logits_TE
            torch.testing.assert_close(router(x_TD), logits_TE, rtol=1e-4, atol=1e-5)
            assert router.is_product() == (reads == "as it is")
            assert not any(p.requires_grad for p in router.parameters())
