"""`orchestra load` and `orchestra job` as a person types them, against a real daemon and an S3 server that counts."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from common import OriginProcess, running_origin

from tests.support.node import DaemonNode, daemon_node
from tests.support.ram import ram_folder

pytestmark = pytest.mark.system

COUNT, SIZE = 240, 50_000
REQUESTS_MAX = 8


@pytest.fixture(scope="module")
def origin() -> Iterator[OriginProcess]:
    """240 objects in folders of a hundred."""
    with running_origin("--dataset", f"set:{COUNT}x{SIZE}") as running:
        yield running


@contextmanager
def loading_node(origin: OriginProcess, **tables: Any) -> Iterator[DaemonNode]:
    """A node with the origin at /data; the origin's counters are at zero."""
    options = {"endpoint_url": origin.url, "key": "k", "secret": "${LOAD_TEST_SECRET}"}
    mounts = [{"path": "/data", "uri": "s3://bench", "options": options, "freshness": "1h"}]
    os.environ["LOAD_TEST_SECRET"] = "s"
    with ram_folder() as root, daemon_node(root, mounts=mounts, fetch={"requests_max": REQUESTS_MAX}, **tables) as node:
        origin.call("/__reset")
        yield node


@pytest.fixture
def node(origin: OriginProcess) -> Iterator[DaemonNode]:
    """A node with room for everything."""
    with loading_node(origin) as running:
        yield running


def command(node: DaemonNode, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "orchestra", "--config", str(node.config_path), *arguments]


def run(node: DaemonNode, *arguments: str, status: int = 0, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run one command line and check its exit status."""
    result = subprocess.run(
        command(node, *arguments), capture_output=True, check=False, timeout=60, text=True, input=stdin
    )
    assert result.returncode == status, result.stderr
    assert "Traceback" not in result.stderr
    return result


def gets(origin: OriginProcess) -> int:
    """Requests for objects since the reset."""
    return int(Counter(origin.call("/__stats", "GET")["requests"])["GET"])


def job_of(node: DaemonNode, job_id: str) -> dict[str, Any]:
    return dict(json.loads(run(node, "job", "status", "--json", job_id).stdout))


def test_a_load_is_started_waited_for_and_listed(node: DaemonNode, origin: OriginProcess) -> None:
    """Without --wait it says the job's number; wait ends with 0 when all is there, and ls and status show it."""
    started = run(node, "load", "/data/set")
    assert started.stdout.startswith(f"job 1: loading {COUNT} files, 11.4 MiB") or "SUCCEEDED" in started.stdout
    assert "SUCCEEDED" in run(node, "job", "wait", "1").stdout
    assert gets(origin) == COUNT
    job = job_of(node, "1")
    assert (job["state"], job["files_done"], job["bytes_done"]) == ("SUCCEEDED", COUNT, COUNT * SIZE)
    assert "100 %" in run(node, "job", "ls").stdout
    assert [one["id"] for one in json.loads(run(node, "job", "ls", "--json").stdout)] == ["1"]
    assert json.loads(run(node, "load", "--wait", "--verify", "--json", "/data/set").stdout)["blocks_damaged"] == 0
    assert gets(origin) == COUNT


def test_what_does_not_fit_is_one_line_and_status_1(origin: OriginProcess) -> None:
    """In a script nobody is asked; --partial loads what fits and ends with 0."""
    with loading_node(origin, cache={"size": "4MiB", "block_size": "64KiB", "extent_size": "256KiB"}) as node:
        result = run(node, "load", "--wait", "/data/set", status=1)
        line = "needs 12.2 MiB, 4.0 MiB free: would hold 32 % (--partial loads as much as fits)"
        assert result.stderr == f"orchestra: load of /data/set: {line}\n"
        assert gets(origin) == 0
        job = json.loads(run(node, "load", "--wait", "--partial", "--json", "/data/set").stdout)
        assert (job["state"], job["files_done"]) == ("SUCCEEDED", 78)
        assert gets(origin) == 78


def test_on_a_terminal_it_asks_and_shows_progress(origin: OriginProcess) -> None:
    """Whoever sits there is asked whether a part will do."""
    with loading_node(origin, cache={"size": "4MiB", "block_size": "64KiB", "extent_size": "256KiB"}) as node:
        node.start()
        theirs, ours = pty.openpty()
        with subprocess.Popen(
            command(node, "load", "--wait", "/data/set"), stdin=ours, stdout=ours, stderr=ours
        ) as load:
            os.close(ours)
            seen = b""
            while b"[y/N]" not in seen:
                seen += os.read(theirs, 1000)
            os.write(theirs, b"y\n")
            while True:
                try:
                    seen += os.read(theirs, 1000)
                except OSError:  # the other end is closed
                    break
            os.close(theirs)
            assert load.wait(60) == 0, seen
    assert b"would hold 32 %" in seen
    assert b"78/240 files" in seen
    assert b"SUCCEEDED" in seen


def test_a_list_from_standard_input_is_loaded(node: DaemonNode, origin: OriginProcess) -> None:
    """A path a line, below PATH; what is not there makes it status 1 and is named."""
    run(node, "load", "--wait", "--list", "-", "/data/set", stdin="00/0001.bin\n00/0002.bin\n")
    assert gets(origin) == 2
    result = run(node, "load", "--wait", "--list", "-", "/data/set", stdin="00/0003.bin\nnothing\n", status=1)
    assert "1 of 2 files failed; first: /data/set/nothing: " in result.stderr
    assert run(node, "load", "--list", "/nowhere", "/data", status=1).stderr.count("\n") == 1


def test_a_list_that_is_a_pipe_of_the_command_is_read_by_it(node: DaemonNode, origin: OriginProcess) -> None:
    """What the shell's <(find ...) and /dev/stdin are here is another file, or none, in the daemon: it would load
    nothing and call that a success."""
    run(node, "load", "--wait", "--list", "/dev/stdin", "/data/set", stdin="00/0001.bin\n00/0002.bin\n")
    assert gets(origin) == 2


def test_bad_input_is_one_line(node: DaemonNode) -> None:
    """A missing path, a job that there is not, a rate that is none, and a list of what failed end with one line."""
    assert "/data/nothing" in run(node, "load", "--wait", "/data/nothing", status=1).stderr
    assert run(node, "job", "status", "77", status=1).stderr.count("\n") == 1
    assert run(node, "job", "stop", "1", status=1).stderr.count("\n") == 1
    assert "--bandwidth" in run(node, "load", "--bandwidth", "fast", "/data", status=2).stderr
    assert "nothing to retry" in run(node, "load", "--retry", "/data/nothing", status=1).stderr
    assert "give one of them" in run(node, "load", "--retry", "--list", "-", "/data", status=2).stderr


def slow_load(node: DaemonNode, *more: str) -> str:
    """Start a load that takes ten seconds; return its number when a part of it is there."""
    job = json.loads(run(node, "load", "--json", "--bandwidth", "1200kB/s", *more, "/data/set").stdout)
    while job["files_done"] < 20:
        assert job["state"] in ("CREATED", "RUNNING")
        job = job_of(node, job["id"])
    return str(job["id"])


def test_a_load_is_stopped(node: DaemonNode, origin: OriginProcess) -> None:
    """`job stop` ends it, `job wait` then has status 1, and another load fetches the rest."""
    job_id = slow_load(node)
    assert run(node, "job", "stop", job_id).stdout == f"job {job_id}: STOPPED\n"
    assert "STOPPED" in run(node, "job", "wait", job_id, status=1).stderr
    assert gets(origin) < COUNT
    run(node, "load", "--wait", "/data/set")
    assert gets(origin) == COUNT


def test_ctrl_c_leaves_the_load_running(node: DaemonNode) -> None:
    """Who stops waiting is told how to stop the load, which goes on."""
    with subprocess.Popen(
        command(node, "load", "--wait", "--bandwidth", "1200kB/s", "/data/set"),
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background jobs, and so their children, begin with SIGINT ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as load:
        assert load.stderr is not None
        first = load.stderr.readline()
        load.send_signal(signal.SIGINT)
        rest = load.stderr.read()
        assert load.wait(60) == 130
    assert "files" in first
    assert "job 1 goes on; stop it with: orchestra job stop 1" in rest
    assert job_of(node, "1")["state"] == "RUNNING"
    run(node, "job", "stop", "1")


def test_a_killed_daemon_goes_on_where_it_was(node: DaemonNode, origin: OriginProcess) -> None:
    """kill -9 with requests in flight: the next daemon ends the same job, and what was there is not fetched again: no
    more requests than files and those that were in flight."""
    origin.set(latency_ms=20)
    job_id = slow_load(node)
    pid = int(node.status()["pid"])
    os.kill(pid, signal.SIGKILL)
    before = gets(origin)
    assert before < COUNT
    assert "SUCCEEDED" in run(node, "job", "wait", job_id).stdout
    origin.set(latency_ms=0)
    assert int(node.status()["pid"]) != pid
    assert COUNT <= gets(origin) <= COUNT + REQUESTS_MAX
    usage = json.loads(run(node, "du", "-s", "--json", "/data/set").stdout)
    assert usage[0]["cached_bytes"] == COUNT * SIZE


def test_jobs_survive_a_damaged_journal(node: DaemonNode) -> None:
    """A file of the journal that is none costs that job; the daemon starts and numbers go on."""
    run(node, "load", "--wait", "/data/set/00")
    run(node, "load", "--wait", "/data/set/01")
    node.stop()
    Path(node.cache_dir / "jobs" / "1.json").write_bytes(b"\x80\x04.")
    assert [one["id"] for one in json.loads(run(node, "job", "ls", "--json").stdout)] == ["2"]
    assert json.loads(run(node, "load", "--wait", "--json", "/data/set/02").stdout)["id"] == "3"
