"""Train by a plan: files arrive in the order in which they will be read, and a stopped training goes on where it was.

    python examples/pytorch_planned.py --data orchestra:///digits --epochs 3 --checkpoint run.pt
    python examples/pytorch_planned.py --data orchestra:///digits --epochs 3 --checkpoint run.pt   # goes on

FOLDER holds one folder per class with PNG files; it may be a path of the namespace (orchestra:///...) or a mounted
folder. What differs from an ordinary script: the sampler (one line), its state in the checkpoint (two), and `watch`
around the loader, which says where waiting went (two).
"""

from __future__ import annotations

import argparse
import io
import os
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from pytorch_images import SIDE, make_model
from torch import nn
from torch.utils.data import DataLoader

from orchestra.torch import FileDataset, PlannedSampler, watch


def decode(data: bytes) -> torch.Tensor:
    """Return the picture as grey pixels between 0 and 1."""
    with Image.open(io.BytesIO(data)) as image:
        grey = image.convert("L").resize((SIDE, SIDE))
    return torch.frombuffer(bytearray(grey.tobytes()), dtype=torch.uint8).view(1, SIDE, SIDE).float() / 255


class Training:
    """A model, what trains it, and where it is; `save` and `load` keep all of it in one file."""

    def __init__(self, classes_count: int, sampler: PlannedSampler, checkpoint: str) -> None:
        self.model = make_model(classes_count)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=2e-3)
        self.sampler = sampler
        self.checkpoint = checkpoint

    def save(self) -> None:
        """Write the checkpoint, replacing the one before in one step."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "sampler": self.sampler.state_dict(),
        }
        draft = f"{self.checkpoint}.part"
        torch.save(state, draft)
        os.replace(draft, self.checkpoint)

    def load(self) -> None:
        """Go on from the checkpoint, if there is one."""
        if self.checkpoint and Path(self.checkpoint).exists():
            state = torch.load(self.checkpoint, weights_only=True)
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.sampler.load_state_dict(state["sampler"])

    def step(self, pictures: torch.Tensor, labels: torch.Tensor) -> float:
        """Learn from one batch; return its loss."""
        self.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(self.model(pictures), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return loss.item()


def parse_arguments() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description="Train a small image classifier by a published reading order.")
    parser.add_argument("--data", required=True, metavar="FOLDER", help="one folder per class, with PNG files in it")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--workers", type=int, default=2, help="processes that read and decode (default: 2)")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint", default="", metavar="FILE", help="save here, and go on from here")
    parser.add_argument("--save-every", type=int, default=10, metavar="STEPS", help="steps between saves (default: 10)")
    parser.add_argument("--stop-after", type=int, default=0, metavar="STEPS", help="end early, as if interrupted")
    return parser.parse_args()


def train(options: argparse.Namespace, training: Training, loader: Any) -> None:
    """Train until all epochs are done, or `--stop-after` steps were."""
    steps = 0
    while (epoch := training.sampler.state_dict()["epoch"]) < options.epochs:
        seen, total = 0, 0.0
        for pictures, labels in loader:
            total += training.step(pictures, labels) * len(labels)
            seen += len(labels)
            steps += 1
            is_last = steps == options.stop_after
            if training.checkpoint and (is_last or not steps % options.save_every):
                training.save()
            if is_last:
                print(f"stopped in epoch {epoch + 1} after {seen} pictures of it", flush=True)
                return
        if training.checkpoint:
            training.save()
        print(f"epoch {epoch + 1}: {seen} pictures, loss {total / max(1, seen):.3f}", flush=True)


def main() -> None:
    """Find the pictures, plan, train, say where the waiting went."""
    options = parse_arguments()
    torch.manual_seed(options.seed)
    torch.set_num_threads(1)
    dataset = FileDataset(options.data, suffix=".png", transform=decode)
    if not len(dataset):
        raise SystemExit(f"no PNG files in class folders below {options.data}")
    print(f"{len(dataset)} pictures in {len(dataset.classes)} classes", flush=True)
    sampler = PlannedSampler(dataset.paths, options.seed)
    loader = watch(DataLoader(dataset, batch_size=options.batch_size, sampler=sampler, num_workers=options.workers))
    training = Training(len(dataset.classes), sampler, options.checkpoint)
    training.load()
    train(options, training, loader)
    print(loader.report(), flush=True)
    sampler.close()


if __name__ == "__main__":
    main()
