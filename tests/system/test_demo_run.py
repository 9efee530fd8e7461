"""`orchestra demo` as a newcomer runs it: real server, real mount, real training, every byte verified."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [
    pytest.mark.system,
    pytest.mark.slow,
    pytest.mark.timeout(300),  # half a minute by itself; the other worker of a 2-core machine is busy too
]
DEMO = [sys.executable, "-m", "orchestra", "demo"]


def run_demo(tmp_path: Path, *arguments: str, wrapper: tuple[str, ...] = ()) -> tuple[dict[str, Any], str]:
    """Run the demo with --json; return its one object and what it said on standard error."""
    ended = subprocess.run(
        [*wrapper, *DEMO, "--json", *arguments],
        env=os.environ | {"TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout), ended.stderr


def check_report(report: dict[str, Any], face: str) -> None:
    """Assert what the demo promises, whatever the face."""
    assert report["face"] == face
    assert report["verified_files"] == 1798
    assert report["verified_bytes"] > 13_000_000
    assert report["accuracy"] > 0.85
    cold, warm = report["epochs"]
    assert cold["store_requests"] >= 1797
    assert cold["hit_ratio"] < 0.5
    assert (warm["store_requests"], warm["store_bytes"], warm["hit_ratio"]) == (0, 0, 1.0)
    for epoch in (cold, warm):
        assert epoch["time_s"] > 0
        assert epoch["images_per_s"] > 0
        assert 0 <= epoch["data_wait_fraction"] <= 1


def test_the_demo_trains_from_a_mounted_bucket_and_leaves_nothing(tmp_path: Path) -> None:
    """The second epoch sends no request, every byte is right, and afterwards neither folder nor mount is left."""
    report, _ = run_demo(tmp_path, "--face", "fuse")
    check_report(report, "fuse")
    assert list(tmp_path.glob("orchestra-demo-*")) == []
    assert str(tmp_path) not in Path("/proc/self/mounts").read_text()


@pytest.mark.skipif(os.getuid() != 0, reason="hiding /dev/fuse takes root")
def test_where_nothing_can_be_mounted_the_demo_says_so_and_reads_through_fsspec(tmp_path: Path) -> None:
    """Without /dev/fuse the demo says so in one line and keeps every promise through fsspec."""
    without_fuse = ("unshare", "--mount", "sh", "-c", 'mount --bind /dev/null /dev/fuse && exec "$@"', "sh")
    report, said = run_demo(tmp_path, wrapper=without_fuse)
    check_report(report, "fsspec")
    assert len([line for line in said.splitlines() if line.startswith("no folder can be mounted here")]) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demo_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    """Ended in the middle of its training, the demo unmounts, stops what it started and removes its folder."""
    with subprocess.Popen(
        DEMO, env=os.environ | {"TMPDIR": str(tmp_path)}, stdout=subprocess.PIPE, text=True, bufsize=1
    ) as demo:
        assert demo.stdout is not None
        for line in demo.stdout:
            if line.startswith("training:"):
                break
        demo.send_signal(number)
    assert demo.returncode == 130
    assert list(tmp_path.glob("orchestra-demo-*")) == []
    assert str(tmp_path) not in Path("/proc/self/mounts").read_text()
    assert processes_with(str(tmp_path)) == []


def processes_with(text: str) -> list[str]:
    """Return the command lines of running processes that hold `text`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if text in command:
            found.append(command)
    return found
