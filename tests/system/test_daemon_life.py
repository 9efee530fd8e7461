"""The daemon as a process: starts once, serves, stops, is killed, and comes back with everything that it held."""

from __future__ import annotations

import fcntl
import os
import resource
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest

from orchestra.clock import SystemClock
from orchestra.errors import ConfigError, DaemonUnavailableError, NotFoundError, OrchestraError
from tests.support.cache import data_of
from tests.support.node import PATIENCE_S, DaemonNode, daemon_node, folder_daemon_node
from tests.support.ram import ram_folder
from tests.support.reading import read_in_new_process, reading_process, sha256, told_by

pytestmark = pytest.mark.system

MIB = 1024 * 1024
FILES = {"small": 100, "block": 64 * 1024, "d/large": 5 * 64 * 1024 + 1, "empty": 0}
HASHES = {f"/data/{name}": sha256(data_of(name, size)) for name, size in FILES.items()}
BLOCKS = {"block_size": "64KiB", "extent_size": "256KiB"}


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """In memory: see tests/support/ram.py."""
    with ram_folder() as folder:
        yield folder


@pytest.fixture
def node(tmp_path: Path) -> Iterator[DaemonNode]:
    """A node over a folder with a few files, immutable, so that nothing need be asked twice."""
    with folder_daemon_node(tmp_path, freshness="immutable", cache=BLOCKS) as (running, store):
        (store / "d").mkdir()
        for name, size in FILES.items():
            (store / name).write_bytes(data_of(name, size))
        yield running


def read_all(node: DaemonNode) -> None:
    client = node.client()
    for folder in ("/data", "/data/d"):
        client.list(folder)
    for name, size in FILES.items():
        assert client.read_file(f"/data/{name}") == data_of(name, size)


def requests_of(node: DaemonNode) -> int:
    """How many requests the daemon that runs has sent to its stores."""
    kinds = ("head_requests", "list_requests", "read_requests")
    return sum(store["counts"][kind] for store in node.status()["stores"] for kind in kinds)


def kill(node: DaemonNode) -> None:
    """kill -9, and wait until the kernel has let go of the lock."""
    os.kill(node.status()["pid"], signal.SIGKILL)
    wait_until_free(node)


def wait_until_free(node: DaemonNode) -> None:
    with (node.cache_dir / "daemon.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)


def log_of(node: DaemonNode) -> str:
    return (node.cache_dir / "daemon.log").read_text()


# -- start, status, stop -------------------------------------------------------------------------------------------


def test_start_status_stop(node: DaemonNode) -> None:
    """A daemon that was started says who it is and what it holds; stopped, it is gone with its socket; started again,
    it is another process."""
    assert not node.is_running()
    assert node.stop() is False
    first = node.start()
    assert node.start()["pid"] == first["pid"], "a second start finds the first"
    status = node.status()
    assert status["cache_dir"] == str(node.cache_dir)
    assert status["socket"] == str(node.cache_dir / "daemon.sock")
    assert status["capacity_bytes"] == 1024 * MIB
    assert (status["used_bytes"], status["mounts"]) == (0, 1)
    assert 0 <= status["uptime_s"] < 60
    assert status["version"].count(".") == 2
    read_all(node)
    assert node.status()["used_bytes"] > sum(FILES.values())
    socket_path = Path(status["socket"])
    assert socket_path.stat().st_mode & 0o777 == 0o600
    assert node.stop() is True
    assert not socket_path.exists()
    assert not node.is_running()
    assert node.start()["pid"] != first["pid"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_it_cleanly(node: DaemonNode, number: signal.Signals) -> None:
    """SIGTERM and SIGINT end it as `stop` does: the index is marked exact and the socket is removed."""
    node.start()
    read_all(node)
    os.kill(node.status()["pid"], number)
    wait_until_free(node)
    assert not (node.cache_dir / "daemon.sock").exists()
    with closing(sqlite3.connect(node.cache_dir / "index.sqlite3")) as index:
        assert index.execute("SELECT value FROM state WHERE key = 'clean'").fetchone() == (1,)
    assert log_of(node).rstrip().endswith("stopping")


# A daemon that gets a second signal at the worst moment: when the loop no longer listens for signals.
SIGNALLED_TWICE = """
import os, signal, sys
from asyncio.selector_events import BaseSelectorEventLoop as Loop
from orchestra.cli.main import main

close = Loop._close_self_pipe

def close_and_kill(loop):
    close(loop)
    os.kill(os.getpid(), signal.SIGTERM)
    print("signalled again", file=sys.stderr)

Loop._close_self_pipe = close_and_kill
sys.exit(main())
"""


def test_a_signal_while_it_ends_changes_nothing(node: DaemonNode) -> None:
    """Told again to stop when it nearly has, it ends as if told once, and says nothing of it."""
    command = [sys.executable, "-c", SIGNALLED_TWICE, "--config", str(node.config_path), "daemon", "run"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as daemon:
        while not node.is_running():
            assert daemon.poll() is None
        read_all(node)
        daemon.terminate()
        _, told = daemon.communicate(timeout=PATIENCE_S)
    assert daemon.returncode == 0
    assert "signalled again" in told
    assert "Traceback" not in told


def test_many_that_need_a_daemon_start_one(node: DaemonNode) -> None:
    """Ten processes that miss at one moment find one daemon, which one of them started."""
    paths = [f"/data/{name}" for name in FILES]
    processes = [reading_process(node.config_path, paths, asks_pid=True) for _ in range(10)]
    told = [told_by(process) for process in processes]
    assert len({one["daemon"] for one in told}) == 1
    assert all(
        one["hashes"] == {f"/data/{name}": sha256(data_of(name, size)) for name, size in FILES.items()} for one in told
    )
    assert log_of(node).count(" serves ") == 1


def test_a_daemon_that_nobody_needs_stops(tmp_path: Path) -> None:
    """One that was started by a client stops after the idle time; the next miss starts another."""
    with folder_daemon_node(tmp_path, daemon={"idle_timeout": "500ms"}) as (node, store):
        (store / "a").write_bytes(b"x")
        assert node.client().read_file("/data/a") == b"x"
        wait_until_free(node)
        assert not node.is_running()
        assert "nothing to do" in log_of(node)
        (store / "b").write_bytes(b"y")
        assert node.client().read_file("/data/b") == b"y"


def test_hits_keep_a_daemon_alive(tmp_path: Path) -> None:
    """Reads that send no message count as life: the daemon sees them in the readers' rings."""
    with folder_daemon_node(tmp_path, freshness="immutable", daemon={"idle_timeout": "1500ms"}) as (node, store):
        (store / "a").write_bytes(b"x")
        client, clock = node.client(), SystemClock()
        client.read_file("/data/a")
        sent = client.messages_sent
        end_ns = clock.now_ns() + 4_000_000_000
        pause = threading.Event()
        while clock.now_ns() < end_ns:
            client.read_file("/data/a")
            pause.wait(0.1)
        assert client.messages_sent == sent
        assert "nothing to do" not in log_of(node)
        assert node.is_running()


def test_a_daemon_that_was_asked_for_does_not_stop_by_itself(tmp_path: Path) -> None:
    """`daemon start` means until `daemon stop`, whatever the idle time."""
    with folder_daemon_node(tmp_path, daemon={"idle_timeout": "100ms"}) as (node, _):
        node.start()
        threading.Event().wait(1.0)
        assert node.is_running()


def test_a_second_daemon_is_refused(node: DaemonNode) -> None:
    """`daemon run` on a cache directory that is in use ends with status 1 and one line that names the owner."""
    pid = node.start()["pid"]
    command = [sys.executable, "-m", "orchestra", "--config", str(node.config_path), "daemon", "run"]
    second = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (second.returncode, second.stdout) == (1, "")
    assert f"cache directory {node.cache_dir} is in use by the daemon with pid {pid}, started " in second.stderr
    assert len(second.stderr.splitlines()) == 1
    assert node.status()["pid"] == pid


def test_a_daemon_that_cannot_start_says_why_to_who_needs_it(node: DaemonNode) -> None:
    """The reason comes back through the pipe to the reader that wanted a daemon, not only into a log."""
    node.cache_dir.mkdir(mode=0o700)
    (node.cache_dir / "theirs").touch()
    with pytest.raises(OrchestraError, match=r"is not empty and holds no orchestra-cache.json"):
        node.client().read_file("/data/small")


def test_without_autostart_a_reader_is_told(node: DaemonNode) -> None:
    """With autostart = false a miss without a daemon is an error that names the command; hits are served."""
    read_all(node)
    node.stop()
    node.reconfigure(
        mounts=[{"path": "/data", "uri": f"file://{node.cache_dir.parent}/store", "freshness": "immutable"}],
        cache=BLOCKS,
        daemon={"autostart": False},
    )
    read_all(node)
    with pytest.raises(DaemonUnavailableError, match=r"no daemon runs for cache.dir .*; start one with: orchestra dae"):
        node.client().stat("/data/small", refresh=True)
    node.start()
    assert node.client().stat("/data/small", refresh=True).size_bytes == 100


# -- restarts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", [DaemonNode.stop, kill], ids=["stop", "kill -9"])
def test_a_restarted_daemon_serves_everything_without_the_store(
    node: DaemonNode, end: Callable[[DaemonNode], object]
) -> None:
    """Stopped or killed, what it held is read by new clients without one request to the store, and counted in full."""
    read_all(node)
    used = node.status()["used_bytes"]
    end(node)
    node.start()
    assert node.status()["used_bytes"] == used
    read_all(node)
    paths = [f"/data/{name}" for name in FILES]
    assert read_in_new_process(node.config_path, paths)["messages"] == 0
    assert requests_of(node) == 0


def test_hits_need_no_daemon(node: DaemonNode) -> None:
    """With the daemon dead, a new process reads what is cached, without a message and without starting another."""
    read_all(node)
    kill(node)
    told = read_in_new_process(node.config_path, [f"/data/{name}" for name in FILES])
    assert told["hashes"] == HASHES
    assert told["messages"] == 0
    assert not node.is_running()


def test_a_socket_that_a_killed_daemon_left_is_no_obstacle(node: DaemonNode) -> None:
    """Clients see that nobody answers there and start a successor, which takes the socket's place."""
    node.start()
    kill(node)
    assert (node.cache_dir / "daemon.sock").exists()
    read_all(node)
    assert node.is_running()


def test_an_open_client_survives_any_number_of_restarts(node: DaemonNode) -> None:
    """A client that spoke with a daemon speaks with its successors, after stops as after kills."""
    client = node.client()
    for turn in range(4):
        assert client.stat("/data/small", refresh=True).size_bytes == 100
        kill(node) if turn % 2 else node.stop()
    assert client.stat("/data/small", refresh=True).size_bytes == 100


def test_the_cache_directory_may_vanish(node: DaemonNode) -> None:
    """F-19: removed under a running daemon, the next miss makes it anew, with a new daemon; the old one ends by itself
    and does not take the new one's socket with it."""
    read_all(node)
    old = node.status()["pid"]
    node.cache_dir.rename(node.cache_dir.parent / "gone")
    read_all(node)
    new = node.status()["pid"]
    assert new != old
    with (node.cache_dir.parent / "gone" / "daemon.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
    assert node.status()["pid"] == new


def test_garbage_on_the_socket_disturbs_nobody(node: DaemonNode) -> None:
    """A program that speaks no HTTP, or speaks it badly, gets an error or a closed connection; others go on."""
    node.start()
    path = str(node.cache_dir / "daemon.sock")
    for sent in (
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/ensure HTTP/1.1\r\nContent-Length: 5\r\n\r\nnojso",
        b"POST /v1/ensure HTTP/1.1\r\nContent-Length: 2\r\n\r\n[]",
        b"POST /v1/stat HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"DELETE /nowhere HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\r\n" * 1000,
    ):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(10)
            connection.connect(path)
            connection.sendall(sent)
            connection.shutdown(socket.SHUT_WR)
            answer = connection.recv(100)
            assert not answer or b" 4" in answer or b" 5" in answer
    read_all(node)
    assert not [line for line in log_of(node).splitlines() if " ERROR " in line and " orchestra." in line]


# -- mounts --------------------------------------------------------------------------------------------------------


def mount_body(path: str, folder: Path) -> dict[str, Any]:
    return {"path": path, "uris": [f"file://{folder}"], "readonly": True, "freshness_s": 60.0, "options": {}}


def test_idle_connections_make_room_when_descriptors_are_used_up(node: DaemonNode) -> None:
    """A daemon that may open no more closes connections that nobody uses, says so in one line, and goes on."""
    started = node.start()
    pid = started["pid"]
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (40, 40))
    with ExitStack() as held:
        for _ in range(60):
            idle = held.enter_context(socket.socket(socket.AF_UNIX))
            idle.connect(started["socket"])
        read_all(node)
    assert node.status()["pid"] == pid
    log = log_of(node)
    assert log.count("connections wait: Too many open files") == 1
    assert "Traceback" not in log


def test_mounts_that_were_added_stay(node: DaemonNode, tmp_path: Path) -> None:
    """A mount added by hand is there for every client at once, after a restart, until it is removed; its file is its
    owner's alone."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_bytes(name.encode())
    client, other = node.client(), node.client()
    client.list("/")
    client.daemon_request("POST", "/v1/mounts", mount_body("/more", tmp_path / "one"))
    assert client.read_file("/more/x") == b"one"
    assert [entry.name for entry in node.client().list("/")] == ["data", "more"]
    assert (node.cache_dir / "mounts.json").stat().st_mode & 0o777 == 0o600
    kill(node)
    assert other.read_file("/more/x") == b"one"
    client.daemon_request("PUT", "/v1/mounts", mount_body("/more", tmp_path / "two"))
    assert client.read_file("/more/x") == b"two"
    node.stop()
    assert node.client().read_file("/more/x") == b"two"
    client.daemon_request("DELETE", "/v1/mounts?path=/more")
    with pytest.raises(NotFoundError, match=r"no mount covers /more/x \(mounts: /data\)"):
        client.stat("/more/x")
    node.stop()
    with pytest.raises(NotFoundError):
        node.client().stat("/more/x")


def test_mounts_that_cannot_be_are_refused(node: DaemonNode, tmp_path: Path) -> None:
    """A missing folder, a taken path, a bad path, a scheme that nobody knows: one line each, and nothing changed."""
    (tmp_path / "one").mkdir()
    client = node.client()
    refused: list[tuple[str, dict[str, Any], str]] = [
        ("POST", mount_body("/more", tmp_path / "missing"), "no such folder"),
        ("POST", mount_body("/data", tmp_path / "one"), "mount /data: something is mounted there already"),
        ("POST", mount_body("/a/../b", tmp_path / "one"), "'..' is not allowed"),
        ("POST", mount_body("relative", tmp_path / "one"), "not absolute"),
        ("POST", {**mount_body("/more", tmp_path / "one"), "uris": ["gopher://x/y"]}, "gopher"),
        ("POST", {**mount_body("/more", tmp_path / "one"), "uris": []}, "at least one uri"),
        ("POST", {"uris": ["file:///x"]}, "not a mount: 'path'"),
        ("POST", {**mount_body("/more", tmp_path / "one"), "options": {"colour": "red"}}, "colour"),
        ("PUT", mount_body("/data", tmp_path / "one"), "is defined in .*orchestra.toml: change it there"),
        ("PUT", mount_body("/more", tmp_path / "one"), "nothing is mounted at /more"),
    ]
    for method, body, words in refused:
        with pytest.raises(OrchestraError, match=words) as caught:
            client.daemon_request(method, "/v1/mounts", body)
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="is defined in"):
        client.daemon_request("DELETE", "/v1/mounts?path=/data")
    assert [entry.name for entry in client.list("/")] == ["data"]
    read_all(node)


def test_a_missing_variable_costs_its_mount_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An option that names a variable which is not set: an error in words, for that mount and no other."""
    monkeypatch.delenv("ORC_TEST_KEY", raising=False)
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "x").write_bytes(b"x")
    mounts = [
        {"path": "/data", "uri": f"file://{tmp_path}/store"},
        {"path": "/s3", "uri": "s3://bucket/", "options": {"key": "${ORC_TEST_KEY}"}},
    ]
    with daemon_node(tmp_path, mounts=mounts) as node:
        client = node.client()
        assert client.read_file("/data/x") == b"x"
        with pytest.raises(ConfigError, match=r"mount /s3: .*ORC_TEST_KEY"):
            client.list("/s3")
        assert [entry.name for entry in client.list("/")] == ["data", "s3"]


def test_a_configuration_that_changed_is_read_again(node: DaemonNode, tmp_path: Path) -> None:
    """A client with the new file has the running daemon read it; one with the old file, or another, is told."""
    read_all(node)
    pid = node.status()["pid"]
    old = node.client()
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "x").write_bytes(b"x")
    mounts = [
        {"path": "/data", "uri": f"file://{tmp_path}/store", "freshness": "immutable"},
        {"path": "/more", "uri": f"file://{tmp_path}/more"},
    ]
    node.reconfigure(mounts=mounts, cache=BLOCKS)
    assert node.client().read_file("/more/x") == b"x"
    read_all(node)
    assert node.status()["pid"] == pid
    with pytest.raises(ConfigError, match=r"the daemon of cache.dir .* and their mounts differ"):
        old.read_file("/data/small")
