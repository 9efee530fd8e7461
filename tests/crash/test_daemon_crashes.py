"""kill -9 of a real daemon at a chosen system call, while clients read through it.

strace kills it on its k-th rename, pwrite64, fsetxattr, ftruncate or unlink. The guards: the daemon died by SIGKILL, at
that call, with reads under way. Then every byte is compared with the store: by the client that was reading (which a
successor serves), by a new process over what the dead daemon left, and with an empty cache.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.cache import data_of
from tests.support.node import DaemonNode, folder_daemon_node
from tests.support.ram import ram_folder
from tests.support.reading import read_in_new_process, sha256

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed"),
]

KIB = 1024
# Small ones, extents of several blocks, several extents; together more than the cache holds, so that it evicts.
FILES = {f"s{index}": 3000 * index + 1 for index in range(10)} | {f"l{index}": 150_000 * index for index in range(1, 6)}
DATA = {f"/data/{name}": data_of(name, size) for name, size in FILES.items()}
CACHE = {"block_size": "64KiB", "extent_size": "256KiB", "size": "1500KiB"}
# Above what a start alone takes: it renames namespace.json, and sqlite writes some pages.
POINTS = [
    *(("rename", k) for k in (4, 9, 17, 30)),
    *(("pwrite64", k) for k in (25, 33, 45)),
    ("fsetxattr", 3),
    ("ftruncate", 5),
    *(("unlink", k) for k in (2, 6)),
]


@contextmanager
def mortal_daemon(node: DaemonNode, call: str, k: int) -> Iterator[subprocess.Popen[bytes]]:
    """A daemon under strace that dies before its k-th `call` on files of the cache."""
    command = [
        *("strace", "-f", "-qq", "-o", "/dev/null", "-e", f"trace={call}", "-e", f"inject={call}:signal=KILL:when={k}"),
        *(sys.executable, "-m", "orchestra", "--config", str(node.config_path), "daemon", "run"),
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def wait_started(node: DaemonNode, process: subprocess.Popen[bytes]) -> bool:
    """Wait until the daemon answers; False if it died before."""
    pause = threading.Event()
    while process.poll() is None:
        if node.is_running():
            return True
        pause.wait(0.02)
    return False


@pytest.mark.parametrize(("call", "k"), POINTS)
def test_a_daemon_killed_at_a_system_call(call: str, k: int) -> None:
    """Wherever it dies: readers get right bytes from its successor, what it left behind is right or missing, and its
    books are in order."""
    with ram_folder() as root, folder_daemon_node(root, freshness="immutable", cache=CACHE) as (node, store):
        for name, size in FILES.items():
            (store / name).write_bytes(data_of(name, size))
        node.start()
        node.stop()  # the cache directory exists: what the daemon does now, it does for readers
        with mortal_daemon(node, call, k) as process:
            has_started = wait_started(node, process)
            client = node.client()
            with ThreadPoolExecutor(4) as pool:
                reading = [pool.submit(client.read_file, path) for path in DATA]
                got = [one.result(60) for one in reading]
            assert got == list(DATA.values())
            process.wait(30)
            assert process.returncode == -signal.SIGKILL, f"the {k}th {call} was not reached"
        assert has_started, "it died before anybody read: nothing would be proved"
        hashes = {path: sha256(data) for path, data in DATA.items()}
        assert read_in_new_process(node.config_path, DATA)["hashes"] == hashes
        assert node.status()["blocks"]["corrupt_count"] == 0
        assert node.status()["used_bytes"] <= 1500 * KIB
        leftovers = [path.name for path in (node.cache_dir / "tmp").iterdir()]
        node.stop()
        shutil.rmtree(node.cache_dir)
        assert read_in_new_process(node.config_path, DATA)["hashes"] == hashes
        assert not leftovers


def test_the_store_is_what_it_is_compared_with(tmp_path: Path) -> None:
    """The data above crosses every border: small, one extent, several, and more than the cache holds."""
    sizes = list(FILES.values())
    assert min(sizes) < 64 * KIB < 256 * KIB < max(sizes)
    assert sum(sizes) > 1500 * KIB
