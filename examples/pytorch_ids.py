"""Train from IDs: a partition dictionary, a labels dictionary, one tensor file per ID, workers that read.

    python examples/pytorch_ids.py --data /tmp/ids --make 2000      # makes the files, then trains
    python examples/pytorch_ids.py --data orchestra:///ids --epochs 3 --workers 2

FOLDER holds `partition.json` ({"train": [IDs], "validation": [IDs]}), `labels.json` ({ID: class}) and `data/ID.pt` for
every ID. It may be a path of the namespace (orchestra:///...) or of this machine.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from orchestra.torch import FileDataset, load_tensor

FEATURES = 64
CLASSES = 4


def make_files(folder: Path, count: int, seed: int) -> None:
    """Write `count` samples of four classes, each a cloud around a centre of its own."""
    torch.manual_seed(seed)
    (folder / "data").mkdir(parents=True, exist_ok=True)
    centres = torch.randn(CLASSES, FEATURES) * 2
    labels = {f"id-{number:06d}": number % CLASSES for number in range(count)}
    for name, label in labels.items():
        torch.save(centres[label] + torch.randn(FEATURES), folder / "data" / f"{name}.pt")
    ids = list(labels)
    partition = {"train": ids[: count * 4 // 5], "validation": ids[count * 4 // 5 :]}
    (folder / "partition.json").write_text(json.dumps(partition))
    (folder / "labels.json").write_text(json.dumps(labels))


def read_json(folder: str, name: str) -> Any:
    """Return what a file of the folder says."""
    (content,) = FileDataset([f"{folder}/{name}"], transform=json.loads)
    return content


def make_loader(folder: str, ids: list[str], labels: dict[str, int], options: argparse.Namespace) -> DataLoader[Any]:
    """Return batches of the samples with these IDs."""
    dataset = FileDataset(ids, labels, load_tensor, folder=f"{folder}/data", suffix=".pt")
    return DataLoader(dataset, batch_size=options.batch_size, shuffle=True, num_workers=options.workers)


def main() -> None:
    """Make the files if asked to, then train on them."""
    parser = argparse.ArgumentParser(description="Train from partition and labels dictionaries and a file per ID.")
    parser.add_argument("--data", required=True, metavar="FOLDER")
    parser.add_argument("--make", type=int, metavar="COUNT", help="first write so many samples to FOLDER")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--workers", type=int, default=2, help="processes that read (default: 2)")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.make:
        make_files(Path(options.data), options.make, options.seed)
    torch.manual_seed(options.seed)
    folder = options.data.rstrip("/")
    partition, labels = read_json(folder, "partition.json"), read_json(folder, "labels.json")
    train, validation = (make_loader(folder, partition[part], labels, options) for part in ("train", "validation"))
    model = nn.Sequential(nn.Linear(FEATURES, 32), nn.ReLU(), nn.Linear(32, CLASSES))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for epoch in range(1, options.epochs + 1):
        began = time.perf_counter()
        for samples, wanted in train:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(samples), wanted).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        with torch.no_grad():
            right = sum(int((model(samples).argmax(1) == wanted).sum()) for samples, wanted in validation)
        print(
            f"epoch {epoch}: {time.perf_counter() - began:.2f} s, {len(partition['train'])} samples, "
            f"accuracy {right / len(partition['validation']):.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
