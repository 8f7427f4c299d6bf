"""A checkpoint gives back, bit for bit, what was written."""

from __future__ import annotations

from pathlib import Path

import torch

from molora import io


def test_a_checkpoint_reads_back(tmp_path: Path) -> None:
    directory = io.checkpoint_directory(tmp_path, 3)
    directory.mkdir()
    (directory / "molora.json").write_text("{}")
    tensors = {"a": torch.arange(5), "b": torch.rand(3, 2).bfloat16()}
    io.write_checkpoint(
        directory,
        step=3,
        world_size=2,
        stage=1,
        tensors=tensors,
        state={"global_step": 3},
        files=["molora.json"],
    )
    found, skipped = io.newest_complete(tmp_path)
    assert found is not None
    assert not skipped
    assert (found.step, found.world_size, found.stage) == (3, 2, 1)
    assert found.state == {"global_step": 3}
    read = found.tensors()
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
