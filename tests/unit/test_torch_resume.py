"""TensorBatches stop in the middle of an epoch and go on there."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch

from orchestra.errors import UsageError
from orchestra.torch import TensorBatches

ROWS = 103


def made(tmp_path: Path, kind: str, **options: Any) -> TensorBatches:
    if kind == "held":
        return TensorBatches(torch.arange(ROWS), batch_size=8, **options)
    pyarrow.parquet.write_table(pyarrow.table({"x": list(range(ROWS))}), tmp_path / "t.parquet", row_group_size=9)
    return TensorBatches(tmp_path / "t.parquet", batch_size=8, buffer_rows=30, **options)


def epoch(batches: TensorBatches) -> list[list[float]]:
    return [batch[0].reshape(-1).tolist() for batch in batches]


@pytest.mark.parametrize("kind", ["held", "streamed"])
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("taken", [0, 1, 5])
def test_the_rest_of_the_epoch_and_the_next_are_what_they_would_have_been(
    tmp_path: Path, kind: str, shuffle: bool, world_size: int, taken: int
) -> None:
    """Also through a checkpoint file, and in a loader whose generator stands elsewhere; a stop at once changes
    nothing."""
    options: dict[str, Any] = {"shuffle": shuffle, "rank": world_size - 1, "world_size": world_size}
    whole = made(tmp_path, kind, generator=torch.Generator().manual_seed(4), **options)
    wanted = [epoch(whole) for _ in range(3)]

    stopped = made(tmp_path, kind, generator=torch.Generator().manual_seed(4), **options)
    assert epoch(stopped) == wanted[0]
    running = iter(stopped)
    for _ in range(taken):
        next(running)
    file = io.BytesIO()
    torch.save(stopped.state_dict(), file)
    file.seek(0)

    resumed = made(tmp_path, kind, generator=torch.Generator().manual_seed(99), **options)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert resumed.state_dict()["batches"] == taken
    assert epoch(resumed) == wanted[1][taken:]
    assert epoch(resumed) == wanted[2]


def test_an_epoch_that_was_broken_off_begins_anew(tmp_path: Path) -> None:
    """Leaving a loop in the middle is no resumption."""
    batches = made(tmp_path, "held")
    for _ in batches:
        break
    assert epoch(batches) == epoch(made(tmp_path, "held"))


def test_a_state_of_something_else_is_refused(tmp_path: Path) -> None:
    """By what differs; and a shuffle that cannot be drawn again has no state."""
    batches = made(tmp_path, "held")
    state = batches.state_dict()
    with pytest.raises(UsageError, match="taken with batch_size 8, here it is 4"):
        TensorBatches(torch.arange(ROWS), batch_size=4).load_state_dict(state)
    with pytest.raises(UsageError, match="taken with rows 103, here it is 5"):
        TensorBatches(torch.arange(5), batch_size=8).load_state_dict(state)
    with pytest.raises(UsageError, match="give a generator="):
        made(tmp_path, "held", shuffle=True).state_dict()
