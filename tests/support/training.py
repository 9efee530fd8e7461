"""A script that trains by a plan, in a process of its own: one rank of a job, or a run that is stopped and resumed.

    python -m tests.support.training CONFIG COUNT --out FILE [--rank R --world W --store URL] [--stop-after N --state F]

Writes one JSON object: the samples that it read, in order and per epoch, and what its daemon said of the plan.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch.utils.data import DataLoader, Dataset

import orchestra
from orchestra.torch import PlannedSampler

BATCH = 4


class Samples(Dataset[tuple[int, bytes]]):
    """Reads a sample's file through the node."""

    def __init__(self, config: str, count: int) -> None:
        self.client = orchestra.connect(config)
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[int, bytes]:
        return index, self.client.read_file(f"/data/f{index}")


def only_indexes(batch: list[tuple[int, bytes]]) -> list[int]:
    """Check each sample's bytes, and return which they are."""
    for index, data in batch:
        assert data == sample_bytes(index), f"sample {index} has other bytes"
    return [index for index, _ in batch]


def sample_bytes(index: int) -> bytes:
    """What the file of a sample holds."""
    return f"<{index}>".encode() * 200


def write_samples(folder: Path, count: int) -> None:
    """Put the files into a folder that is mounted at /data."""
    for index in range(count):
        (folder / f"f{index}").write_bytes(sample_bytes(index))


def paths_of(count: int) -> list[str]:
    """The paths of all samples."""
    return [f"orchestra:///data/f{index}" for index in range(count)]


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser()
    parser.add_argument("config")
    parser.add_argument("count", type=int)
    parser.add_argument("--out", required=True)
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--world", type=int, default=1)
    parser.add_argument("--store", default="")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--stop-after", type=int, default=0, help="batches of the last epoch")
    parser.add_argument("--state", default="")
    options = parser.parse_args()
    if options.store:
        distributed.init_process_group("gloo", init_method=options.store, rank=options.rank, world_size=options.world)
    sampler = PlannedSampler(paths_of(options.count), 7, config=options.config)
    dataset = Samples(options.config, options.count)
    loader: DataLoader[Any] = DataLoader(
        dataset, batch_size=BATCH, sampler=sampler, num_workers=options.workers, collate_fn=only_indexes
    )
    if options.state and Path(options.state).exists():
        sampler.load_state_dict(torch.load(options.state, weights_only=True))
    epochs = []
    for _ in range(options.epochs):
        read: list[int] = []
        epochs.append(read)
        for batches, batch in enumerate(loader, 1):
            read += batch
            if batches == options.stop_after:
                torch.save(sampler.state_dict(consumed=len(read)), options.state)
                break
        if options.store:
            distributed.barrier()
    told = dataset.client.daemon_request("GET", "/v1/plans")["plans"]  # type: ignore[attr-defined]
    if options.store:
        distributed.barrier()
        distributed.destroy_process_group()
    Path(options.out).write_text(json.dumps({"epochs": epochs, "plans": told}))


if __name__ == "__main__":
    main()
