"""h5py's and PyTables' own tests on the mount: files are written to the store and read through the mount.

Of h5py, the modules that close a file and open it again to read; the others write and read through one open file, which
lies in the store alone.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from tests.suites.running import Site, judge, run_suite
from tests.support.fuse_mounts import needs_fuse

pytestmark = [pytest.mark.system, pytest.mark.suites, pytest.mark.slow, needs_fuse, pytest.mark.timeout(500)]

# Runner, module, and how many of its tests must have passed with a file of the mount open, at least.
MODULES = [
    ("pytest", "h5py.tests.test_file", 20),
    ("pytest", "h5py.tests.test_vds", 10),
    ("pytest", "h5py.tests.test_big_endian_file", 1),
    ("unittest", "tables.tests.test_create", 15),
    ("unittest", "tables.tests.test_backcompat", 3),
    ("unittest", "tables.tests.test_hdf5compat", 15),
]


@pytest.mark.parametrize(("runner", "module", "proofs_min"), MODULES)
def test_on_the_mount(site: Site, library: Path, runner: str, module: str, proofs_min: int) -> None:
    """Each test of the module passes, or is known not to."""
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        pytest.skip(f"no {module.partition('.')[0]} (pip install 'orchestra-fs[suites]')")
    # Without MPI, and without pytest-mpi, whose fixtures they ask for.
    judge(module, run_suite(site, library, runner, [module], left_out="TestMPI"), proofs_min=proofs_min)
