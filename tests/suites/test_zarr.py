"""zarr's suite for stores, through the mount and through fsspec (zarr_stores.py)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.suites.running import HERE, Site, judge, run_suite
from tests.support.fuse_mounts import needs_fuse

pytest.importorskip("zarr", reason="no zarr (pip install 'orchestra-fs[suites]')")

pytestmark = [pytest.mark.system, pytest.mark.suites, pytest.mark.slow, needs_fuse, pytest.mark.timeout(500)]


def test_store_suite(site: Site, library: Path) -> None:
    """zarr reads, lists and measures what lies in the store as its own LocalStore and FsspecStore promise."""
    outcomes = run_suite(site, library, "pytest", [str(HERE / "zarr_stores.py")])
    judge("zarr", outcomes, proofs_min=45, passed_min=135)
