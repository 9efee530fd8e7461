"""examples/pytorch_planned.py, run as a reader of the documentation would: stopped in the middle, and run again."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from tests.support.node import DaemonNode, folder_daemon_node
from tests.support.ram import ram_folder

pytestmark = [pytest.mark.system, pytest.mark.slow]

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "pytorch_planned.py"
PICTURES = 40


@pytest.fixture
def node() -> Iterator[DaemonNode]:
    """A node with forty pictures of two classes at /data."""
    with ram_folder() as root, folder_daemon_node(root) as (node, folder):
        for number in range(PICTURES):
            of_class = folder / f"class{number % 2}"
            of_class.mkdir(exist_ok=True)
            Image.new("L", (32, 32), 60 + 120 * (number % 2) + number).save(of_class / f"{number}.png")
        yield node


def run(node: DaemonNode, *arguments: str) -> str:
    environment = os.environ | {"ORCHESTRA_CONFIG": str(node.config_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(EXAMPLE), "--data", "orchestra:///data", "--batch-size", "8", *arguments]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=110)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == ""
    return ended.stdout


def test_a_stopped_training_goes_on_with_the_rest(node: DaemonNode, tmp_path: Path) -> None:
    """Seven steps of five an epoch, then the rest of the second epoch and the third; files are fetched once, and
    the report says where the waiting went."""
    checkpoint = ["--checkpoint", str(tmp_path / "run.pt"), "--epochs", "3", "--workers", "1"]
    begun = run(node, *checkpoint, "--stop-after", "7")
    assert re.findall(r"epoch \d: (\d+) pictures", begun) == ["40"]
    assert "stopped in epoch 2 after 16 pictures of it" in begun
    ended = run(node, *checkpoint)
    assert re.findall(r"epoch (\d): (\d+) pictures", ended) == [("2", "24"), ("3", "40")]
    assert "waited" in ended
    assert run(node, *checkpoint).count("pictures,") == 0
    assert node.status()["fetch"]["requests"] == PICTURES


def test_the_example_explains_itself() -> None:
    """--help names every option."""
    printed = subprocess.run(
        [sys.executable, str(EXAMPLE), "--help"], capture_output=True, text=True, timeout=110, check=True
    ).stdout
    assert all(option in printed for option in ("--data", "--checkpoint", "--stop-after", "--workers"))
