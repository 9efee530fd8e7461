"""A sampler that tells the node what comes: `PlannedSampler`, one line in a training script.

Owns: passes over an order, shares of ranks, resuming, and saying where the reader is. Leaves to others: the order
itself (orders), sending it (client/plans.py), fetching by it (prefetch). What is yielded never depends on whether
anything could be published.
"""

from __future__ import annotations

import logging
import os
import weakref
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from torch import distributed
from torch.utils.data import DistributedSampler, Sampler

from orchestra.client.folders import namespace_paths
from orchestra.client.plans import NEXT_SAMPLES_MAX, PlanPublisher
from orchestra.clock import Clock, SystemClock
from orchestra.config import load_config
from orchestra.errors import OrchestraError, UsageError
from orchestra.torch.orders import GivenOrder, Orders, SeededOrder, share_of
from orchestra.torch.shares import Share

log = logging.getLogger(__name__)

# How often the node is told where the reader is: ten messages of 0.2 ms a second, and the node looks further ahead than
# any reader goes in that time. It says itself when it need not hear of it for longer.
_POSITION_NS = 100_000_000
# Messages in a row that may fail before the rest of the epoch goes without.
_FAILURES_MAX = 3
_STATE_FORMAT = 1
# What torch's generator takes, with room for the epoch that is added.
_SEED_MIN, _SEED_MAX = -(2**63), 2**63 - 1


@dataclass(slots=True)
class _Pass:
    """One iteration over (the rest of) an epoch."""

    number: int  # counts passes: what the daemon knows as the epoch
    epoch: int
    started: int  # samples of all ranks that came before it in its epoch
    length: int  # samples of this rank in it
    drawn: int = 0
    delivered: int | None = None  # None: nobody counts them
    failures: int = 0


class PlannedSampler(Sampler[int]):
    """Yields sample indexes, and publishes the order of this epoch and the start of the next to the node's daemon, so
    that files arrive just before they are read.

        sampler = orchestra.torch.PlannedSampler([path for path, _ in dataset.samples], 42)
        loader = DataLoader(dataset, batch_size=256, sampler=sampler, num_workers=8)

    `dataset_paths`: the file of each sample, by index: `orchestra:///...`, or a path in a mounted folder. Samples whose
    files lie elsewhere are not planned.

    `sampler_or_seed`: a seed shuffles exactly as `DistributedSampler(seed=...)` does; None goes in order. A
    `DistributedSampler` is followed with its own rank and world size. Any other finite sampler is followed as it is; if
    `world_size` is given, as the order of all ranks together (it must be the same on each), of which this rank takes
    every `world_size`-th. A followed sampler is drawn whole when a pass begins.

    `rank`, `world_size`: this process's share; for a seed torch.distributed's by default, where it is initialised.

    Each pass is the next epoch, unless `set_epoch` said which. A daemon that cannot be reached is one warning in the
    log, and the order is the same. `config` is the path of an orchestra.toml.
    """

    def __init__(
        self,
        dataset_paths: Sequence[str | os.PathLike[str]],
        sampler_or_seed: Iterable[int] | int | None = 0,
        *,
        rank: int | None = None,
        world_size: int | None = None,
        drop_last: bool = False,
        config: str | None = None,
        clock: Clock | None = None,
    ) -> None:
        """Sends nothing yet. Raises UsageError for no paths, a rank that cannot be, a sampler without a length."""
        if isinstance(dataset_paths, (str, os.PathLike, Mapping)) or not isinstance(dataset_paths, Sized):
            raise UsageError(f"dataset_paths: expected the path of every sample, by index, got {dataset_paths}")
        if not len(dataset_paths):
            raise UsageError("a plan needs the paths of at least one sample")
        self._paths = dataset_paths
        self._orders, self._rank, self._world_size, self._drop_last = _followed(
            sampler_or_seed, len(dataset_paths), rank, world_size, drop_last
        )
        self._config = config
        self._clock = clock or SystemClock()
        self._pass: _Pass | None = None
        self._next: tuple[int, int] | None = None  # (epoch, samples that came before it), if it was said
        self._publisher: PlanPublisher | None = None
        self._is_warned = False
        self._is_published = False
        self._is_failure_said = False

    # -- the sampler -----------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[int]:
        before = self._pass
        epoch, started = self._coming()
        order = self._orders.of(epoch)
        share = share_of(order, started, self._rank, self._world_size, drop_last=self._drop_last)
        number = 0 if before is None else before.number + 1
        running = self._pass = _Pass(number, epoch, started, len(share))
        self._next = None
        # A script that never calls set_epoch on a sampler that wants it has the same epoch over and over.
        is_same_again = before is not None and before.epoch == epoch and not before.started
        is_publishing = self._is_published = self._publish(running, share, epoch if is_same_again else epoch + 1)
        told_ns, every_ns = self._clock.now_ns(), _POSITION_NS
        for offset, index in enumerate(share):
            if is_publishing and (now_ns := self._clock.now_ns()) - told_ns >= every_ns:
                told_ns = now_ns
                is_publishing = self._tell(running, offset)
                every_ns = self._rest_ns()
            running.drawn = offset + 1
            yield index
        if is_publishing:
            self._tell(running, len(share), is_last=True)

    def __len__(self) -> int:
        """Samples of this rank in the running pass; after its end, and before the first, in the next."""
        running = self._pass
        if self._next is None and running is not None and running.drawn < running.length:
            return running.length
        rest = self._orders.length - self._coming()[1]
        return rest // self._world_size if self._drop_last else -(-rest // self._world_size)

    @property
    def is_published(self) -> bool:
        """Whether the node knows the order of the running pass, so that files are fetched ahead by it."""
        return self._is_published

    def set_epoch(self, epoch: int) -> None:
        """The next pass is that epoch; the rest of it, if that is the one that was loaded."""
        if self._next is None or self._next[0] != epoch:
            self._next = (epoch, 0)
        self._orders.set_epoch(epoch)

    def state_dict(self, consumed: int | None = None) -> dict[str, Any]:
        """Return where the training is, for `load_state_dict` on any number of ranks.

        `consumed`: the samples that this rank's training took in this pass. Without it, what `orchestra.torch.watch`
        saw delivered; else what was drawn, which is right for a loader without workers (with workers the sampler is
        some batches ahead of the training).
        """
        if consumed is not None and not _is_count(consumed):
            raise UsageError(f"consumed: expected the samples that this rank took in this pass, got {consumed!r}")
        running = self._pass
        if running is None or self._next is not None:
            epoch, total = self._coming()
        else:
            if consumed is None:
                consumed = running.drawn if running.delivered is None else running.delivered
            epoch, total = running.epoch, running.started + consumed * self._world_size
            if consumed >= running.length or total >= self._orders.length:
                epoch, total = epoch + 1, 0
        return {
            "format": _STATE_FORMAT,
            "epoch": epoch,
            "consumed": total,
            "samples": len(self._paths),
            **self._orders.state(is_inside=total > 0),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there: the next pass yields the rest of that epoch, shared among the ranks there are now.

        Raises UsageError if the state is of other samples or of another kind of order.
        """
        is_state = isinstance(state, Mapping) and state.get("format") == _STATE_FORMAT
        if not is_state or not all(_is_count(state.get(name)) for name in ("samples", "epoch", "consumed")):
            raise UsageError("this is not the state of a PlannedSampler")
        if state["samples"] != len(self._paths):
            raise UsageError(f"the state is of {state['samples']} samples, this sampler has {len(self._paths)}")
        self._orders.load(state)
        self._next = (int(state["epoch"]), int(state["consumed"]))
        self._orders.set_epoch(self._next[0])

    def note_delivered(self, count: int) -> None:
        """The training took `count` samples more; `orchestra.torch.watch` calls this."""
        running = self._pass
        if running is not None:
            running.delivered = min(running.length, (running.delivered or 0) + count)

    def close(self) -> None:
        """Tell the node that nothing more will be read by this plan; also done when the sampler is let go of and when
        the process ends. Idempotent; another pass publishes anew."""
        publisher, self._publisher = self._publisher, None
        if publisher is not None:
            _end(publisher)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_publisher": None}

    def _coming(self) -> tuple[int, int]:
        """(epoch, samples that came before) of the next pass."""
        followed = self._orders.followed_epoch()
        if self._next is not None and followed in (None, self._next[0]):
            return self._next
        if followed is not None:
            return followed, 0
        return (0 if self._pass is None else self._pass.epoch + 1), 0

    # -- publishing ------------------------------------------------------------------------------------------------

    def _publish(self, running: _Pass, share: array[int], next_epoch: int) -> bool:
        """Publish the pass and the start of the one after; False if nothing could be."""
        try:
            publisher = self._publisher
            if publisher is None or not publisher.is_own:
                publisher = self._publisher = self._make_publisher()
            publisher.publish(running.number, share)
            coming = self._orders.peek(next_epoch)
            if coming is not None:
                following = share_of(coming, 0, self._rank, self._world_size, drop_last=self._drop_last)
                publisher.publish_next(running.number + 1, following, NEXT_SAMPLES_MAX)
        except (OrchestraError, OSError) as error:
            if not self._is_warned:
                self._is_warned = True
                log.warning("the reading order could not be published, so nothing is fetched ahead by it: %s", error)
            return False
        return True

    def _make_publisher(self) -> PlanPublisher:
        paths, stranger = namespace_paths(self._paths)
        if not any(paths):
            raise UsageError(f"{stranger} lies neither in the namespace (orchestra:///...) nor in a mounted folder")
        if stranger is not None:
            log.info("some samples are not planned, such as %s, which lies outside of the namespace", stranger)
        publisher = PlanPublisher(load_config(self._config), paths)
        weakref.finalize(self, _end, publisher)
        return publisher

    def _rest_ns(self) -> int:
        rest_s = 0.0 if self._publisher is None else self._publisher.rest_s
        return max(_POSITION_NS, int(rest_s * 1e9))

    def _tell(self, running: _Pass, offset: int, *, is_last: bool = False) -> bool:
        """Say where the reader is; False once that has failed too often in this pass. Only the end is waited for."""
        publisher = self._publisher
        if publisher is None or self._pass is not running:
            return False
        try:
            say = publisher.move if is_last else publisher.move_soon
            if not say(running.number, offset):  # the daemon is another one
                publisher.publish_again()
                publisher.move(running.number, offset)
            running.failures = 0
            if publisher.failure and not self._is_failure_said:
                self._is_failure_said = True
                log.warning("a file of the plan cannot be fetched ahead: %s (see: orchestra stalls)", publisher.failure)
        except (OrchestraError, OSError) as error:
            running.failures += 1
            log.debug("the reader's position could not be said: %s", error)
        return running.failures < _FAILURES_MAX


def _is_count(value: object) -> bool:
    return isinstance(value, Integral) and int(value) >= 0


def _end(publisher: PlanPublisher) -> None:
    """End a plan of this process, if its daemon still runs."""
    if publisher.is_own:
        try:
            publisher.end()
        except (OrchestraError, OSError) as error:
            log.debug("the plan could not be ended: %s", error)
        publisher.close()


def _followed(
    order: Iterable[int] | int | None, samples_count: int, rank: int | None, world_size: int | None, drop_last: bool
) -> tuple[Orders, int, int, bool]:
    """Return (order, rank, world size, drop_last)."""
    if (rank is None) != (world_size is None):
        raise UsageError("rank and world_size go together")
    if isinstance(order, DistributedSampler) and type(order) is DistributedSampler:  # a subclass may order otherwise
        if rank is not None and (rank, world_size) != (order.rank, order.num_replicas):
            raise UsageError("the DistributedSampler has another rank or world size")
        seed = order.seed if order.shuffle else None
        if len(order.dataset) != samples_count:  # type: ignore[arg-type]
            raise UsageError(f"{samples_count} paths for the {len(order.dataset)} samples of the sampler")  # type: ignore[arg-type]
        return SeededOrder(samples_count, seed, order), order.rank, order.num_replicas, order.drop_last
    if isinstance(order, (bool, str)):
        raise UsageError(f"sampler_or_seed: expected a sampler, a whole number or None, got {order!r}")
    orders: Orders
    if order is None or isinstance(order, (int, Integral)):  # numpy's, too
        if order is not None and not _SEED_MIN <= int(order) <= _SEED_MAX:
            raise UsageError(f"sampler_or_seed: expected a seed of at most 63 bits, got {order}")
        orders = SeededOrder(samples_count, None if order is None else int(order))
        if rank is None and distributed.is_available() and distributed.is_initialized():
            rank, world_size = distributed.get_rank(), distributed.get_world_size()
    else:
        orders = GivenOrder(order)
    share = Share(rank or 0, 1 if world_size is None else world_size)  # says which ranks there can be
    return orders, share.rank, share.world_size, drop_last
