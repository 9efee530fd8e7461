"""A folder of another user than the cache's owner, mounted by themselves through fusermount3, served by the owner's
daemon."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestra.fuse.mount import mount_at, unmount
from tests.support.fuse_mounts import device_for_everybody, needs_fuse
from tests.support.node import DaemonNode, folder_daemon_node
from tests.support.other_user import NOBODY, python_as_nobody
from tests.support.ram import ram_folder

pytestmark = [pytest.mark.system, needs_fuse]

LARGE = b"".join(number.to_bytes(4, "big") for number in range(1_500_000))


class Guest:
    """Nobody, who knows the cache's directory and nothing else; their folder `mnt`, and their state."""

    def __init__(self, root: Path, node: DaemonNode) -> None:
        self.node = node
        self.home = root / "nobody"
        self.target = self.home / "mnt"
        self.target.mkdir(parents=True)
        for folder in (self.home, self.target):
            os.chown(folder, NOBODY, NOBODY)
        self._python = python_as_nobody("import orchestra.client.guest, orchestra.fuse.worker, click, msgspec")

    def run(self, *words: str) -> subprocess.CompletedProcess[bytes]:
        """Run a Python with these arguments."""
        environment = {"ORCHESTRA_CACHE_DIR": str(self.node.cache_dir), "PATH": os.environ["PATH"]}
        environment |= {"XDG_STATE_HOME": str(self.home / "state"), "ORCHESTRA_DAEMON_WAIT": "1s"}
        return subprocess.run(
            [*self._python, *words], capture_output=True, check=False, env=environment, cwd="/", timeout=60
        )

    def orchestra(self, *words: str) -> subprocess.CompletedProcess[bytes]:
        return self.run("-m", "orchestra", *words)


@pytest.fixture
def root() -> Iterator[Path]:
    with ram_folder() as folder:
        folder.chmod(0o755)
        yield folder


@pytest.fixture
def guest(root: Path) -> Iterator[Guest]:
    """A node of root's that nobody may read, and a device that everybody may open (as udev makes it)."""
    if shutil.which("fusermount3") is None:
        pytest.skip("mounting without root needs fusermount3")
    with folder_daemon_node(root, daemon={"readers": ["nobody"]}) as (node, store), device_for_everybody():
        (store / "dir").mkdir()
        (store / "dir" / "a.txt").write_bytes(b"hello\n")
        (store / "large.bin").write_bytes(LARGE)
        store.chmod(0o700)
        node.start()
        guest = Guest(root, node)
        try:
            yield guest
        finally:
            while mount_at(str(guest.target)) is not None:
                unmount(str(guest.target), lazy=True)


_LOOK = """
import os, sys
os.chdir(sys.argv[1])
assert os.listdir("data") == ["dir", "large.bin"], os.listdir("data")
for _ in range(2):
    assert open("data/dir/a.txt", "rb").read() == b"hello\\n"
    large = open("data/large.bin", "rb").read()
    assert len(large) == 6_000_000 and large[4_000_000:4_000_004] == (1_000_000).to_bytes(4, "big")
assert os.stat("data/dir/a.txt").st_uid == os.getuid()
assert not os.path.exists("data/nope")
assert os.getxattr("data/large.bin", "user.orchestra.cached") == b"6000000/6000000"
assert os.statvfs("data").f_bavail == 0
"""


def test_a_guest_mounts_and_reads_what_the_owner_lets_them(guest: Guest) -> None:
    """Listed, read twice and told of; nobody else gets in; what was read is cached for the owner; unmounted again."""
    done = guest.orchestra("fuse", "mount", str(guest.target))
    assert (done.returncode, done.stderr) == (0, b"")
    looked = guest.run("-c", _LOOK, str(guest.target))
    assert looked.returncode == 0, looked.stderr.decode()
    with pytest.raises(PermissionError):
        os.listdir(guest.target)
    client = guest.node.client()
    assert client.cached_bytes(client.stat("/data/large.bin")) == len(LARGE)
    (row,) = (r for r in json.loads(guest.orchestra("fuse", "ls", "--json").stdout) if r["folder"] == str(guest.target))
    assert (row["state"], row["path"]) == ("served", "/")
    done = guest.orchestra("fuse", "umount", str(guest.target))
    assert (done.returncode, done.stderr) == (0, b"")


def test_without_the_owners_daemon_a_guest_waits_for_it_and_is_told_who_starts_it(guest: Guest) -> None:
    """A guest starts no daemon: a read waits daemon.wait, then fails; the next daemon serves the same mount."""
    assert guest.orchestra("fuse", "mount", str(guest.target)).returncode == 0
    guest.node.stop()
    read = guest.run("-c", f"open('{guest.target}/data/dir/a.txt').read()")
    assert b"Input/output error" in read.stderr
    log = next((guest.home / "state").rglob("*.log")).read_text()
    assert "no daemon serves other users of cache.dir" in log
    assert "root has to name you in daemon.readers and to run orchestra daemon start" in log
    guest.node.start()
    read = guest.run("-c", f"assert open('{guest.target}/data/dir/a.txt').read() == 'hello\\n'")
    assert read.returncode == 0, read.stderr


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["s3://bucket/prefix"], b"other users may read"),
        (["/nope"], b"/nope"),
        (["--mode", "passthrough"], b"needs CAP_SYS_ADMIN"),
    ],
    ids=str,
)
def test_what_a_guest_may_not_mount_is_refused_in_one_line(guest: Guest, words: list[str], sentence: bytes) -> None:
    """No store of their own in the owner's namespace, no privilege; and nothing is mounted."""
    done = guest.orchestra("fuse", "mount", *words, str(guest.target))
    assert (done.returncode, done.stderr.count(b"\n")) == (1, 1), done.stderr
    assert sentence in done.stderr
    assert mount_at(str(guest.target)) is None


def test_a_user_whom_the_owner_does_not_name_mounts_nothing(guest: Guest) -> None:
    """Said in one line, before anything is mounted."""
    guest.node.stop()
    guest.node.reconfigure(mounts=[{"path": "/data", "uri": "file:///nowhere"}], daemon={"readers": ["12345"]})
    guest.node.start()
    done = guest.orchestra("fuse", "mount", str(guest.target))
    assert (done.returncode, done.stderr.count(b"\n")) == (1, 1), done.stderr
    assert b"user nobody (uid 65534) may not read" in done.stderr
    assert mount_at(str(guest.target)) is None
