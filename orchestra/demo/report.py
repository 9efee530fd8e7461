"""What the demo found: figures of each epoch, and whether they are what orchestra promises.

Owns: the arithmetic and the words. Leaves to others: measuring (run.py) and printing (cli/demo.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from orchestra.demo.training import EpochFigures
from orchestra.testing.s3_server import StoreRequest
from orchestra.units import format_size


@dataclass(frozen=True, slots=True)
class Epoch:
    """One epoch, as `--json` shows it."""

    time_s: float
    images_per_s: float
    data_wait_fraction: float
    store_requests: int
    store_bytes: int
    hit_ratio: float


@dataclass(frozen=True, slots=True)
class DemoReport:
    """The whole run, as `--json` shows it."""

    face: str
    epochs: tuple[Epoch, ...]
    accuracy: float
    verified_files: int
    verified_bytes: int

    def as_json(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        return asdict(self)


def count_requests(requests: Sequence[StoreRequest], began_ns: int, ended_ns: int) -> tuple[int, int]:
    """Return number and body bytes of the requests that came after `began_ns` and not after `ended_ns`."""
    inside = [request for request in requests if began_ns < request.came_ns <= ended_ns]
    return len(inside), sum(request.body_bytes for request in inside)


def make_epoch(figures: EpochFigures, counted: tuple[int, int], missed_bytes: int, data_bytes: int) -> Epoch:
    """Return an epoch that read `data_bytes`, of which `missed_bytes` were not on this node when they were read.

    What the kernel's own cache answered reaches no counter of ours: it is a hit, as everything is that was not missed.
    """
    return Epoch(
        time_s=round(figures.time_s, 3),
        images_per_s=round(figures.images_per_s, 1),
        data_wait_fraction=round(figures.data_wait_fraction, 4),
        store_requests=counted[0],
        store_bytes=counted[1],
        hit_ratio=round(max(0.0, 1 - missed_bytes / data_bytes), 4),
    )


def epoch_line(number: int, epoch: Epoch) -> str:
    """Return an epoch's line for people."""
    return (
        f"epoch {number}: {epoch.time_s:.2f} s, {epoch.images_per_s:.0f} images/s, "
        f"{epoch.data_wait_fraction:.0%} of the time waiting for data; "
        f"the S3 server answered {epoch.store_requests} requests, {format_size(epoch.store_bytes)}; "
        f"hit ratio {epoch.hit_ratio:.1%}"
    )


def broken_promise(report: DemoReport) -> str | None:
    """Return what the run showed to be wrong, or None."""
    if len(report.epochs) < 2:
        return f"the training reported {len(report.epochs)} epochs instead of two"
    later = sum(epoch.store_requests for epoch in report.epochs[1:])
    if later:
        return f"after the first epoch {later} requests reached the S3 server; there should be none: all was cached"
    return None
