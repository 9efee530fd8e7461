"""free, pin and unpin as a person types them, against a real daemon; du and stat beside them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.node import DaemonNode, folder_daemon_node
from tests.support.ram import ram_folder

pytestmark = pytest.mark.system

FILE = 16384


@pytest.fixture
def node() -> Iterator[tuple[DaemonNode, Path]]:
    """A node with room for ten files, and forty of them in two folders."""
    cache = {"size": 10 * FILE, "block_size": "16KiB", "extent_size": "64KiB", "eviction": "auto"}
    with ram_folder() as root, folder_daemon_node(root, cache=cache) as (running, store):
        for number in range(40):
            path = store / ("a" if number < 20 else "b") / f"{number:02}"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(bytes([number]) * FILE)
        yield running, store


def run(node: DaemonNode, *arguments: str, status: int = 0) -> subprocess.CompletedProcess[str]:
    """Run one command line and check its exit status."""
    command = [sys.executable, "-m", "orchestra", "--config", str(node.config_path), *arguments]
    result = subprocess.run(command, capture_output=True, check=False, timeout=60, text=True)
    assert result.returncode == status, result.stderr
    assert "Traceback" not in result.stderr
    return result


def usage(node: DaemonNode) -> dict[str, int]:
    """What `du` says is cached, by folder."""
    return {row["path"]: row["cached_bytes"] for row in json.loads(run(node, "du", "--json", "/data").stdout)}


def test_free_pin_and_unpin(node: tuple[DaemonNode, Path]) -> None:
    """A pinned folder stays through reads of everything else and a restart; free says what it dropped and what not."""
    running, _ = node
    client = running.client()
    for number in range(4):
        client.read_file(f"/data/a/{number:02}")
    assert "pinned, 64.0 KiB of it cached now" in run(running, "pin", "--partial", "/data/a").stdout
    running.stop()
    for number in range(20, 40):
        assert client.read_file(f"/data/b/{number}") == bytes([number]) * FILE
    assert usage(running) == {"/data/a": 4 * FILE, "/data/b": 6 * FILE, "/data": 10 * FILE}
    assert json.loads(run(running, "stat", "--json", "/data/a/00").stdout)["cached_bytes"] == FILE
    assert "/data/a" in run(running, "pin").stdout
    assert "freed 96.0 KiB; 64.0 KiB are pinned and stay" in run(running, "free", "/data").stdout
    assert usage(running) == {"/data/a": 4 * FILE, "/data/b": 0, "/data": 4 * FILE}
    assert "all of it (64.0 KiB) is pinned; run: orchestra unpin" in run(running, "free", "/data", status=1).stderr
    run(running, "unpin", "/data/a")
    assert "is not pinned" in run(running, "unpin", "/data/a", status=1).stderr
    assert "freed 64.0 KiB" in run(running, "free", "/data").stdout
    assert running.status()["used_bytes"] == 0


def test_a_pin_that_cannot_be_kept_is_refused(node: tuple[DaemonNode, Path]) -> None:
    """More than the cache, or than the mount's quota, is refused with both numbers, and pins nothing."""
    running, store = node
    error = run(running, "pin", "/data/a", status=1).stderr
    assert "it has 320.0 KiB, and the cache holds at most 160.0 KiB" in error
    run(running, "mount", "add", "/small", f"file://{store}/b", "--quota", "32KiB", "--ttl", "7d")
    error = run(running, "pin", "/small", status=1).stderr
    assert "it has 320.0 KiB, and the quota of /small is at most 32.0 KiB" in error
    assert json.loads(run(running, "pin", "--json").stdout) == []
    assert (
        "must hold at least one block"
        in run(running, "mount", "add", "/tiny", f"file://{store}/a", "--quota", "8KiB", status=1).stderr
    )


def test_a_quota_and_the_truth_about_it(node: tuple[DaemonNode, Path]) -> None:
    """A mount's quota holds while its files are read, and du says exactly what is there."""
    running, store = node
    run(running, "mount", "add", "/small", f"file://{store}/b", "--quota", "32KiB")
    client = running.client()
    for number in range(20, 40):
        assert client.read_file(f"/small/{number}") == bytes([number]) * FILE
    assert json.loads(run(running, "du", "-s", "--json", "/small").stdout)[0]["cached_bytes"] == 2 * FILE
    assert running.status()["used_bytes"] == 2 * FILE
