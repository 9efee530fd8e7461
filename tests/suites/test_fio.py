"""fio writes files with checksums in them into the under store, and verifies every block through the mount.

A file begins anew with each test: it is not in the cache when fio reads it first, and is when it reads it again.
"""

from __future__ import annotations

import itertools
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.suites.running import Site
from tests.support.fuse_mounts import needs_fuse

pytestmark = [
    pytest.mark.system,
    pytest.mark.suites,
    needs_fuse,
    pytest.mark.skipif(shutil.which("fio") is None, reason="no fio (apt-get install fio)"),
]

SIZE = 6 * 1024 * 1024
_numbers = itertools.count()

QUICK = [
    ("read", "psync", 65536, ()),
    ("randread", "psync", 4096, ()),
    ("randread", "mmap", 4096, ()),
]
ALL = [
    (order, engine, block, extra)
    for order in ("read", "randread")
    for engine, extra in [
        ("psync", ()),
        ("psync", ("--direct=1",)),
        ("pvsync2", ()),
        ("mmap", ()),
        ("libaio", ("--direct=1", "--iodepth=8")),
        ("io_uring", ("--iodepth=8",)),
        ("psync", ("--numjobs=3", "--thread")),
    ]
    for block in (512, 4096, 16384, 131072, 1048576)
]


def fio(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run one job over the file `data` in `folder`."""
    command = ["fio", "--name=job", f"--directory={folder}", "--filename=data", f"--size={SIZE}", "--verify=crc32c"]
    return subprocess.run([*command, *options], capture_output=True, text=True, timeout=100, cwd=folder.parent)


@pytest.fixture
def lay_out(site: Site) -> Callable[[int], str]:
    """Write the file for reads of `block` bytes through the store; return the name of its folder."""

    def write(block: int) -> str:
        name = f"fio-{next(_numbers)}"
        (site.store / name).mkdir()
        done = fio(site.store / name, "--rw=write", f"--bs={block}", "--do_verify=0", "--end_fsync=0")
        assert done.returncode == 0, done.stderr
        return name

    return write


def verify(site: Site, name: str, order: str, engine: str, block: int, extra: tuple[str, ...]) -> None:
    """Read the file through the mount twice, cold and warm, comparing every block."""
    for _ in range(2):
        options = ["--readonly", f"--rw={order}", f"--bs={block}", f"--ioengine={engine}", "--verify_fatal=1"]
        done = fio(site.mount / name, *options, "--invalidate=0", *extra)
        assert done.returncode == 0, done.stdout + done.stderr


def label(case: tuple[str, str, int, tuple[str, ...]]) -> str:
    """Return a test's name."""
    order, engine, block, extra = case
    return "-".join([order, engine, str(block), *(option.strip("-") for option in extra)])


@pytest.mark.parametrize("case", QUICK, ids=label)
def test_what_was_written_is_read(
    site: Site, lay_out: Callable[[int], str], case: tuple[str, str, int, tuple[str, ...]]
) -> None:
    """Every block that fio wrote into the store verifies through the mount, cold and warm."""
    verify(site, lay_out(case[2]), *case)


@pytest.mark.slow
@pytest.mark.parametrize("case", ALL, ids=label)
def test_what_was_written_is_read_in_every_way(
    site: Site, lay_out: Callable[[int], str], case: tuple[str, str, int, tuple[str, ...]]
) -> None:
    """As above for every engine, block size and order, O_DIRECT and several threads."""
    verify(site, lay_out(case[2]), *case)


def test_a_byte_that_differs_is_found(site: Site, lay_out: Callable[[int], str]) -> None:
    """The proof that the verification above can fail: one byte changed in the store is an error of fio's."""
    name = lay_out(4096)
    with (site.store / name / "data").open("r+b") as file:
        file.seek(SIZE // 2 + 1000)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))
    done = fio(site.mount / name, "--readonly", "--rw=read", "--bs=4096", "--ioengine=psync", "--verify_fatal=1")
    assert done.returncode != 0
    assert "verify" in done.stdout + done.stderr
