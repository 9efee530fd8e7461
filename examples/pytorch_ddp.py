"""Train one model on several processes (DistributedDataParallel, gloo), each reading its share of a folder of pictures.

    python examples/pytorch_ddp.py --data orchestra:///digits --ranks 2 --epochs 2

FOLDER holds one folder per class with PNG files; it may be a path of the namespace (orchestra:///...) or of this
machine, a mounted one too. On several machines run it under torchrun, which says who is who.
"""

from __future__ import annotations

import argparse
import io
import os
import tempfile
import time
from typing import Any

import torch
import torch.distributed as dist
from PIL import Image
from pytorch_images import SIDE, make_model
from torch import nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from orchestra.torch import FileDataset


def decode(data: bytes) -> torch.Tensor:
    """Return the picture as grey pixels between 0 and 1."""
    with Image.open(io.BytesIO(data)) as image:
        grey = image.convert("L").resize((SIDE, SIDE))
    return torch.frombuffer(bytearray(grey.tobytes()), dtype=torch.uint8).view(1, SIDE, SIDE).float() / 255


def run_epoch(model: nn.Module, optimizer: torch.optim.Optimizer, loader: DataLoader[Any]) -> torch.Tensor:
    """Train on this rank's share; return the sum of the losses and the pictures seen."""
    total = torch.zeros(2)
    for pictures, labels in loader:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(pictures), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        total += torch.tensor([loss.item() * len(labels), len(labels)])
    return total


def work(rank: int, options: argparse.Namespace, rendezvous: str) -> None:
    """Be one rank: join the others, train, print what all ranks together did."""
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    else:
        dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=options.ranks)
    torch.manual_seed(options.seed)
    torch.set_num_threads(1)
    dataset = FileDataset(options.data, suffix=".png", transform=decode)
    sampler: DistributedSampler[Any] = DistributedSampler(dataset, seed=options.seed)
    loader = DataLoader(dataset, batch_size=options.batch_size, sampler=sampler, num_workers=options.workers)
    model = DistributedDataParallel(make_model(len(dataset.classes)))
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for epoch in range(1, options.epochs + 1):
        sampler.set_epoch(epoch)
        began = time.perf_counter()
        total = run_epoch(model, optimizer, loader)
        dist.all_reduce(total)
        time_s = time.perf_counter() - began
        if dist.get_rank() == 0:
            print(
                f"epoch {epoch}: {time_s:.2f} s, {int(total[1])} pictures by {dist.get_world_size()} ranks, "
                f"{total[1] / time_s:.0f} images/s, loss {total[0] / total[1]:.3f}",
                flush=True,
            )
    dist.destroy_process_group()


def main() -> None:
    """Start the ranks, or be one of torchrun's."""
    parser = argparse.ArgumentParser(description="Train a small image classifier on several processes.")
    parser.add_argument("--data", required=True, metavar="FOLDER", help="one folder per class, with PNG files in it")
    parser.add_argument("--ranks", type=int, default=2, help="processes on this machine (default: 2)")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--workers", type=int, default=0, help="reading processes of each rank (default: 0)")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if "RANK" in os.environ:
        work(0, options, "")
        return
    with tempfile.TemporaryDirectory() as folder:
        rendezvous = f"file://{folder}/ranks"
        spawn(work, (options, rendezvous), nprocs=options.ranks)  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()
