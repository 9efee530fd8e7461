"""The command line against a real daemon, as a person types it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import orchestra
from orchestra.client.process import daemon_status, start_daemon, stop_daemon
from orchestra.config import load_config
from orchestra.errors import DaemonUnavailableError
from tests.support.folder_node import FolderNode, folder_node
from tests.support.web_servers import plain_server

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FolderNode]:
    """A node with two files, one of them larger than a piece of `cat`."""
    with folder_node(tmp_path_factory.mktemp("node")) as running:
        (running.store / "dir").mkdir()
        (running.store / "dir" / "a.txt").write_bytes(b"hello\n")
        (running.store / "large.bin").write_bytes(os.urandom(9_000_001))
        yield running


def run(node: FolderNode, *arguments: str | bytes, status: int = 0) -> subprocess.CompletedProcess[bytes]:
    """Run one command line and check its exit status."""
    command: list[str | bytes] = [sys.executable, "-m", "orchestra", "--config", node.config, *arguments]
    result = subprocess.run(command, capture_output=True, check=False, timeout=60)
    assert result.returncode == status, result.stderr
    assert b"Traceback" not in result.stderr
    return result


def test_files_are_listed_and_read(node: FolderNode, tmp_path: Path) -> None:
    """ls, cat and cp give what lies in the store, byte for byte."""
    assert run(node, "ls", "/data").stdout == b"dir/\nlarge.bin\n"
    large = (node.store / "large.bin").read_bytes()
    assert run(node, "cat", "/data/large.bin", "/data/dir/a.txt").stdout == large + b"hello\n"
    run(node, "cp", "-r", "/data", str(tmp_path / "copy"))
    assert (tmp_path / "copy" / "large.bin").read_bytes() == large
    assert (tmp_path / "copy" / "dir" / "a.txt").read_bytes() == b"hello\n"


def test_stat_and_du_know_what_is_cached(node: FolderNode) -> None:
    """After a file was read all of it is cached, on this node."""
    (node.store / "fresh.bin").write_bytes(b"x" * 1000)
    before = json.loads(run(node, "stat", "--json", "/data/fresh.bin").stdout)
    assert (before["size_bytes"], before["cached_bytes"], before["where"]) == (1000, 0, [])
    run(node, "cat", "/data/fresh.bin")
    after = json.loads(run(node, "stat", "--json", "/data/fresh.bin").stdout)
    assert (after["cached_bytes"], after["cached_percent"]) == (1000, 100)
    assert len(after["where"]) == 1
    assert after["pinned"] is False
    run(node, "pin", "/data")
    assert b"pinned" in run(node, "stat", "/data/fresh.bin").stdout
    assert json.loads(run(node, "stat", "--json", "/data/fresh.bin").stdout)["pinned"] is True
    run(node, "unpin", "/data")
    rows = json.loads(run(node, "du", "--json", "/data/fresh.bin").stdout)
    assert rows == [{"path": "/data/fresh.bin", "files": 1, "bytes": 1000, "cached_bytes": 1000}]


def test_a_daemon_is_started_asked_and_stopped(tmp_path: Path) -> None:
    """start is idempotent, status exact, stop final; without a daemon status is one line and exit status 1."""
    with folder_node(tmp_path) as node:
        result = run(node, "daemon", "status", status=1)
        assert result.stderr.count(b"\n") == 1
        assert run(node, "daemon", "start").stdout.startswith(b"started (pid ")
        assert run(node, "daemon", "start").stdout.startswith(b"running already (pid ")
        status = json.loads(run(node, "daemon", "status", "--json").stdout)
        assert status["cache_dir"] == str(tmp_path / "cache")
        assert status["capacity_bytes"] == 1 << 30
        assert status["version"] == orchestra.__version__
        assert {"socket", "used_bytes", "uptime_s"} <= status.keys()
        os.kill(status["pid"], 0)
        assert run(node, "daemon", "stop").stdout == b"stopped\n"
        run(node, "daemon", "status", status=1)
        assert run(node, "daemon", "stop").stdout == b"no daemon was running\n"


def test_a_daemon_of_another_configuration_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """start with another configuration than the running daemon's is refused: in what, whose it is, what to do."""
    with folder_node(tmp_path) as node:
        run(node, "daemon", "start")
        other = FolderNode(str(tmp_path / "other.toml"), node.store)
        text = Path(node.config).read_text()
        Path(other.config).write_text(text)
        assert run(other, "daemon", "start").stdout.startswith(b"running already")
        Path(other.config).write_text(text.replace('"1GiB"', '"2GiB"').replace('"/data"', '"/elsewhere"'))
        said = run(other, "daemon", "start", status=1).stderr.decode()
        assert said.count("\n") == 1
        assert f"with {node.config}, which differs from {other.config} in cache.size, mount; run" in said
        assert "orchestra daemon stop" in said
        monkeypatch.setenv("ORCHESTRA_FETCH_DEADLINE", "7s")
        assert b"started before fetch.deadline changed" in run(node, "daemon", "start", status=1).stderr
        assert json.loads(run(node, "daemon", "status", "--json").stdout)["config"] == node.config


def test_a_stopped_daemon_is_told_from_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A daemon that takes connections and never answers is an error that names its pid, its state and two ways out; it
    goes on when it is let to."""
    monkeypatch.setattr("orchestra.client.process._STATUS_TIMEOUT_S", 0.3)
    with folder_node(tmp_path) as node:
        config = load_config(node.config)
        pid = start_daemon(config)["pid"]
        words = f"pid {pid}.*did not answer.*kill -CONT {pid}.*kill -9 {pid}"
        os.kill(pid, signal.SIGSTOP)
        try:
            for ask in (daemon_status, start_daemon, stop_daemon):
                with pytest.raises(DaemonUnavailableError, match=words):
                    ask(config)
        finally:
            monkeypatch.undo()
            os.kill(pid, signal.SIGCONT)


def test_no_secret_is_shown_or_logged(node: FolderNode, tmp_path: Path) -> None:
    """A secret typed as it is is warned of in one line, and shows in no listing, status, error or log."""
    canary = "canary-7f3"
    (tmp_path / "a").write_text("x")
    with plain_server(tmp_path) as url:
        added = run(node, "mount", "add", "/web", url, "--option", f"bearer_token={canary}")
        changed = run(node, "mount", "update", "/web", "--option", f"bearer_token={canary}x")
        failed = run(node, "mount", "add", "/no", f"{url}/nope/", "--option", f"bearer_token={canary}", status=1)
        shown = [added, changed, failed, run(node, "cat", "/web/a")]
    for result in (added, changed):
        assert result.stderr.startswith(b"orchestra: warning: option bearer_token holds the secret itself")
        assert b"'bearer_token=${VARIABLE}'" in result.stderr
        assert result.stderr.count(b"\n") == 1
    for words in ("mount ls", "mount ls --json", "daemon status", "daemon status --json", "stat --json /web/a"):
        shown.append(run(node, *words.split()))
    run(node, "mount", "rm", "/web")
    assert not [result.args for result in shown if canary.encode() in result.stdout + result.stderr]
    logs = list(Path(node.config).parent.glob("cache/*.log"))
    assert logs
    assert not [log for log in logs if canary in log.read_text()]


def test_mounts_come_and_go(node: FolderNode, tmp_path: Path) -> None:
    """A mount that is added shows its store at once, can be changed, and is gone when removed."""
    (tmp_path / "b.txt").write_bytes(b"b")
    run(node, "mount", "add", "/added", f"file://{tmp_path}", "--freshness", "immutable")
    assert run(node, "cat", "/added/b.txt").stdout == b"b"
    run(node, "mount", "update", "/added", "--freshness", "5m")
    mounts = {mount["path"]: mount for mount in json.loads(run(node, "mount", "ls", "--json").stdout)}
    assert (mounts["/added"]["freshness_s"], mounts["/added"]["source"]) == (300, "added")
    assert mounts["/data"]["source"] == "config"
    run(node, "mount", "rm", "/added/")
    result = run(node, "ls", "/added", status=1)
    assert result.stderr == b"orchestra: no mount covers /added (mounts: /data)\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["mount", "add", "/data", "file:///tmp"], b"mounted there already"),
        (["mount", "add", "relative", "file:///tmp"], b"relative"),
        (["mount", "add", "/a/../b", "file:///tmp"], b"'..' is not allowed"),
        (["mount", "add", "/a//b", "file:///tmp"], b"single slashes"),
        (["mount", "add", "/x", "nosuch://bucket"], b"nosuch"),
        (
            ["mount", "add", "/x", "file:///tmp", "--option", "a=${ORCHESTRA_TEST_NOPE}"],
            b"ORCHESTRA_TEST_NOPE is not set",
        ),
        (["mount", "rm", "/data"], b"change it there"),
        (["cat", "/data/../etc/passwd"], b"'..' is not allowed"),
        (["cat", "/data/nope"], b"/data/nope"),
        (["cat", "/data/dir"], b"is a directory"),
    ],
)
def test_bad_input_is_one_line(node: FolderNode, arguments: list[str], words: bytes) -> None:
    """Rows 13, 21, 33 and 43 at the command line: status 1, nothing printed but one line that says why."""
    result = run(node, *arguments, status=1)
    assert result.stdout == b""
    assert result.stderr.startswith(b"orchestra: ")
    assert result.stderr.count(b"\n") == 1
    assert words in result.stderr


def test_a_variable_set_after_the_daemon_was_stopped_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mount that lacked a variable says where to set it; with it set and the daemon stopped the next command starts
    one that has it."""
    with folder_node(tmp_path) as node:
        (node.store / "a").write_bytes(b"x")
        config = Path(node.config)
        config.write_text(
            config.read_text() + '[[mount]]\npath = "/web"\nuri = "http://127.0.0.1:9/"\n'
            'options = { bearer_token = "${ORCHESTRA_TEST_LATE}" }\n'
        )
        monkeypatch.delenv("ORCHESTRA_TEST_LATE", raising=False)
        result = run(node, "stat", "/web/a", status=1)
        assert b"ORCHESTRA_TEST_LATE is not set" in result.stderr
        assert b"orchestra daemon stop" in result.stderr
        assert run(node, "cat", "/data/a").stdout == b"x"
        monkeypatch.setenv("ORCHESTRA_TEST_LATE", "canary")
        run(node, "daemon", "stop")
        # Its root is a directory whatever the server says, which is not there.
        assert json.loads(run(node, "stat", "--json", "/web").stdout)["type"] == "directory"


@pytest.fixture
def coffee(node: FolderNode) -> Iterator[bytes]:
    """A file whose name is not UTF-8; gives the name."""
    name = b"caf\xe9.txt"
    path = Path(os.fsdecode(os.fsencode(node.store) + b"/" + name))
    path.write_bytes(b"coffee")
    yield name
    path.unlink()


def test_a_name_that_is_no_text_is_shown_escaped(node: FolderNode, coffee: bytes) -> None:
    """Row 39: what is listed cannot harm a terminal, and --json has the name exactly."""
    assert b"caf\\xe9.txt\n" in run(node, "ls", "/data").stdout
    paths = [entry["path"] for entry in json.loads(run(node, "ls", "--json", "/data").stdout)]
    assert os.fsdecode(b"/data/" + coffee) in paths


def test_a_name_that_is_no_text_is_found(node: FolderNode, coffee: bytes) -> None:
    """Row 31: bytes that are not UTF-8 go from the command line to the store."""
    assert run(node, "cat", b"/data/" + coffee).stdout == b"coffee"


def test_a_reader_that_leaves_ends_it_quietly(node: FolderNode) -> None:
    """Row 32: `orchestra cat ... | head -c 10` says nothing on standard error."""
    command = [sys.executable, "-m", "orchestra", "--config", node.config, "cat", "/data/large.bin"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(10)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(60) == 141
