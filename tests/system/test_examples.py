"""The examples, run as a reader of the documentation would: as processes, on small data, through a real node.

`pytorch_images*.py` and `tensorflow_images.py` are the demo's (test_demo_run.py).
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from tests.support.folder_node import FolderNode, folder_node
from tests.support.fuse_mounts import needs_fuse

pytestmark = [pytest.mark.system, pytest.mark.slow]

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
NAMES = sorted(path.name for path in EXAMPLES.glob("*.py"))


def needs(module: str) -> pytest.MarkDecorator:
    """Skip where a framework is not installed."""
    return pytest.mark.skipif(importlib.util.find_spec(module) is None, reason=f"{module} is not installed")


def run_example(name: str, *arguments: str, config: str | None = None) -> str:
    """Run an example in a fresh process and return what it printed; it must end well."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ORCHESTRA_")}
    if config is not None:
        environment["ORCHESTRA_CONFIG"] = config
    ended = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def figures(pattern: str, printed: str) -> list[float]:
    """Return every number that stands where the pattern has its group."""
    return [float(found) for found in re.findall(pattern, printed)]


@pytest.fixture
def node(tmp_path: Path) -> Iterator[FolderNode]:
    """A node whose namespace shows the folder `store` as /data."""
    with folder_node(tmp_path, freshness="1h") as running:
        yield running


# All in one process: importing torch eleven times would take longer than everything else here.
HELP = """
import runpy, sys
for name in sys.argv[1:]:
    sys.argv = [name, "--help"]
    try:
        runpy.run_path(name, run_name="__main__")
    except SystemExit as end:
        print("ended", end.code, name)
"""


def test_every_example_explains_itself() -> None:
    """--help answers, also where a framework is not installed."""
    paths = [str(EXAMPLES / name) for name in NAMES]
    command = [sys.executable, "-c", HELP, *paths]
    environment = os.environ | {"PYTHONPATH": str(EXAMPLES)}
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=110, check=True).stdout
    for path in paths:
        assert f"usage: {Path(path).name} " in printed
        assert f"ended 0 {path}\n" in printed


def test_the_tour_was_run_and_is_small() -> None:
    """Every cell of code compiles and has been executed in order; what it shows takes less than 100 kB."""
    notebook = json.loads((EXAMPLES / "tour.ipynb").read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for number, cell in enumerate(cells, 1):
        assert cell["execution_count"] == number
        compile("".join(cell["source"]), f"cell {number}", "exec")
    assert len(json.dumps(notebook)) < 100_000


@needs("nbclient")
@needs("matplotlib")
def test_the_tour_runs() -> None:
    """From the origin's start to the plot; warm and planned are faster than cold."""
    nbformat, nbclient = importlib.import_module("nbformat"), importlib.import_module("nbclient")
    notebook = nbformat.read(EXAMPLES / "tour.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=90, resources={"metadata": {"path": str(EXAMPLES)}}).execute()
    (said,) = [output for cell in notebook.cells for output in cell.get("outputs", []) if "cold" in str(output)]
    seconds = ast.literal_eval(said["data"]["text/plain"])
    assert max(seconds["warm"], seconds["cold, planned"]) < seconds["cold"]


def test_two_ranks_train_on_their_shares(node: FolderNode) -> None:
    """Every picture is seen once an epoch by one of two ranks, and the loss falls."""
    for number in range(40):
        folder = node.store / "pictures" / f"class{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("L", (32, 32), 60 + 120 * (number % 2) + number).save(folder / f"{number}.png")
    printed = run_example(
        "pytorch_ddp.py",
        "--data",
        "orchestra:///data/pictures",
        "--epochs",
        "3",
        "--batch-size",
        "4",
        config=node.config,
    )
    assert figures(r"(\d+) pictures by 2 ranks", printed) == [40, 40, 40]
    losses = figures(r"loss ([\d.]+)", printed)
    assert losses[2] < losses[0]


def test_ids_with_dictionaries_are_learned(node: FolderNode) -> None:
    """Files made in the store are read through the namespace by two workers."""
    runpy.run_path(str(EXAMPLES / "pytorch_ids.py"))["make_files"](node.store, 200, seed=0)
    printed = run_example("pytorch_ids.py", "--data", "orchestra:///data", "--epochs", "2", config=node.config)
    assert figures(r"(\d+) samples", printed) == [160, 160]
    assert figures(r"accuracy ([\d.]+)", printed)[-1] > 0.8


def test_both_loaders_of_the_higgs_example_learn_alike(tmp_path: Path) -> None:
    """The same batches give the same AUC, epoch for epoch."""
    printed = run_example("tabular_higgs.py", "--data", str(tmp_path), "--rows", "4000", "--batch-size", "64")
    standard = figures(r"TensorDataset\): epoch \d: .* AUC ([\d.]+)", printed)
    ours = figures(r"TensorBatches: epoch \d: .* AUC ([\d.]+)", printed)
    assert standard == ours
    assert ours[1] > 0.6


def test_the_real_higgs_file_is_understood(tmp_path: Path) -> None:
    """A CSV without a header, the target in front, as the UCI repository has it; kept as Parquet."""
    rows = [",".join([f"{number % 2:.18e}", *(f"{number * k % 7:.18e}" for k in range(28))]) for number in range(500)]
    (tmp_path / "HIGGS.csv").write_text("\n".join(rows) + "\n")
    printed = run_example(
        "tabular_higgs.py", "--csv", str(tmp_path / "HIGGS.csv"), "--data", str(tmp_path), "--loader", "batches"
    )
    assert "500 rows of 28 features, 50% signal" in printed
    assert (tmp_path / "higgs.parquet").exists()


def test_every_step_of_the_cubing_ladder_gives_a_rate() -> None:
    """Six ways, two of them with one and two workers."""
    printed = run_example("speed_cubing.py", "--tables", "3", "--size", "20", "--cube", "5", "--seconds", "0.01")
    rates = figures(r"\d +([\d.]+) +\d+\n", printed)
    assert len(rates) == 8
    assert all(rate > 0 for rate in rates)


@needs("tensorflow")
def test_tensorflow_reads_records(tmp_path: Path) -> None:
    """Eight shards are written, read in parallel and learned."""
    printed = run_example("tensorflow_tfrecords.py", "--data", str(tmp_path), "--make", "400")
    assert figures(r"(\d+) shards", printed) == [8, 8]
    assert figures(r"accuracy ([\d.]+)", printed)[-1] > 0.8


@needs("pyspark")
@needs_fuse
@pytest.mark.skipif(shutil.which("java") is None, reason="Java is not installed")
def test_spark_prepares_what_torch_reads(node: FolderNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Spark reads a mounted folder and writes Parquet into the store; torch finds every row of it in the namespace and
    learns."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    runpy.run_path(str(EXAMPLES / "spark_to_torch.py"))["make_rows"](node.store / "raw", 2000, seed=0)
    mounted = tmp_path / "mnt"
    mounted.mkdir()
    fuse = [sys.executable, "-m", "orchestra", "--config", node.config, "fuse"]
    subprocess.run([*fuse, "mount", "/data", str(mounted)], check=True, timeout=60)
    try:
        printed = run_example(
            "spark_to_torch.py",
            *("--input", str(mounted / "raw"), "--output", str(node.store / "features")),
            *("--table", "orchestra:///data/features"),
            config=node.config,
        )
    finally:
        subprocess.run([*fuse, "umount", str(mounted)], check=True, timeout=60)
    assert figures(r"(\d+) rows, 4 files", printed) == [2000] * 3
    assert figures(r"accuracy ([\d.]+)", printed)[-1] > 0.75


@needs("ray")
def test_ray_reads_through_the_namespace(node: FolderNode) -> None:
    """All rows arrive every epoch, and the error falls."""
    printed = run_example(
        "ray_data.py", "--data", "orchestra:///data/table", "--make", str(node.store / "table"), config=node.config
    )
    assert figures(r"(\d+) rows", printed) == [4000, 4000]
    errors = figures(r"error ([\d.]+)", printed)
    assert errors[1] < errors[0]
