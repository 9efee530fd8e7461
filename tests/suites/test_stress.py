"""stress-ng's stressors that read through the mount. Two of its some 300 do.

The others that work on files (readahead, seek, mmap, hdd, iomix, revio, aio, io-uring, fiemap, flock, copy-file and so
on) read through the descriptor that they wrote with, which never comes to a read-only folder; access, chmod, xattr and
their like change attributes; filename, chdir and dirmany make empty folders, which a store does not have.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.suites.running import Site
from tests.support.fuse_mounts import needs_fuse

pytestmark = [
    pytest.mark.system,
    pytest.mark.suites,
    pytest.mark.slow,
    needs_fuse,
    pytest.mark.skipif(shutil.which("stress-ng") is None, reason="no stress-ng (apt-get install stress-ng)"),
]


@pytest.mark.parametrize("stressor", ["fstat", "sendfile"])
def test_stressor(site: Site, library: Path, stressor: str, tmp_path: Path) -> None:
    """The stressor ends without a failure, and did open something on the mount."""
    name = f"stress-{stressor}"
    (site.store / name).mkdir()
    for number in range(20):
        (site.store / name / str(number)).write_bytes(bytes(5000))
    count = tmp_path / "count"
    count.write_bytes(bytes(8))
    folder = str(site.mount / name)
    options = [f"--{stressor}", "1", f"--{stressor}-ops", "50", "--timeout", "5", "--verify", "--temp-path", folder]
    if stressor == "fstat":
        options += ["--fstat-dir", folder]
    environment = site.environment | {
        "LD_PRELOAD": str(library),
        "WRITE_BEHIND_MOUNT": str(site.mount),
        "WRITE_BEHIND_STORE": str(site.store),
        "WRITE_BEHIND_COUNT": str(count),
    }
    done = subprocess.run(["stress-ng", *options], capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int.from_bytes(count.read_bytes(), "little") > 0
