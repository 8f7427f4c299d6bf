"""Which rows are padding, and what a recomputation gets back."""

from functools import partial

import pytest
import torch
from torch import Tensor

from molora import AttachError, Routing
from molora.modules import ForwardContext, SideInputs

MASK_BS = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 0]]).bool()
ROUTING = Routing(None, torch.ones(1, 1), torch.ones(1, 1), torch.zeros(1, 1), torch.ones(1, 1))


@pytest.mark.parametrize(
    ("grid", "expected"),
    [
        pytest.param((2, 4), [0, 1, 1, 1, 1, 1, 1, 0], id="whole"),
        pytest.param((2, 1), [1, 0], id="last_position_under_a_cache"),
        pytest.param((2, 3), [1, 1, 1, 1, 1, 0], id="last_positions_under_a_cache"),
        pytest.param((8,), [0, 1, 1, 1, 1, 1, 1, 0], id="flattened"),
        pytest.param((2,), None, id="one_row_per_sequence"),
    ],
)
def test_rows_of_a_mask(grid: tuple[int, ...], expected: list[int] | None) -> None:
    rows = SideInputs(masks={"input": MASK_BS}).rows("input", grid)
    assert rows is None if expected is None else rows is not None
    if rows is not None and expected is not None:
        assert torch.equal(rows, torch.tensor(expected).bool())


def test_each_stream_has_its_own_mask_and_without_one_every_row_counts() -> None:
    side = SideInputs(masks={"encoder": MASK_BS, "decoder": ~MASK_BS})
    assert torch.equal(_rows(side, "encoder"), MASK_BS.flatten())
    assert torch.equal(_rows(side, "decoder"), ~MASK_BS.flatten())
    assert side.rows("input", (2, 4)) is None


@pytest.mark.parametrize("grid", [(2, 5), (3, 4), (7,), (2, 2, 2)])
def test_rows_that_do_not_fit_the_mask_are_an_error(grid: tuple[int, ...]) -> None:
    with pytest.raises(AttachError, match=r"rows of shape .* do not fit .* shape \(2, 4\)"):
        SideInputs(masks={"input": MASK_BS}).rows("input", grid)


def test_a_mask_that_cannot_be_read_is_an_error_when_it_is_needed() -> None:
    side = SideInputs(unreadable="a 4-D tensor")
    with pytest.raises(AttachError, match=r"attention_mask is a 4-D tensor.*Pass a"):
        side.rows("input", (2, 4))


def test_recomputing_brings_back_side_inputs_and_decisions_with_the_trace_closed() -> None:
    context = ForwardContext()
    context.trace = {}
    later = context.side, context.trace, context.decisions
    earlier = SideInputs(masks={"input": MASK_BS})

    def fail_in_a_layer() -> None:
        with context.recomputing(earlier, {"block": ROUTING}):
            assert context.side is earlier
            assert context.trace is None
            assert context.decisions == {"block": ROUTING}
            raise RuntimeError("in a layer")

    with pytest.raises(RuntimeError, match="in a layer"):
        fail_in_a_layer()
    assert (context.side, context.trace, context.decisions) == later


def _rows(side: SideInputs, stream: str) -> Tensor:
    rows = side.rows(stream, (2, 4))
    assert rows is not None
    return rows


SEGMENTS = torch.tensor([[1, 1, 2, 0], [3, 4, 4, 4]])


def test_packed_rows_know_their_sequence_and_where_it_begins() -> None:
    side = SideInputs(segments=SEGMENTS)
    expected = [True, False, True, True, True, True, False, False]
    for grid in ((2, 4), (8,)):
        assert side.segment_rows("input", grid).tolist() == SEGMENTS.flatten().tolist()
        assert side.starts("input", grid, SEGMENTS.device).tolist() == expected
    # rows of a base's own expert: whose they are is not known
    assert side.segment_rows("input", (5,)) is None
    with pytest.raises(AttachError, match=r"\(5,\) do not fit the packed batch of shape \(2, 4\)"):
        side.starts("input", (5,), SEGMENTS.device)


def test_rows_that_are_not_packed_begin_at_the_first_position_of_each() -> None:
    side = SideInputs()
    assert side.segment_rows("input", (2, 3)) is None
    starts = partial(side.starts, "input", device=SEGMENTS.device)
    assert starts((2, 3)).tolist() == [True, False, False] * 2
    assert starts((4,)).tolist() == [True, False, False, False]
    assert starts((2, 2, 2)).tolist() == [True, False, False, False] * 2
    assert starts((0,)).tolist() == []
