"""Where a training's waiting goes: `watch(loader)` measures each step's wait, and asks the node what it was for.

Owns: measuring the loop, TensorBoard scalars, the report. Leaves to others: dividing a wait and the advice
(observe/stalls), counting misses (the daemon).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Generic, Protocol, TypeVar

from orchestra.client.figures import NodeWatcher
from orchestra.clock import Clock, SystemClock
from orchestra.observe.stalls import CAUSES, EpochStalls, NodeFigures, Waits, advice, split_wait
from orchestra.units import format_duration

Batch = TypeVar("Batch", covariant=True)

# A wait under this is the loader's own hand-over; asking the node what it was for would take a tenth of it.
_NOTICED_S = 0.002
# Figures older than this would bring misses into a wait that were over long before it.
_FIGURES_AGE_MAX_S = 1.0
# Steps that waited are kept one by one, and epochs as sums: some hundred kilobytes at most.
_STEPS_MAX = 4096
_EPOCHS_MAX = 1024


class Writer(Protocol):
    """What is used of torch.utils.tensorboard.SummaryWriter."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None: ...


@dataclass(frozen=True, slots=True)
class StepStall:
    """A step that waited noticeably, and what for."""

    epoch: int
    step: int
    waits: Waits


def watch(
    loader: Iterable[Any], writer: Writer | None = None, *, config: str | None = None, clock: Clock | None = None
) -> WatchedLoader[Any]:
    """Return `loader` with its waits measured; iterate over it instead of `loader`, which is a DataLoader or whatever
    else gives batches (TensorBatches, ColumnCubes, prefetch_to_device).

    `writer` (a TensorBoard SummaryWriter) gets `stalls/wait_s` of each step, and seconds by cause of each epoch.
    `config` is the path of an orchestra.toml. Raises ConfigError; a daemon that does not run means that causes are not
    told apart.
    """
    return WatchedLoader(loader, writer, NodeWatcher(config), clock or SystemClock())


class WatchedLoader(Generic[Batch]):
    """Yields the loader's batches; everything else is the loader's own."""

    def __init__(self, loader: Iterable[Batch], writer: Writer | None, node: NodeWatcher, clock: Clock) -> None:
        self._loader: Any = loader
        self._writer = writer
        self._node = node
        self._clock = clock
        self._steps_total = 0
        self._figures: NodeFigures | None = None
        self._figures_s = 0.0
        self.epochs: deque[EpochStalls] = deque(maxlen=_EPOCHS_MAX)
        self.steps: deque[StepStall] = deque(maxlen=_STEPS_MAX)

    def __iter__(self) -> Iterator[Batch]:
        number = self.epochs[-1].epoch + 1 if self.epochs else 1
        began_s = self._now_s()
        before = self._look()
        waits, steps = Waits(), 0
        asked_s = began_s
        try:
            batches = iter(self._loader)
            while True:
                batch = next(batches, _END)
                waits += self._step(number, steps, self._now_s() - asked_s)
                if batch is _END:
                    return
                steps += 1
                self._note_delivered()
                yield batch
                asked_s = self._now_s()
                if asked_s - self._figures_s > _FIGURES_AGE_MAX_S:
                    self._look()
                    asked_s = self._now_s()
        finally:
            self._end(number, steps, self._now_s() - began_s, waits, before)

    def __len__(self) -> int:
        return len(self._loader)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def report(self) -> str:
        """Return a table of the epochs (the last twenty), and one sentence of advice about the last."""
        if not self.epochs:
            return "no epoch has been watched yet"
        lines = [f"{'epoch':>5} {'time':>8} {'waited':>8} {'share':>6}  " + "".join(f"{one:>10}" for one in CAUSES)]
        for epoch in list(self.epochs)[-20:]:
            causes = "".join(f"{format_duration(getattr(epoch.waits, f'{cause}_s')):>10}" for cause in CAUSES)
            lines.append(
                f"{epoch.epoch:>5} {format_duration(epoch.time_s):>8} {format_duration(epoch.waits.total_s):>8} "
                f"{100 * epoch.waited_ratio:>5.1f}%  {causes}"
            )
        return "\n".join([*lines, advice(self.epochs[-1])])

    def _step(self, epoch: int, step: int, waited_s: float) -> Waits:
        """Divide one wait, and note it."""
        waits = Waits(decode_s=waited_s)
        if waited_s > _NOTICED_S:
            before, before_s = self._figures, self._figures_s
            after = self._look()
            if before is not None and after is not None:
                readers = max(1, getattr(self._loader, "num_workers", 0))
                waits = split_wait(waited_s, after.since(before).waits, readers * (self._figures_s - before_s))
            self.steps.append(StepStall(epoch, step, waits))
        if self._writer is not None:
            self._writer.add_scalar("stalls/wait_s", waited_s, self._steps_total)
        self._steps_total += 1
        return waits

    def _end(self, number: int, steps: int, time_s: float, waits: Waits, before: NodeFigures | None) -> None:
        after = self._look()
        node = after.since(before) if before is not None and after is not None else NodeFigures()
        epoch = EpochStalls(number, steps, time_s, waits, node)
        self.epochs.append(epoch)
        if self._writer is not None:
            for name, seconds in asdict(waits).items():
                self._writer.add_scalar(f"stalls/epoch/{name}", seconds, number)
            self._writer.add_scalar("stalls/epoch/waited_ratio", epoch.waited_ratio, number)

    def _note_delivered(self) -> None:
        """A planned sampler's state is what the training took, not what its loader drew ahead."""
        loader = self._loader
        batch_sampler = getattr(loader, "batch_sampler", None)
        sampler = getattr(batch_sampler, "sampler", getattr(loader, "sampler", None))
        note = getattr(sampler, "note_delivered", None)
        if note is not None:
            note(int(getattr(batch_sampler, "batch_size", None) or getattr(loader, "batch_size", None) or 1))

    def _look(self) -> NodeFigures | None:
        self._figures = self._node.figures()
        self._figures_s = self._now_s()
        return self._figures

    def _now_s(self) -> float:
        return self._clock.now_ns() / 1e9


_END: Any = object()
