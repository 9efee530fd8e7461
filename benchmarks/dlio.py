"""Does DLIO's training keep its accelerator as busy on the mount as on a local folder? Two workloads, made small.

    LD_LIBRARY_PATH=D/lib PYTHONPATH=D/lib/python3.11/site-packages:D/stub python benchmarks/dlio.py [--record]

D is filled with `pip install --no-deps --prefix D dlio-benchmark mpi4py mpich hydra-core omegaconf
antlr4-python3-runtime==4.9.3 h5py Pillow PyYAML pydftracer==1.0.2`, and D/stub with empty modules `tensorflow`,
`tensorflow.python` and `tensorflow.python.framework.errors`, which DLIO imports and torch workloads leave alone. A turn
on the mount begins with nothing cached, with `prefetch = "dataset"`; DLIO's order is not known to the node.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

from common import (
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


class DatasetMount(OrchestraMount):
    """The folder, loading itself behind what is read."""

    mount_settings = 'prefetch = "dataset"'


def dlio(workload: str, data: Path, out: Path, files: int, *more: str) -> str:
    """Run DLIO; return what it printed."""
    settings = [*WORKLOADS[workload], f"dataset.data_folder={data}", f"dataset.num_files_train={files}", *more]
    words = [word if word.startswith("workload=") else f"++workload.{word}" for word in settings]
    command = [sys.executable, "-m", "dlio_benchmark.main", *words, f"hydra.run.dir={out}"]
    environment = clean_environment() | {"DFTRACER_ENABLE": "0"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    if ended.returncode:
        raise SystemExit(f"DLIO failed: {ended.stderr.strip()[-500:]}")
    return ended.stdout + ended.stderr


def utilization(printed: str) -> float:
    """Return the accelerator utilisation that DLIO printed, between 0 and 1."""
    found = _UTILIZATION.search(printed)
    if found is None:
        raise SystemExit("DLIO printed no accelerator utilisation")
    return float(found[1]) / 100


def compare(workload: str, folder: Path, files: int, turns: int) -> list[str]:
    """Train on the local folder and on the mount in turn; return the lines of the result."""
    data, out = folder / "data" / workload, folder / "out"
    train = ["workflow.train=True", "train.epochs=2", "reader.read_threads=2"]
    dlio(workload, data, out, files, "workflow.generate_data=True", "workflow.train=False")
    local: list[float] = []
    mounted: list[float] = []
    for turn in range(turns):
        drop_page_cache()
        local.append(utilization(dlio(workload, data, out, files, *train)))
        with running_origin("--folder", str(folder / "data"), "--latency-ms", str(LATENCY_MS)) as origin:
            mount = DatasetMount(folder / f"{workload}{turn}", origin.url)
            mount.start()
            try:
                where = mount.mountpoint / BUCKET / workload
                mounted.append(utilization(dlio(workload, where, out, files, *train)))
            finally:
                mount.close()
    ratio = statistics.median(mounted) / statistics.median(local)
    shown = " ".join(f"{one:.3f}" for one in local), " ".join(f"{one:.3f}" for one in mounted)
    return [
        f"- {workload}, {files} files: utilisation on a local folder {shown[0]}, on the mount {shown[1]}",
        verdict(f"{workload}, mount / local folder", ratio, 0.98),
    ]


def main() -> None:
    """Run both workloads and publish."""
    parser: argparse.ArgumentParser = common_arguments("DLIO's unet3d and resnet50-like workloads on the mount.")
    parser.set_defaults(turns=2)
    options = parser.parse_args()
    refuse_a_busy_machine(options.force or options.quick)
    state, files, turns = machine_state(), 64 if options.quick else 512, 1 if options.quick else options.turns
    os.environ.setdefault("OMPI_ALLOW_RUN_AS_ROOT", "1")
    with workspace() as folder:
        lines = [line for workload in WORKLOADS for line in compare(workload, folder, files, turns)]
    publish(f"DLIO: two epochs, {LATENCY_MS} ms to the store", lines, options, state)


if __name__ == "__main__":
    main()
