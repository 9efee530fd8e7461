"""Spark prepares features from the mounted namespace, torch trains on them through it: one copy of the data for both.

    orchestra fuse mount /mnt/orchestra
    python examples/spark_to_torch.py --input /mnt/orchestra/raw --output /stores/features \\
        --table orchestra:///features

--input is a folder of CSV files (columns user, item, spent, visits, bought), read by Spark as plain files. Spark writes
Parquet into --output, a folder that is attached to the namespace (`orchestra mount add /features
file:///stores/features`); --table is the same folder as the namespace shows it. `--make N` first writes N rows to the
folder --input. Needs pyspark and Java.
"""

from __future__ import annotations

import argparse
import csv
import random
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from orchestra.client.filesets import find_files
from orchestra.torch import TensorBatches

FEATURES = ["log_spent", "visits", "spent_per_visit", "user_visits"]
TARGET = "bought"
COLUMNS = ["user", "item", "spent", "visits", "bought"]


def make_rows(folder: Path, count: int, seed: int) -> None:
    """Write rows of made-up visits as four CSV files: who spends more per visit buys more."""
    folder.mkdir(parents=True, exist_ok=True)
    chance = random.Random(seed)
    for part in range(4):
        with (folder / f"part-{part}.csv").open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(COLUMNS)
            for _ in range(count // 4):
                spent, visits = chance.expovariate(0.02), chance.randint(1, 20)
                bought = int(spent / visits + chance.gauss(0, 2) > 5)
                rows.writerow([chance.randrange(50), chance.randrange(100), f"{spent:.2f}", visits, bought])


def prepare(options: argparse.Namespace) -> None:
    """Let Spark read the CSV files, make features and write them as Parquet."""
    try:
        from pyspark.sql import SparkSession, functions
        from pyspark.sql.window import Window
    except ImportError:
        raise SystemExit("this example needs Spark: pip install pyspark, and Java") from None

    builder = SparkSession.builder.master(f"local[{options.cores}]").appName("spark_to_torch")
    settings = {"spark.ui.enabled": "false", "spark.sql.shuffle.partitions": "4", "spark.driver.host": "127.0.0.1"}
    for name, value in settings.items():
        builder = builder.config(name, value)
    session = builder.getOrCreate()
    session.sparkContext.setLogLevel("ERROR")
    try:
        rows = session.read.csv(str(Path(options.input).resolve()), header=True, inferSchema=True)
        features = rows.select(
            functions.log1p("spent").alias("log_spent"),
            functions.col("visits").cast("double").alias("visits"),
            (functions.col("spent") / functions.col("visits")).alias("spent_per_visit"),
            functions.avg("visits").over(Window.partitionBy("user")).alias("user_visits"),
            functions.col("bought").cast("double").alias(TARGET),
        )
        features.repartition(4).write.mode("overwrite").parquet(str(Path(options.output).resolve()))
    finally:
        session.stop()


def train(options: argparse.Namespace) -> None:
    """Train a logistic model on the Parquet files, as the namespace shows them."""
    torch.manual_seed(options.seed)
    parts = find_files(options.table, suffix=".parquet")
    batches = TensorBatches(list(parts.paths), batch_size=256, shuffle=True, features=FEATURES, target=TARGET)
    model = nn.Sequential(nn.BatchNorm1d(len(FEATURES)), nn.Linear(len(FEATURES), 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-2)
    for epoch in range(1, options.epochs + 1):
        began = time.perf_counter()
        right = 0
        for features, target in batches:
            optimizer.zero_grad()
            score = model(features)[:, 0]
            nn.functional.binary_cross_entropy_with_logits(score, target).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            right += int(((score > 0) == (target > 0.5)).sum())
        print(
            f"epoch {epoch}: {time.perf_counter() - began:.2f} s, {batches.row_count} rows, {len(parts.paths)} files, "
            f"accuracy {right / batches.row_count:.3f}",
            flush=True,
        )


def parse_arguments() -> Any:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description="Spark prepares features, torch trains on them.")
    parser.add_argument("--input", required=True, metavar="FOLDER", help="CSV files, on a mount for instance")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="a folder that is attached as a store")
    parser.add_argument("--table", required=True, metavar="PATH", help="that folder in the namespace: orchestra:///...")
    parser.add_argument("--make", type=int, metavar="ROWS", help="first write so many rows to the folder --input")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--cores", type=int, default=2, help="for Spark (default: 2)")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    """Prepare, then train."""
    options = parse_arguments()
    if options.make:
        make_rows(Path(options.input), options.make, options.seed)
    began = time.perf_counter()
    prepare(options)
    print(f"Spark wrote {options.output} in {time.perf_counter() - began:.1f} s", flush=True)
    train(options)


if __name__ == "__main__":
    main()
