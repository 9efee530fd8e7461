"""What must be fetched keeps nobody waiting but its own reader, who can always be interrupted.

Nothing here looks at a clock: the client holds slow calls until it is told to go on, and tells how many it holds.
"""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import pytest

from orchestra.units import MIB
from tests.support.fuse_mounts import MakeServer, needs_fuse, servers

pytestmark = [pytest.mark.system, needs_fuse]
_READERS = 64


@pytest.fixture
def make(tmp_path: Path) -> Iterator[MakeServer]:
    with servers(tmp_path) as make:
        yield make


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    random = Random(5)
    folder = tmp_path / "store"
    (folder / "slow").mkdir(parents=True)
    for index in range(_READERS):
        (folder / "slow" / str(index)).write_bytes(random.randbytes(110_000))
    (folder / "fast").write_bytes(random.randbytes(200_000))
    (folder / "large").write_bytes(random.randbytes(3 * MIB))
    return folder


@pytest.mark.parametrize("mode", ["auto", "pagecache"])
def test_64_readers_of_missing_files_wait_at_the_same_time_and_hold_up_nobody(
    make: MakeServer, folder: Path, mode: str
) -> None:
    """All 64 reads are in the client at once; a hit, a listing and a look-up are answered meanwhile."""
    server = make(folder, mode=mode)
    files = [os.open(server.target / "slow" / str(index), os.O_RDONLY) for index in range(_READERS)]
    server.tell("uncache", "/slow/")
    server.tell("hold", "/slow/")
    with ThreadPoolExecutor(_READERS) as pool:
        reads = [pool.submit(os.pread, fd, 200_000, 0) for fd in files]
        server.tell("wait_held", _READERS)
        assert (server.target / "fast").read_bytes() == (folder / "fast").read_bytes()
        assert sorted(os.listdir(server.target)) == ["fast", "large", "slow"]
        assert not any(read.done() for read in reads)
        server.tell("release", "/slow/")
        for index, read in enumerate(reads):
            assert read.result() == (folder / "slow" / str(index)).read_bytes()
    for fd in files:
        os.close(fd)
    counters = server.counters()
    assert counters["reads_waited"] >= _READERS
    assert _READERS <= counters["threads"] <= 128


def test_64_look_ups_of_unknown_names_wait_at_the_same_time(make: MakeServer, folder: Path) -> None:
    """Look-ups in one directory do not queue behind one another, nor does a name that is known."""
    server = make(folder)
    server.tell("uncache", "/slow/")
    server.tell("hold", "/slow/")
    with ThreadPoolExecutor(_READERS) as pool:
        found = [pool.submit(os.stat, server.target / "slow" / str(index)) for index in range(_READERS)]
        server.tell("wait_held", _READERS)
        assert os.stat(server.target / "fast").st_size == 200_000
        server.tell("release", "/slow/")
        assert {stat.result().st_size for stat in found} == {110_000}


def test_opening_a_large_file_that_must_be_looked_at_waits_in_a_worker(make: MakeServer, folder: Path) -> None:
    """A large file whose bytes are missing is served by the process."""
    server = make(folder)
    server.tell("uncache", "/large")
    assert (server.target / "large").read_bytes() == (folder / "large").read_bytes()
    counters = server.counters()
    assert counters["backing_opened"] == 0
    assert counters["reads_waited"] >= 3


def test_listing_an_unknown_directory_waits_in_a_worker(make: MakeServer, folder: Path) -> None:
    """OPENDIR of a directory that must be listed holds up nobody."""
    server = make(folder)
    os.stat(server.target / "slow")
    server.tell("uncache", "/slow")
    server.tell("hold", "/slow")
    with ThreadPoolExecutor(1) as pool:
        names = pool.submit(os.listdir, server.target / "slow")
        server.tell("wait_held", 1)
        assert os.stat(server.target / "fast").st_size == 200_000
        server.tell("release", "/slow")
        assert len(names.result()) == _READERS


_READER = """
import mmap, os, signal, sys
class Interrupted(Exception): pass
def on_signal(number, frame): raise Interrupted
signal.signal(signal.SIGUSR1, on_signal)
fd = os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECT)
buffer = mmap.mmap(-1, 4096)
print("reading", flush=True)
try:
    os.preadv(fd, [buffer], 0)
except Interrupted:
    print("interrupted", flush=True)
"""


def test_a_signal_interrupts_a_waiting_read_at_once(make: MakeServer, folder: Path) -> None:
    """The reader gets EINTR while the store is still silent; the late bytes are thrown away, and the file reads on."""
    server = make(folder)
    server.tell("uncache", "/fast")
    os.stat(server.target / "fast")  # so that the look-up is not what waits
    server.tell("hold", "/fast")
    with subprocess.Popen(
        [sys.executable, "-c", _READER, str(server.target / "fast")], stdout=subprocess.PIPE, text=True
    ) as reader:
        assert reader.stdout is not None
        assert reader.stdout.readline() == "reading\n"
        server.tell("wait_held", 1)
        reader.send_signal(signal.SIGUSR1)
        assert reader.stdout.readline() == "interrupted\n"
    assert server.counters()["interrupted"] == 1
    server.tell("release", "/fast")
    assert (server.target / "fast").read_bytes() == (folder / "fast").read_bytes()
    server.tell("wait_no_handles")
    assert server.counters()["answered_late"] == 1
    assert server.counters()["pending"] == 0


def test_a_reader_killed_while_it_waits_is_gone_at_once(make: MakeServer, folder: Path) -> None:
    """SIGKILL ends a buffered read of missing bytes without waiting for them; nobody sits in an endless sleep."""
    server = make(folder)
    fd = os.open(server.target / "fast", os.O_RDONLY)
    server.tell("uncache", "/fast")
    server.tell("hold", "/fast")
    os.close(fd)
    with subprocess.Popen(["cat", str(server.target / "fast")], stdout=subprocess.DEVNULL) as reader:
        server.tell("wait_held", 1)
        reader.kill()
        assert reader.wait(20) == -signal.SIGKILL
    server.tell("release", "/fast")


def test_a_missing_name_is_remembered(make: MakeServer, folder: Path) -> None:
    """The second look at a name that is not there costs no message, until the freshness has passed."""
    server = make(folder)
    looks = []
    for _ in range(3):
        assert not (server.target / "nope").exists()
        looks.append(server.counters()["LOOKUP"])
    assert looks == [1, 1, 1]
    (folder / "nope").touch()
    assert not (server.target / "nope").exists()


def test_strict_freshness_asks_at_every_use(make: MakeServer, folder: Path) -> None:
    """Freshness 0: a name that appears is there at once, one that goes is gone at once."""
    server = make(folder, freshness_s=0.0)
    assert not (server.target / "new").exists()
    (folder / "new").write_bytes(b"1")
    assert (server.target / "new").read_bytes() == b"1"
    (folder / "new").unlink()
    assert not (server.target / "new").exists()


def test_a_defect_answers_eio_to_its_reader_only(make: MakeServer, folder: Path) -> None:
    """An exception nobody foresaw hangs nobody."""
    server = make(folder)
    server.tell("defect", "/large")
    with pytest.raises(OSError) as caught:
        os.stat(server.target / "large")
    assert caught.value.errno == errno.EIO
    assert os.stat(server.target / "fast").st_size == 200_000
    assert server.counters()["errors_unforeseen"] == 1
