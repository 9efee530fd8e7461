"""Ray Data reads Parquet from the namespace, prepares it in its workers, and feeds a torch loop.

    python examples/ray_data.py --data orchestra:///tables --epochs 2

Every Ray worker reads through the orchestra file system of its own node, by fsspec: nothing in the pipeline knows of
the cache. The table has the columns x0 ... x3 and y. `--make FOLDER` first writes 4,000 rows into a folder that the
namespace shows as --data. Needs ray[data].
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet
import torch
from torch import nn

COLUMNS = ["x0", "x1", "x2", "x3"]
TARGET = "y"


def make_table(folder: Path, seed: int) -> None:
    """Write four Parquet files of a thousand rows; y follows from the rest, with noise."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    for part in range(4):
        values = generator.standard_normal((1000, len(COLUMNS)))
        target = values @ [1.0, -2.0, 0.5, 0.0] + generator.normal(0, 0.1, 1000)
        table = pa.table([*values.T, target], names=[*COLUMNS, TARGET])
        pyarrow.parquet.write_table(table, folder / f"part-{part}.parquet")


def scaled(batch: dict[str, Any]) -> dict[str, Any]:
    """Prepare a batch: features as one matrix of floats, in a Ray worker."""
    features = np.stack([batch[name] for name in COLUMNS], axis=1).astype(np.float32)
    return {"features": features / 2, TARGET: batch[TARGET].astype(np.float32)}


def train(rows: Any, options: argparse.Namespace) -> None:
    """Fit a linear model to the batches that Ray hands out."""
    torch.manual_seed(options.seed)
    model = nn.Linear(len(COLUMNS), 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-2)
    for epoch in range(1, options.epochs + 1):
        began = time.perf_counter()
        seen, error = 0, 0.0
        for batch in rows.iter_torch_batches(batch_size=options.batch_size, local_shuffle_buffer_size=1000):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(batch["features"])[:, 0], batch[TARGET])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            seen += len(batch[TARGET])
            error += loss.item() * len(batch[TARGET])
        print(f"epoch {epoch}: {time.perf_counter() - began:.2f} s, {seen} rows, error {error / seen:.4f}", flush=True)


def main() -> None:
    """Read through Ray, train here."""
    parser = argparse.ArgumentParser(description="Ray Data over the namespace, into a torch loop.")
    parser.add_argument("--data", required=True, metavar="PATH", help="a folder of Parquet files: orchestra:///...")
    parser.add_argument("--make", metavar="FOLDER", help="first write a table into this folder")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--cpus", type=int, default=2, help="for Ray (default: 2)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    try:
        import ray
    except ImportError:
        raise SystemExit("this example needs Ray: pip install 'ray[data]'") from None

    if options.make:
        make_table(Path(options.make), options.seed)
    ray.init(num_cpus=options.cpus, include_dashboard=False, log_to_driver=False, object_store_memory=100 * 2**20)
    try:
        filesystem, path = fsspec.core.url_to_fs(options.data)
        handler = pa.fs.PyFileSystem(pa.fs.FSSpecHandler(filesystem))
        rows = ray.data.read_parquet(path, filesystem=handler).map_batches(scaled)
        train(rows, options)
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main()
