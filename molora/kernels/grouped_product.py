"""Products of rows that are sorted by group with their group's matrix.

`torch.nn.functional.grouped_mm` with what it asks of its caller: rows, columns and addresses of a
multiple of 16 bytes (padded or copied here), nothing expanded, as the gradient of a sum is (copied
too), and no float64, which is computed from one matrix per row: slow, but in the memory of the
result. It waits for no device but a GPU, and there not in bfloat16 from compute capability 9 on.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm, pad

from molora.errors import BackendError


def grouped_product(rows_NI: Tensor, weights_GIO: Tensor, offsets_G: Tensor) -> Tensor:
    """(N, O): each row times the matrix of its group.

    Args:
        rows_NI: rows sorted by group.
        weights_GIO: a matrix per group; fastest where the longer of its sides is contiguous.
        offsets_G: where each group ends, int32; the last is N.

    Raises:
        BackendError: torch.compile in a dtype whose shapes torch cannot foretell.
    """
    if rows_NI.dtype == torch.float64:
        weights_NIO = weights_GIO.index_select(0, _group_of_row(rows_NI, offsets_G))
        return torch.bmm(rows_NI[:, None], weights_NIO)[:, 0]
    _check_compilable(rows_NI.dtype)
    width = weights_GIO.shape[2]
    rows_NI, weights_GIO = _padded(rows_NI, dims=1), _padded(weights_GIO, dims=2)
    return grouped_mm(rows_NI, weights_GIO, offs=offsets_G)[:, :width]


def grouped_outer(left_NI: Tensor, right_NO: Tensor, offsets_G: Tensor) -> Tensor:
    """(G, I, O): the sum over each group's rows of left ⊗ right; 0 of a group without rows.

    Sorting and errors are those of `grouped_product`; fastest where O > I.
    """
    inner, outer = left_NI.shape[1], right_NO.shape[1]
    if left_NI.dtype == torch.float64:
        outer_NIO = left_NI[:, :, None] * right_NO[:, None, :]
        zeros_GIO = left_NI.new_zeros(len(offsets_G), inner, outer)
        return zeros_GIO.index_add_(0, _group_of_row(left_NI, offsets_G), outer_NIO)
    left_NI, right_NO = _padded(left_NI, dims=1), _padded(right_NO, dims=1)
    return grouped_mm(left_NI.T, right_NO, offs=offsets_G)[:, :inner, :outer]


def _check_compilable(dtype: torch.dtype) -> None:
    if torch.compiler.is_compiling() and dtype != torch.bfloat16:
        raise BackendError(
            f"torch.compile cannot trace grouped_mm in {dtype}, only in torch.bfloat16. Under "
            "torch.compile choose backend='dense', whose graph serves every routing, or run the "
            "base in bfloat16."
        )


def _padded(tensor: Tensor, *, dims: int) -> Tensor:
    """The last `dims` dimensions padded with 0 to whole 16 bytes; no copy where nothing is."""
    multiple = 16 // tensor.element_size()
    amounts = [part for d in range(dims) for part in (0, -tensor.shape[-1 - d] % multiple)]
    if any(amounts):
        return pad(tensor, amounts)
    tensor = tensor.contiguous() if tensor.dim() == 2 else tensor
    # a parameter may start anywhere in a buffer that it shares with others
    return tensor.clone() if tensor.storage_offset() % multiple else tensor


def _group_of_row(rows_NI: Tensor, offsets_G: Tensor) -> Tensor:
    positions_N = torch.arange(len(rows_NI), device=rows_NI.device, dtype=torch.int32)
    return torch.searchsorted(offsets_G, positions_N, right=True)
