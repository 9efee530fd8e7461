"""Who shows files in fuse.py: native files, orchestra's mounts, loopbacks through Python bindings and bindfs.

Owns: how each is started, where it shows the data, and who of them is here. Leaves to others: what is read
(fuse_works.py), turns and verdicts (fuse.py), rclone and s3fs-fuse (contestants.py).
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from common import HERE
from contestants import Contestant, Native, OrchestraMount, PeerMount, RcloneMount, S3fsFuse
from fuse_works import SMALL_SIZE, Sizes
from origin import BUCKET
from synthetic import dataset_keys, expected_bytes

from orchestra.units import MIB


class FolderMount(OrchestraMount):
    """orchestra's mount of the bucket."""

    workers = 1

    def orchestra(self, *arguments: str) -> str:
        if arguments[:2] == ("fuse", "mount"):
            arguments = (*arguments[:2], "--workers", str(self.workers), *arguments[2:])
        return super().orchestra(*arguments)

    @property
    def root(self) -> Path:
        return self.mountpoint / BUCKET

    def workers_now(self) -> list[int]:
        """Return the processes that answer."""
        mounts = json.loads(self.orchestra("fuse", "ls", "--json"))
        return next(list(m["workers"]) for m in mounts if m["folder"] == str(self.mountpoint))

    def peak_memory(self) -> str:
        """Return the most memory that daemon and workers ever had, and what of it no file backs now."""
        found = {"daemon": self.daemon_pid} | {f"worker {index}": pid for index, pid in enumerate(self.workers_now())}
        return ", ".join(f"{name} {_memory_of(pid)}" for name, pid in found.items())


class AutoMount(FolderMount):
    name = "orchestra mount (auto)"


class SecondMount(FolderMount):
    """Another folder of a mount's node: one daemon and one cache directory for all of them, which the memory holds."""

    def __init__(self, beside: FolderMount) -> None:
        self._beside = beside

    def start(self) -> None:
        self.config, self.environment = self._beside.config, self._beside.environment
        self.daemon_pid = self._beside.daemon_pid
        self.mountpoint = self._beside.folder / type(self).__name__
        self.show()

    def close(self) -> None:
        self.orchestra("fuse", "umount", str(self.mountpoint))


class PagecacheMount(SecondMount):
    name = "orchestra mount (pagecache)"
    mode = "pagecache"


class SmallFilesMount(SecondMount):
    """Nobody ever looks at a large file through it: a data set of small ones."""

    name = "orchestra mount (auto), small files only"


class TwoWorkers(SecondMount):
    name = "orchestra mount (2 workers)"
    workers = 2


class Loopback(PeerMount):
    """A FUSE file system that shows the native folder again."""

    script = ""

    def __init__(self, workspace: Path, origin_url: str, native: Path) -> None:
        super().__init__(workspace, origin_url)
        self.native = native

    def command(self) -> list[str]:
        return [sys.executable, str(HERE / self.script), str(self.native), str(self.mountpoint)]


class Pyfuse3(Loopback):
    name = "loopback, pyfuse3"
    script = "loopback_pyfuse3.py"


class Mfusepy(Loopback):
    name = "loopback, mfusepy"
    script = "loopback_mfusepy.py"


class SmallFolios(Contestant):
    """The small files as local ones again, in folios of 4 KiB.

    The kernel keeps the pages of a FUSE file system so, and those of a local file in larger folios, which are read
    faster: this is what a file costs in FUSE's page cache when nothing but the page cache costs anything.
    """

    name = "native files in folios of 4 KiB"
    page_cache = "warm"

    def __init__(self, workspace: Path, origin_url: str, count: int) -> None:
        super().__init__(workspace, origin_url)
        self.count = count

    def start(self) -> None:
        for key in dataset_keys("small", self.count):
            write_native(self.folder, key, SMALL_SIZE, part=4096)


class Bindfs(Loopback):
    name = "bindfs"

    def command(self) -> list[str]:
        options = "ro,kernel_cache,entry_timeout=3600,attr_timeout=3600"
        return ["bindfs", "-f", "-o", options, str(self.native), str(self.mountpoint)]


def _memory_of(pid: int) -> str:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    kib = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.startswith(("VmHWM", "RssAnon"))}
    return f"{kib['VmHWM'] / 1024:.0f} MiB ({kib['RssAnon'] / 1024:.0f} anonymous)"


def root_of(contestant: Contestant) -> Path:
    """Return the folder in which a contestant shows the data."""
    if isinstance(contestant, (Native, FolderMount)):
        return Path(contestant.root)
    if isinstance(contestant, SmallFolios):
        return contestant.folder
    assert isinstance(contestant, PeerMount)
    return contestant.mountpoint


def write_native(root: Path, key: str, size: int, part: int) -> None:
    """Write one made-up file, `part` bytes at a time, which is what decides on the folios of its pages."""
    path = root / key
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb", buffering=0) as file:
        for start in range(0, size, part):
            file.write(expected_bytes(key, start, min(size, start + part)))


def make_native(root: Path, sizes: Sizes) -> None:
    """Write the same files to the local disk."""
    for name, count, size in (("big", 1, sizes.large), ("small", sizes.small_count, SMALL_SIZE)):
        for key in dataset_keys(name, count):
            write_native(root, key, size, part=4 * MIB)
    for index in range(sizes.stat_count):
        if index % 10_000 == 0:
            (root / "stat" / str(index // 10_000)).mkdir(parents=True)
        os.mknod(f"{root}/stat/{index // 10_000}/{index:06}")
    (root / "listed").mkdir()
    for index in range(sizes.listed_count):
        os.mknod(f"{root}/listed/{index:07}")


def available(contestants: Sequence[Contestant], only: str) -> list[Contestant]:
    """Return who is asked for and installed; say who is not."""
    programs: dict[type[Contestant], str] = {Bindfs: "bindfs", RcloneMount: "rclone", S3fsFuse: "s3fs"}
    modules: dict[type[Contestant], str] = {Pyfuse3: "pyfuse3", Mfusepy: "mfusepy"}
    words = [word.strip() for word in only.split(",") if word.strip()]
    found: list[Contestant] = []
    for one in contestants:
        missing = (type(one) in programs and not shutil.which(programs[type(one)])) or (
            type(one) in modules and importlib.util.find_spec(modules[type(one)]) is None
        )
        if missing:
            print(f"{one.name} is not installed and left out", file=sys.stderr)
        elif isinstance(one, Native) or not words or any(word in one.name for word in words):
            found.append(one)
    return found
