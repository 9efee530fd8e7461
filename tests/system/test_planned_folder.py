"""A plan for paths in a mounted folder, and `orchestra stalls`, as a user types them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestra.torch import PlannedSampler
from tests.support.fuse_mounts import needs_fuse
from tests.support.node import PATIENCE_S, DaemonNode, folder_daemon_node
from tests.support.training import sample_bytes, write_samples

pytestmark = pytest.mark.system

COUNT = 30


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[DaemonNode]:
    """A node whose mounts keep their records in the test's own folder."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    with folder_daemon_node(tmp_path, freshness="1h") as (node, folder):
        write_samples(folder, COUNT)
        yield node


def run(node: DaemonNode, *arguments: str) -> str:
    command = [sys.executable, "-m", "orchestra", "--config", str(node.config_path), *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, env=os.environ)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@needs_fuse
def test_paths_in_a_mounted_folder_are_planned(node: DaemonNode, tmp_path: Path) -> None:
    """The script names files of the folder; the node fetches each once by the plan, and the folder serves them."""
    folder = tmp_path / "mnt"
    folder.mkdir()
    run(node, "fuse", "mount", "/data", str(folder))
    try:
        paths = [folder / f"f{index}" for index in range(COUNT)]
        sampler = PlannedSampler(paths, 5, config=str(node.config_path))
        read = [index for index in sampler if paths[index].read_bytes() == sample_bytes(index)]
        assert sorted(read) == list(range(COUNT))
        (plan,) = node.client().daemon_request("GET", "/v1/plans")["plans"]
        assert (plan["position"], plan["failed"]) == (COUNT, 0)
        assert node.status()["fetch"]["requests"] == COUNT
        sampler.close()
    finally:
        run(node, "fuse", "umount", str(folder))


def test_stalls_says_what_was_waited_for(node: DaemonNode) -> None:
    """Nothing at first; after cold reads the causes, the minute, the plans and a sentence; the same numbers as JSON."""
    assert "no reader of this node has waited for anything" in run(node, "stalls")
    client = node.client()
    for index in range(COUNT):
        client.read_file(f"/data/f{index}")
    sampler = PlannedSampler(
        [f"orchestra:///data/f{index}" for index in range(COUNT)], None, config=str(node.config_path)
    )
    assert list(sampler) == list(range(COUNT))
    printed = run(node, "stalls")
    for words in (
        "CAUSE",
        "store",
        "metadata",
        "this minute",
        f"{COUNT} of {COUNT}",
        "readers waited",
        "over all readers",
    ):
        assert words in printed
    body = json.loads(run(node, "stalls", "--json"))
    figures = body["figures"]
    assert figures["misses"] == COUNT
    assert figures["fetched_bytes"] == figures["read_bytes"] == sum(len(sample_bytes(index)) for index in range(COUNT))
    assert min(figures["waits"]["store_s"], figures["waits"]["metadata_s"], figures["store_busy_s"]) > 0
    assert body["advice"].startswith("readers waited")
    assert body["plans"][0]["samples"] == COUNT
    sampler.close()
