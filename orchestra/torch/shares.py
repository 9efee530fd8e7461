"""Which rows of an epoch are one rank's. Pure.

Owns: that arithmetic, DistributedSampler's. Leaves to others: the order of the epoch, reading the rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral

import torch

from orchestra.errors import UsageError


@dataclass(frozen=True, slots=True)
class Share:
    """One rank's part, as many rows as every other rank's. Rows that do not divide among the ranks: with `drop_last`
    the last are left out, else the first of the epoch come once more. Raises UsageError."""

    rank: int = 0
    world_size: int = 1
    drop_last: bool = False

    def __post_init__(self) -> None:
        for name, value in (("rank", self.rank), ("world_size", self.world_size)):
            if not isinstance(value, Integral):  # such as the text of an environment's variable
                raise UsageError(f"{name}: expected a whole number, got {value!r}")
        if self.world_size < 1:
            raise UsageError(f"world_size: expected at least 1, got {self.world_size}")
        if not 0 <= self.rank < self.world_size:
            raise UsageError(f"rank: expected 0 to {self.world_size - 1}, got {self.rank}")

    @property
    def is_whole(self) -> bool:
        """Whether there is only one rank."""
        return self.world_size == 1

    def row_count(self, rows: int) -> int:
        """How many of `rows` rows are the rank's."""
        return rows // self.world_size if self.drop_last else -(-rows // self.world_size)

    def given_count(self, rows: int, batch_size: int) -> int:
        """How many of them come in batches: all, or those of whole batches with `drop_last`."""
        count = self.row_count(rows)
        return count // batch_size * batch_size if self.drop_last else count

    def taken_from(self, order: torch.Tensor) -> torch.Tensor:
        """Return every `world_size`-th of the epoch's rows, from the `rank`-th on."""
        steps = torch.arange(self.row_count(len(order))) * self.world_size + self.rank
        return order[steps % max(1, len(order))]

    def span(self, rows: int) -> tuple[int, int]:
        """Return the run of the epoch's rows that is the rank's, where runs are shared out (row groups, which are read
        whole); past the end it goes on with the first."""
        count = self.row_count(rows)
        return self.rank * count, (self.rank + 1) * count
