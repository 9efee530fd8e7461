"""Orders of a data set's samples, epoch by epoch, as all ranks together go through them.

Owns: an order by seed, the order of somebody else's sampler, a rank's share. Leaves to others: publishing and resuming
(planned). An order is an array of 32-bit indexes: ten million samples take 40 MB.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from torch.utils.data import DistributedSampler, SequentialSampler

from orchestra.errors import UsageError

_INDEX_TYPE = "I"


class Orders(Protocol):
    """What a PlannedSampler follows."""

    @property
    def length(self) -> int:
        """Samples of an epoch, of all ranks together."""
        ...

    def of(self, epoch: int) -> array[int]:
        """Draw the order of that epoch; called once for each pass."""
        ...

    def peek(self, epoch: int) -> array[int] | None:
        """The order that `of(epoch)` would give next, without changing anything; None if that cannot be known."""
        ...

    def followed_epoch(self) -> int | None:
        """The epoch that the followed sampler says the next pass is; None if it is the one that comes next."""
        ...

    def set_epoch(self, epoch: int) -> None:
        """The next pass is that epoch."""
        ...

    def state(self, *, is_inside: bool) -> dict[str, Any]:
        """What `load` needs to go on as this one would, and, inside of an epoch, to draw its order again."""
        ...

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`. Raises UsageError if it is another kind of order's."""
        ...


class SeededOrder:
    """Shuffled by seed and epoch, exactly as torch's DistributedSampler does it; in order without a seed."""

    def __init__(self, length: int, seed: int | None, inner: DistributedSampler[Any] | None = None) -> None:
        """`inner`: the sampler whose part this plays, and whose epoch counts."""
        self.length = length
        self._seed = seed
        self._inner = inner

    def of(self, epoch: int) -> array[int]:
        """See Orders."""
        if self._seed is None:
            return array(_INDEX_TYPE, range(self.length))
        generator = torch.Generator()
        generator.manual_seed(self._seed + epoch)
        order = array(_INDEX_TYPE)
        order.frombytes(torch.randperm(self.length, generator=generator).to(torch.int32).numpy().tobytes())
        return order

    def peek(self, epoch: int) -> array[int] | None:
        """See Orders."""
        return self.of(epoch)

    def followed_epoch(self) -> int | None:
        """See Orders."""
        return None if self._inner is None else int(self._inner.epoch)

    def set_epoch(self, epoch: int) -> None:
        """See Orders."""
        if self._inner is not None:
            self._inner.set_epoch(epoch)

    def state(self, *, is_inside: bool) -> dict[str, Any]:
        """See Orders."""
        return {"kind": "seeded", "seed": self._seed}

    def load(self, state: Mapping[str, Any]) -> None:
        """See Orders."""
        if state.get("kind") != "seeded" or state.get("seed") != self._seed:
            raise UsageError(
                f"the state is of an order by seed {state.get('seed')}, this sampler's seed is {self._seed}"
            )


class GivenOrder:
    """The order of any finite sampler, drawn whole when a pass begins."""

    def __init__(self, sampler: Iterable[int]) -> None:
        """Raises UsageError for one that does not say how long it is."""
        try:
            self.length = len(sampler)  # type: ignore[arg-type]
        except TypeError as error:
            raise UsageError(f"{type(sampler).__name__} has no length: only a finite sampler can be planned") from error
        self._sampler = sampler
        self._current = array(_INDEX_TYPE)
        self._loaded: array[int] | None = None

    def of(self, epoch: int) -> array[int]:
        """See Orders. Raises UsageError for a sampler that yields anything but indexes."""
        order, self._loaded = self._loaded, None
        self._current = _drawn(self._sampler) if order is None else order
        self.length = len(self._current)
        return self._current

    def peek(self, epoch: int) -> array[int] | None:
        """See Orders: known for a sampler with `set_epoch`, with a generator of its own, and for one in order."""
        sampler: Any = self._sampler
        generator = getattr(sampler, "generator", None)
        with torch.random.fork_rng(devices=[]):
            if callable(getattr(sampler, "set_epoch", None)) and isinstance(getattr(sampler, "epoch", None), int):
                now = sampler.epoch
                sampler.set_epoch(epoch)
                try:
                    return array(_INDEX_TYPE, sampler)
                finally:
                    sampler.set_epoch(now)
            if isinstance(generator, torch.Generator):
                state = generator.get_state()
                try:
                    return array(_INDEX_TYPE, sampler)
                finally:
                    generator.set_state(state)
        return array(_INDEX_TYPE, sampler) if type(sampler) is SequentialSampler else None

    def followed_epoch(self) -> int | None:
        """See Orders."""
        return None

    def set_epoch(self, epoch: int) -> None:
        """See Orders."""
        follow = getattr(self._sampler, "set_epoch", None)
        if callable(follow):
            follow(epoch)

    def state(self, *, is_inside: bool) -> dict[str, Any]:
        """See Orders: the order itself, since not every sampler can draw one again."""
        generator = getattr(self._sampler, "generator", None)
        order = self._current if is_inside else array(_INDEX_TYPE)
        state = {"kind": "given", "order": torch.tensor(order, dtype=torch.int64).to(torch.int32)}
        if isinstance(generator, torch.Generator):
            state["generator"] = generator.get_state()
        return state

    def load(self, state: Mapping[str, Any]) -> None:
        """See Orders."""
        if state.get("kind") != "given":
            raise UsageError("the state is of an order by seed, this sampler follows another sampler")
        order = array(_INDEX_TYPE, state["order"].tolist())
        self._loaded = order if order else None
        self.length = len(order) or self.length
        generator = getattr(self._sampler, "generator", None)
        if isinstance(generator, torch.Generator) and "generator" in state:
            generator.set_state(state["generator"])


def _drawn(sampler: Iterable[int]) -> array[int]:
    try:
        return array(_INDEX_TYPE, sampler)
    except (TypeError, OverflowError) as error:
        raise UsageError(
            f"{type(sampler).__name__} does not yield indexes of samples, whole numbers from 0 ({error}): a sampler is "
            "planned, not a batch sampler"
        ) from error


def share_of(order: array[int], started: int, rank: int, world_size: int, *, drop_last: bool) -> array[int]:
    """Return what `rank` reads of `order` from its sample `started` on: every `world_size`-th.

    All ranks get as many: the first samples come once more to fill up, or with `drop_last` the last are left out.
    """
    rest = order[started:]
    if drop_last:
        rest = rest[: len(rest) // world_size * world_size]
    elif rest:
        while len(rest) % world_size:
            rest += order[: -len(rest) % world_size]
    return rest[rank::world_size]
