"""Runs the training example as it is, in a process of its own, and hears from it when an epoch ends.

Owns: finding the example and reading its lines. Leaves to others: training (examples/), what an epoch cost (report.py).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import orchestra
from orchestra.errors import OrchestraError

FOLDER_EXAMPLE = "pytorch_images.py"
FSSPEC_EXAMPLE = "pytorch_images_fsspec.py"


@dataclass(frozen=True, slots=True)
class EpochFigures:
    """What the example says about an epoch. `ended_ns` counts from the machine's boot, as `Clock.now_ns` does."""

    time_s: float
    images_per_s: float
    data_wait_fraction: float
    accuracy: float
    ended_ns: int


def example_path(name: str) -> Path:
    """Return where the example lies: in a checkout beside the package, in an installation inside it."""
    package = Path(orchestra.__file__).parent
    for folder in (package.parent / "examples", package / "demo" / "examples"):
        if (folder / name).is_file():
            return folder / name
    raise OrchestraError(f"the example {name} is missing from this installation of orchestra; install it again")


def parse_line(line: str) -> EpochFigures | None:
    """Return the figures if `line` is the example's line for a program, None for any other line."""
    if not line.startswith("{"):
        return None
    figures = json.loads(line)
    return EpochFigures(
        time_s=figures["time_s"],
        images_per_s=figures["images_per_s"],
        data_wait_fraction=figures["data_wait_fraction"],
        accuracy=figures["accuracy"],
        ended_ns=int(figures["ended_boottime_s"] * 1e9),
    )


def train(example: Path, data: str, environment: dict[str, str], log_path: Path) -> Iterator[EpochFigures]:
    """Run `example --data DATA`, yielding each epoch's figures when it ends. Raises OrchestraError if it fails.

    Closing the iterator early ends the training.
    """
    with (
        log_path.open("w") as log,
        subprocess.Popen(
            [sys.executable, str(example), "--data", data],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment,
            start_new_session=True,
        ) as process,
    ):
        assert process.stdout is not None
        try:
            for line in process.stdout:
                figures = parse_line(line)
                if figures is not None:
                    yield figures
            process.wait()
        finally:
            if process.returncode is None:
                # Its loader's workers too: they would keep the folder busy for seconds more.
                os.killpg(process.pid, signal.SIGKILL)
    if process.returncode != 0:
        lines = log_path.read_text().strip().splitlines() or ["it said nothing"]
        raise OrchestraError(f"{example.name} --data {data} failed with status {process.returncode}: {lines[-1]}")
