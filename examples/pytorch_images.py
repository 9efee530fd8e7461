"""Train a small image classifier from a folder of class folders. Plain os, PIL and torch: any folder will do.

    python examples/pytorch_images.py --data /data/digits --epochs 2 --workers 2

FOLDER holds one folder per class, and each of those holds PNG files. Every fifth file is kept for testing. One line is
printed per epoch, and one JSON object with the exact figures where a program reads them (standard output is a pipe).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset

SIDE = 32  # every picture is scaled to SIDE x SIDE grey pixels
TEST_EVERY = 5


class Sample(NamedTuple):
    """A picture's file and the number of its class."""

    path: str
    label: int


def find_samples(folder: str) -> tuple[list[str], list[Sample]]:
    """Return the class names and every picture below them, both in sorted order."""
    with os.scandir(folder) as entries:
        classes = sorted(entry.name for entry in entries if entry.is_dir())
    samples = []
    for label, name in enumerate(classes):
        names = sorted(n for n in os.listdir(os.path.join(folder, name)) if n.endswith(".png"))
        samples += [Sample(os.path.join(folder, name, n), label) for n in names]
    return classes, samples


class Pictures(Dataset[tuple[torch.Tensor, int]]):
    """Opens, decodes and scales one file per item."""

    def __init__(self, samples: list[Sample]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def load(self, path: str) -> Image.Image:
        """Return the decoded picture."""
        with Image.open(path) as image:
            return image.convert("L")

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        sample = self.samples[index]
        image = self.load(sample.path)
        if image.size != (SIDE, SIDE):
            image = image.resize((SIDE, SIDE))
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        return pixels.view(1, SIDE, SIDE).float() / 255, sample.label


def make_model(class_count: int) -> nn.Module:
    """Return two convolutions and a linear layer: enough for digits, quick on a CPU."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * (SIDE // 4) ** 2, class_count),
    )


class Stopwatch:
    """Adds up the time that the loop waits for its loader."""

    def __init__(self) -> None:
        self.waited_s = 0.0

    def watch(self, loader: DataLoader[tuple[torch.Tensor, int]]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield the loader's batches, counting how long each took to come."""
        began = time.perf_counter()
        for batch in loader:
            self.waited_s += time.perf_counter() - began
            yield batch
            began = time.perf_counter()
        self.waited_s += time.perf_counter() - began


def run_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    train: DataLoader[tuple[torch.Tensor, int]],
    test: DataLoader[tuple[torch.Tensor, int]],
) -> dict[str, float]:
    """Train on every training picture once, then classify every test picture; return the figures."""
    stopwatch = Stopwatch()
    began = time.perf_counter()
    seen = right = tested = 0
    model.train()
    for images, labels in stopwatch.watch(train):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        seen += len(labels)
    model.eval()
    with torch.no_grad():
        for images, labels in stopwatch.watch(test):
            right += int((model(images).argmax(1) == labels).sum())
            tested += len(labels)
    time_s = time.perf_counter() - began
    return {
        "time_s": time_s,
        "images_per_s": (seen + tested) / time_s,
        "data_wait_fraction": stopwatch.waited_s / time_s,
        "accuracy": right / tested,
        # Seconds since boot mean the same in every process, so that a log of the storage can be cut at the epoch.
        "ended_boottime_s": time.clock_gettime(time.CLOCK_BOOTTIME),
    }


def parse_arguments() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description="Train a small image classifier from a folder of class folders.")
    parser.add_argument("--data", required=True, metavar="FOLDER", help="one folder per class, with PNG files in it")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--workers", type=int, default=2, help="processes that read and decode (default: 2)")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def train(options: argparse.Namespace, pictures: type[Pictures], classes: list[str], samples: list[Sample]) -> None:
    """Train for `options.epochs` epochs, printing a line after each."""
    torch.manual_seed(options.seed)
    torch.set_num_threads(1)  # the loader's processes need the other cores more than these small layers do
    model = make_model(len(classes))
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    loader_options = {"num_workers": options.workers, "persistent_workers": options.workers > 0}
    tested = samples[::TEST_EVERY]
    trained = [sample for index, sample in enumerate(samples) if index % TEST_EVERY]
    train_loader = DataLoader(pictures(trained), batch_size=options.batch_size, shuffle=True, **loader_options)
    test_loader = DataLoader(pictures(tested), batch_size=256, **loader_options)
    for epoch in range(1, options.epochs + 1):
        figures = run_epoch(model, optimizer, train_loader, test_loader)
        if not sys.stdout.isatty():
            print(json.dumps({"epoch": epoch, **figures}), flush=True)
        print(
            f"epoch {epoch}: {figures['time_s']:.2f} s, {figures['images_per_s']:.0f} images/s, "
            f"{figures['data_wait_fraction']:.0%} waiting for data, accuracy {figures['accuracy']:.3f}",
            flush=True,
        )


def main() -> None:
    """Find the pictures, then train on them."""
    options = parse_arguments()
    classes, samples = find_samples(options.data)
    if not samples:
        raise SystemExit(f"no PNG files in class folders below {options.data}")
    print(f"{len(samples)} pictures in {len(classes)} classes", flush=True)
    train(options, Pictures, classes, samples)


if __name__ == "__main__":
    main()
