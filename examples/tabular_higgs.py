"""Train on a table of HIGGS's shape (28 features, a binary target): the standard DataLoader against TensorBatches.

    python examples/tabular_higgs.py --rows 1000000                      # made-up data of the same shape
    python examples/tabular_higgs.py --csv HIGGS.csv.gz --data /data/higgs
    python examples/tabular_higgs.py --data orchestra:///higgs --loader batches

The table is kept as Parquet in --data: it is written there once (from --csv, the file of the UCI repository, or made
up) and read on every later run; a path of the namespace (orchestra:///...) must have it already. Each loader trains the
same model from the same start; seconds per epoch, and ROC AUC on the last tenth of the rows, are printed and logged.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from orchestra.torch import TensorBatches

FEATURES = [f"f{number}" for number in range(28)]
TARGET = "label"


def convert_csv(source: str, table: Path) -> None:
    """Write HIGGS.csv(.gz), whose first column is the target and which has no header, as Parquet."""
    options = pyarrow.csv.ReadOptions(column_names=[TARGET, *FEATURES])
    with pa.input_stream(source) as stream, pyarrow.csv.open_csv(stream, read_options=options) as reader:
        schema = pa.schema([(name, pa.float32()) for name in (TARGET, *FEATURES)])
        with pyarrow.parquet.ParquetWriter(table, schema) as writer:
            for batch in reader:
                writer.write_table(pa.Table.from_batches([batch]).cast(schema))


def make_table(rows: int, table: Path, seed: int) -> None:
    """Write made-up rows: whether a row is a signal follows, with noise, from products of its features."""
    generator = np.random.default_rng(seed)
    features = generator.standard_normal((rows, len(FEATURES)), dtype=np.float32)
    score = features[:, 0] * features[:, 1] + features[:, 2] - np.abs(features[:, 3])
    target = (score + generator.standard_normal(rows) > np.median(score)).astype(np.float32)
    columns = [target, *(features[:, number] for number in range(len(FEATURES)))]
    pyarrow.parquet.write_table(pa.table(columns, names=[TARGET, *FEATURES]), table, row_group_size=100_000)


def find_table(options: argparse.Namespace) -> str:
    """Return the path of the Parquet file, made now if it must be."""
    if str(options.data).startswith("orchestra:"):
        return f"{options.data.rstrip('/')}/higgs.parquet"
    table = Path(options.data) / "higgs.parquet"
    if not table.exists():
        table.parent.mkdir(parents=True, exist_ok=True)
        began = time.perf_counter()
        if options.csv:
            convert_csv(options.csv, table)
        else:
            make_table(options.rows, table, options.seed)
        print(f"wrote {table} in {time.perf_counter() - began:.1f} s", flush=True)
    return str(table)


def roc_auc(scores: torch.Tensor, target: torch.Tensor) -> float:
    """Return the chance that a signal has a higher score than a background."""
    ranks = torch.empty(len(scores), dtype=torch.float64)
    ranks[scores.argsort()] = torch.arange(1, len(scores) + 1, dtype=torch.float64)
    signals = int((target > 0.5).sum())
    backgrounds = len(target) - signals
    return float((ranks[target > 0.5].sum() - signals * (signals + 1) / 2) / (signals * backgrounds))


def make_model(hidden: int, seed: int) -> nn.Module:
    """Return a perceptron with two hidden layers."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(len(FEATURES), hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 1)
    )


def run_epoch(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterable[Any]) -> float:
    """Train on every batch; return the seconds it took."""
    began = time.perf_counter()
    for features, target in batches:
        optimizer.zero_grad()
        loss = nn.functional.binary_cross_entropy_with_logits(model(features)[:, 0], target)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return time.perf_counter() - began


def make_log(folder: str | None) -> Any:
    """Return a TensorBoard writer, None if no log is wanted. Ends with a sentence where TensorBoard is missing."""
    if folder is None:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise SystemExit("--log-dir needs TensorBoard: pip install tensorboard") from None
    return SummaryWriter(folder)  # type: ignore[no-untyped-call, unused-ignore]


def train(name: str, batches: Iterable[Any], tested: tuple[torch.Tensor, ...], options: argparse.Namespace) -> float:
    """Train a fresh model, printing a line for each epoch; return the fastest epoch's seconds."""
    model = make_model(options.hidden, options.seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    log = make_log(options.log_dir)
    best_s = float("inf")
    for epoch in range(1, options.epochs + 1):
        time_s = run_epoch(model, optimizer, batches)
        best_s = min(best_s, time_s)
        with torch.no_grad():
            auc = roc_auc(model(tested[0])[:, 0], tested[1])
        print(f"{name}: epoch {epoch}: {time_s:.2f} s, ROC AUC {auc:.4f}", flush=True)
        if log is not None:
            log.add_scalar(f"{name}/seconds per epoch", time_s, epoch)
            log.add_scalar(f"{name}/ROC AUC", auc, epoch)
    if log is not None:
        log.close()
    return best_s


def parse_arguments() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description="Compare loaders on a table of HIGGS's shape.")
    parser.add_argument("--data", default="higgs-data", metavar="FOLDER", help="where higgs.parquet lies or is written")
    parser.add_argument("--csv", metavar="FILE", help="HIGGS.csv or HIGGS.csv.gz of the UCI repository")
    parser.add_argument("--rows", type=int, default=200_000, help="rows to make up where there is no --csv")
    parser.add_argument("--loader", choices=["both", "standard", "batches"], default="both")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--hidden", type=int, default=32, help="width of the model's layers (default: 32)")
    parser.add_argument("--workers", type=int, default=0, help="of the standard DataLoader (default: 0)")
    parser.add_argument("--log-dir", metavar="FOLDER", help="write a TensorBoard log there")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    """Find the table, then train with each loader."""
    options = parse_arguments()
    features, target = TensorBatches(find_table(options), features=FEATURES, target=TARGET).tensors
    kept = len(features) * 9 // 10
    trained, tested = (features[:kept], target[:kept]), (features[kept:], target[kept:])
    print(f"{len(features)} rows of {len(FEATURES)} features, {target.mean():.0%} signal", flush=True)
    seconds = {}
    shared: dict[str, Any] = {"batch_size": options.batch_size, "shuffle": True}
    if options.loader in ("both", "standard"):
        standard = DataLoader(TensorDataset(*trained), num_workers=options.workers, **shared)
        seconds["DataLoader(TensorDataset)"] = train("DataLoader(TensorDataset)", standard, tested, options)
    if options.loader in ("both", "batches"):
        seconds["TensorBatches"] = train("TensorBatches", TensorBatches(*trained, **shared), tested, options)
    if len(seconds) == 2:
        slow, fast = seconds.values()
        print(f"TensorBatches: {slow / fast:.1f} times as fast, {fast:.2f} s instead of {slow:.2f} s an epoch")


if __name__ == "__main__":
    main()
