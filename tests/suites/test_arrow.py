"""pyarrow's own tests: memory maps and files on the mount, and its file system tests through fsspec."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.suites.running import HERE, Site, judge, run_suite
from tests.support.fuse_mounts import needs_fuse

pytest.importorskip("pyarrow.tests", reason="this pyarrow comes without its tests")

pytestmark = [pytest.mark.system, pytest.mark.suites, pytest.mark.slow, needs_fuse, pytest.mark.timeout(500)]

# Module, and how many of its tests must have passed with a file of the mount open, at least.
MODULES = [
    ("pyarrow.tests.test_io", 35),
    ("pyarrow.tests.parquet.test_parquet_file", 6),
    ("pyarrow.tests.test_feather", 70),
]


@pytest.mark.parametrize(("module", "proofs_min"), MODULES)
def test_on_the_mount(site: Site, library: Path, module: str, proofs_min: int) -> None:
    """Memory maps, Parquet and partitioned datasets read from the mount as pyarrow's own tests say."""
    judge(module, run_suite(site, library, "pytest", [module]), proofs_min=proofs_min)


def test_through_fsspec(site: Site, library: Path) -> None:
    """The reading half of pyarrow's tests of file systems."""
    judge("arrow-fsspec", run_suite(site, library, "pytest", [str(HERE / "arrow_filesystem.py")]), passed_min=14)
