"""Does DLIO's training keep its accelerator as busy on the mount as on a local folder? Two workloads, made small.

    LD_LIBRARY_PATH=D/lib PYTHONPATH=D/lib/python3.11/site-packages:D/stub python benchmarks/dlio.py [--record]

D is filled with `pip install --no-deps --prefix D dlio-benchmark mpi4py mpich hydra-core omegaconf
antlr4-python3-runtime==4.9.3 h5py Pillow PyYAML pydftracer==1.0.2`, and D/stub with empty modules `tensorflow`,
`tensorflow.python` and `tensorflow.python.framework.errors`, which DLIO imports and torch workloads leave alone. A turn
on a mount begins with nothing cached: with `prefetch = "dataset"`, where the node does not know DLIO's order, and with
the order told to it by one line (dlio_planned.py).
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from common import (
    HERE,
    common_arguments,
    drop_page_cache,
    machine_state,
    publish,
    refuse_a_busy_machine,
    running_origin,
    verdict,
    workspace,
)
from contestants import OrchestraMount, clean_environment
from origin import BUCKET

LATENCY_MS = 50
_UTILIZATION = re.compile(r"Training Accelerator Utilization \[AU\] \(%\): ([0-9.]+)")
# A 73rd of unet3d's volumes and their batches; resnet50's images one to a file, as torch reads them.
SHARED = (
    "workload=unet3d_h100",
    "dataset.record_length_stdev=0",
    "dataset.record_length_resize=0",
    "dataset.num_files_eval=4",  # a store has no empty folders, and DLIO lists this one
    "workflow.checkpoint=False",
)
WORKLOADS = {
    "unet3d": (*SHARED, "dataset.record_length=2000000", "reader.batch_size=4"),
    "resnet50": (*SHARED, "dataset.record_length=114660", "reader.batch_size=32"),
}


# Full runs of some 40 and 20 seconds.
FILES = {"unet3d": 256, "resnet50": 1024}
TRAIN = ("workflow.train=True", "train.epochs=2", "reader.read_threads=2")


class DatasetMount(OrchestraMount):
    """The folder, loading itself behind what is read."""

    name = 'prefetch = "dataset"'
    mount_settings = name
    command: tuple[str, ...] = ("-m", "dlio_benchmark.main")

    def surroundings(self) -> Mapping[str, str]:
        """Return the environment of the training process."""
        return self.environment | {"BENCH_CONFIG": str(self.config)}


class PlannedMount(DatasetMount):
    """The folder, with one line in DLIO."""

    name = "PlannedSampler"
    mount_settings = 'prefetch = "none"'
    command = (str(HERE / "dlio_planned.py"),)


def dlio(
    workload: str,
    data: Path,
    out: Path,
    files: int,
    *more: str,
    command: tuple[str, ...] = DatasetMount.command,
    environment: Mapping[str, str] | None = None,
) -> str:
    """Run DLIO; return what it printed."""
    settings = [*WORKLOADS[workload], f"dataset.data_folder={data}", f"dataset.num_files_train={files}", *more]
    words = [word if word.startswith("workload=") else f"++workload.{word}" for word in settings]
    ended = subprocess.run(
        [sys.executable, *command, *words, f"hydra.run.dir={out}"],
        env={**(environment or clean_environment()), "DFTRACER_ENABLE": "0"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    if ended.returncode:
        raise SystemExit(f"DLIO failed: {ended.stderr.strip()[-500:]}")
    return ended.stdout + ended.stderr


def utilization(printed: str) -> float:
    """Return the accelerator utilisation that DLIO printed, between 0 and 1."""
    found = _UTILIZATION.search(printed)
    if found is None:
        raise SystemExit("DLIO printed no accelerator utilisation")
    return float(found[1]) / 100


def trained(kind: type[DatasetMount], workload: str, folder: Path, files: int) -> float:
    """Train on a mount that begins with nothing; return the utilisation."""
    with running_origin("--folder", str(folder / "data"), "--latency-ms", str(LATENCY_MS)) as origin:
        mount = kind(Path(tempfile.mkdtemp(dir=folder)), origin.url)
        mount.start()
        try:
            printed = dlio(
                *(workload, mount.mountpoint / BUCKET / workload, folder / "out", files, *TRAIN),
                command=kind.command,
                environment=mount.surroundings(),
            )
            return utilization(printed)
        finally:
            mount.close()


def compare(workload: str, folder: Path, files: int, turns: int) -> list[str]:
    """Train on the local folder and on the mounts in turn; return the lines of the result."""
    data, out = folder / "data" / workload, folder / "out"
    dlio(workload, data, out, files, "workflow.generate_data=True", "workflow.train=False")
    local: list[float] = []
    mounted: dict[type[DatasetMount], list[float]] = {DatasetMount: [], PlannedMount: []}
    for _ in range(turns):
        drop_page_cache()
        local.append(utilization(dlio(workload, data, out, files, *TRAIN)))
        for kind, runs in mounted.items():
            runs.append(trained(kind, workload, folder, files))
            print(f"  {workload}, {kind.name}: {runs[-1]:.3f}, local folder {local[-1]:.3f}", file=sys.stderr)
    lines = [f"- {workload}, {files} files: utilisation on a local folder {shown(local)}"]
    for kind, runs in mounted.items():
        lines.append(f"- {workload}, {kind.name}: {shown(runs)}")
        ratio = statistics.median(runs) / statistics.median(local)
        lines.append(verdict(f"{workload}, {kind.name} / local folder", ratio, 0.98))
    return lines


def shown(utilizations: list[float]) -> str:
    """Return them as text."""
    return " ".join(f"{one:.3f}" for one in utilizations)


def main() -> None:
    """Run both workloads and publish."""
    parser: argparse.ArgumentParser = common_arguments("DLIO's unet3d and resnet50-like workloads on the mount.")
    parser.set_defaults(turns=2)
    options = parser.parse_args()
    refuse_a_busy_machine(options.force or options.quick)
    state, turns = machine_state(), 1 if options.quick else options.turns
    files = dict.fromkeys(WORKLOADS, 64) if options.quick else FILES
    os.environ.setdefault("OMPI_ALLOW_RUN_AS_ROOT", "1")
    with workspace() as folder:
        lines = [line for workload in WORKLOADS for line in compare(workload, folder, files[workload], turns)]
    publish(f"DLIO: two epochs, {LATENCY_MS} ms to the store", lines, options, state)


if __name__ == "__main__":
    main()
