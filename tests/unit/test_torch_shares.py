"""TensorBatches on several ranks: equal shares of every epoch that together are all of it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from orchestra.errors import UsageError
from orchestra.torch import TensorBatches


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(9)


def rows_of(batches: TensorBatches) -> list[list[int]]:
    """The rows of an epoch by batch."""
    return [batch[0].reshape(-1).to(torch.int64).tolist() for batch in batches]


def sources(tmp_path: Path, rows: int) -> dict[str, tuple[Any, dict[str, Any]]]:
    """A table of one column that counts, in memory and as row groups of seven."""
    pyarrow.parquet.write_table(pyarrow.table({"x": list(range(rows))}), tmp_path / "t.parquet", row_group_size=7)
    return {"held": (torch.arange(rows), {}), "streamed": (tmp_path / "t.parquet", {"buffer_rows": 20})}


@pytest.mark.parametrize("rows", [1, 5, 24, 101])
@pytest.mark.parametrize("world_size", [2, 3, 8])
@pytest.mark.parametrize("drop_last", [False, True])
def test_unshuffled_they_are_distributed_samplers(rows: int, world_size: int, drop_last: bool) -> None:
    """The same batches as DataLoader with a DistributedSampler, on every rank."""
    table = torch.arange(rows)
    for rank in range(world_size):
        ours = TensorBatches(table, batch_size=4, rank=rank, world_size=world_size, drop_last=drop_last)
        sampler: Any = DistributedSampler(TensorDataset(table), world_size, rank, shuffle=False, drop_last=drop_last)
        theirs = DataLoader(TensorDataset(table), batch_size=4, sampler=sampler, drop_last=drop_last)
        assert rows_of(ours) == [batch[0].tolist() for batch in theirs]
        assert len(ours) == len(list(ours))


@pytest.mark.parametrize("kind", ["held", "streamed"])
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("rows", [0, 2, 96, 101])
def test_together_the_ranks_have_every_row_and_alone_as_many_as_any(
    tmp_path: Path, kind: str, shuffle: bool, drop_last: bool, rows: int
) -> None:
    """Three epochs of three ranks: as many batches and rows each, no row missing but by `drop_last`, none twice but
    where they do not divide, and another order every epoch."""
    source, options = sources(tmp_path, rows)[kind]
    made = [
        TensorBatches(
            source,
            batch_size=1 if drop_last else 4,
            shuffle=shuffle,
            generator=generator(),
            drop_last=drop_last,
            rank=rank,
            world_size=3,
            **options,
        )
        for rank in range(3)
    ]
    orders = []
    for _ in range(3):
        shares = [rows_of(one) for one in made]
        assert len({tuple(map(len, share)) for share in shares}) == 1
        assert [len(share) for share in shares] == [len(one) for one in made]
        counts = Counter(row for share in shares for batch in share for row in batch)
        missing, extra = rows - len(counts), counts.total() - len(counts)
        assert missing == (rows % 3 if drop_last else 0)
        assert extra == (0 if drop_last else -rows % 3)
        orders.append(shares)
    if shuffle and rows > 50:
        assert orders[0] != orders[1] != orders[2]


def test_a_streamed_rank_reads_its_share_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of fifteen row groups each of three ranks reads the five it needs, and one at each end that it shares."""
    source, options = sources(tmp_path, 105)["streamed"]
    read: list[int] = []
    original = pyarrow.parquet.ParquetFile.read_row_group

    def counted(self: Any, index: int, **arguments: Any) -> Any:
        read.append(index)
        return original(self, index, **arguments)

    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "read_row_group", counted)
    for rank in range(3):
        read.clear()
        rows_of(TensorBatches(source, shuffle=True, generator=generator(), rank=rank, world_size=3, **options))
        assert len(read) == 5


def test_nonsense_is_refused() -> None:
    """A rank that there is not, no rank at all, and shuffling that would differ by rank."""
    table = torch.arange(4)
    with pytest.raises(UsageError, match="rank: expected 0 to 1, got 2"):
        TensorBatches(table, rank=2, world_size=2)
    with pytest.raises(UsageError, match="world_size: expected at least 1"):
        TensorBatches(table, world_size=0)
    with pytest.raises(UsageError, match="seeded alike"):
        TensorBatches(table, shuffle=True, rank=0, world_size=2)
