"""CPython's own tests of files, with their files on the mount: what they write goes to the store, what they read comes
through the mount.

Most of those tests write, read back and compare; that makes them proofs of reading here. What is not: a file that is
open for writing and reading at once ("r+", "w+") lies in the store alone, and such a test counts only if it opened
something on the mount as well. Not run: tests of permissions, links, ownership and times (test_os, test_posix,
test_tempfile), which a read-only folder cannot pass, and files of gigabytes (test_largefile).
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from tests.suites.running import Site, judge, run_suite
from tests.support.fuse_mounts import needs_fuse

pytestmark = [pytest.mark.system, pytest.mark.suites, needs_fuse, pytest.mark.timeout(500)]

# Module, and how many of its tests must have passed with a file of the mount open, at least.
QUICK = [("test.test_fileio", 30), ("test.test_mmap", 7), ("test.test_file", 10)]
ALL = [
    ("test.test_io", 50),
    ("test.test_zipfile", 140),
    ("test.test_tarfile", 200),
    ("test.test_gzip", 40),
    ("test.test_bz2", 50),
    ("test.test_lzma", 10),
    ("test.test_fileinput", 17),
    ("test.test_linecache", 15),
    ("test.test_filecmp", 2),
    ("test.test_zipimport", 65),
    ("test.test_wave", 60),
    ("test.test_dbm_dumb", 14),
]
# Interpreters that are ended in the middle of a write, and signals that hit a write: nothing is read. testOpenDel opens
# one file 10,000 times, and the node is asked each time, since freshness is strict here: two minutes. What tarfile
# writes and extracts is permissions, links and folders 60 deep, of which each name is asked for at each look: minutes.
LEFT_OUT = "daemon_threads_shutdown|Signals|testOpenDel|tarfile.*([Ee]xtract|Filter|[Ll]ink|WriteTest)"


def need(module: str) -> None:
    """Skip where the interpreter comes without its tests."""
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        found = None
    if found is None:
        pytest.skip(f"{sys.executable} has no {module}; Debian keeps it in libpython3.11-testsuite")


@pytest.mark.parametrize(("module", "proofs_min"), QUICK)
def test_the_quick_ones(site: Site, library: Path, module: str, proofs_min: int) -> None:
    """Each test of the module passes, or is known not to."""
    need(module)
    judge(module, run_suite(site, library, "unittest", [module], left_out=LEFT_OUT), proofs_min=proofs_min)


@pytest.mark.slow
@pytest.mark.parametrize(("module", "proofs_min"), ALL)
def test_all(site: Site, library: Path, module: str, proofs_min: int) -> None:
    """As above for archives, compressed files, imports from archives and small data bases."""
    need(module)
    judge(module, run_suite(site, library, "unittest", [module], left_out=LEFT_OUT), proofs_min=proofs_min)
