"""DLIO's command with its own sampler's order told to the node: in its `read`, the line that makes the sampler.

    BENCH_CONFIG=orchestra.toml python benchmarks/dlio_planned.py workload=...

DLIO's DataLoader, readers, order and steps stay as they are. Fails if the node was not told the order.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import Any

from orchestra.torch import PlannedSampler


def planned(make_sampler: Callable[..., Any], made: list[PlannedSampler]) -> Callable[..., PlannedSampler]:
    """Return what makes DLIO's sampler, followed by one that publishes; each is added to `made`."""

    def make(rank: int, size: int, samples: int, *more: Any) -> PlannedSampler:
        arguments = importlib.import_module("dlio_benchmark.utils.config").ConfigArguments.get_instance()
        files = arguments.train_global_index_map
        if size != 1 or len(files) != samples:
            raise SystemExit("only the training of one process is planned here")
        paths = [files[sample][0] for sample in range(samples)]
        sampler = PlannedSampler(paths, make_sampler(rank, size, samples, *more), config=os.environ["BENCH_CONFIG"])
        made.append(sampler)
        return sampler

    return make


def main() -> None:
    """Run DLIO with the arguments of this command."""
    made: list[PlannedSampler] = []
    loaders: Any = importlib.import_module("dlio_benchmark.data_loader.torch_data_loader")
    loaders.dlio_sampler = planned(loaders.dlio_sampler, made)
    importlib.import_module("dlio_benchmark.main").main()
    if not made or not made[-1].is_published:
        raise SystemExit("the node was not told the order")


if __name__ == "__main__":
    main()
