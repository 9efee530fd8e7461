"""Who takes part: native files, the bare store client, orchestra's faces, and the peers; each as a user would run it.

A contestant starts what serves (a mount, a daemon) and a reader process, says which processes work for it, and takes
everything down again. Owns: command lines and options of each. Leaves to others: what is read (the scripts), timing
(common.py), the reading loops (reader.py).
"""

from __future__ import annotations

import compileall
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
from origin import BUCKET
from reader import Work

import orchestra

HERE = Path(__file__).resolve().parent
KEY = SECRET = "bench"
START_TIMEOUT_S = 20.0


def clean_environment() -> dict[str, str]:
    """Return the environment for what we start: no settings of the user, no proxy, no bundle that rclone chokes on."""
    dropped = ("ORCHESTRA_", "AWS_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    return kept | {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", "BENCH_KEY": KEY, "BENCH_SECRET": SECRET}


def run(*command: str, environment: dict[str, str] | None = None) -> str:
    """Run a command and return what it printed; show what it complained of if it fails."""
    ended = subprocess.run(command, env=environment or clean_environment(), capture_output=True, text=True, timeout=120)
    if ended.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed with status {ended.returncode}: {ended.stderr.strip()}")
    return ended.stdout


def wait_mounted(folder: Path, process: subprocess.Popen[bytes]) -> None:
    """Return when `folder` is a mount."""
    deadline = time.perf_counter() + START_TIMEOUT_S
    while not os.path.ismount(folder):
        if process.poll() is not None or time.perf_counter() > deadline:
            raise SystemExit(f"{process.args!r} did not mount {folder}")
        time.sleep(0.05)


class Contestant:
    """One row of a table. `page_cache` says where a warm read finds its bytes in the kernel."""

    name = ""
    page_cache = "-"

    def __init__(self, workspace: Path, origin_url: str) -> None:
        self.folder = workspace / "".join(c if c.isalnum() else "-" for c in self.name)
        self.folder.mkdir(parents=True)
        self.origin_url = origin_url
        self.reader: subprocess.Popen[str] | None = None

    def reader_setup(self) -> tuple[str, dict[str, Any]]:
        """Return the reader's kind and its arguments."""
        raise NotImplementedError

    def start(self) -> None:
        """Start what serves."""

    def stop(self) -> None:
        """Stop what serves."""

    def serving(self) -> Sequence[int]:
        """Return the processes that serve, whose CPU time counts beside the reader's."""
        return ()

    def list_folders(self, folders: Sequence[str]) -> None:
        """Look at each folder once, untimed: a cold read is of data, not of names."""

    def read(self, work: Work) -> dict[str, Any]:
        """Let the reader do the work; return its answer, with the CPU seconds of what serves beside it."""
        if self.reader is None:
            self.reader = subprocess.Popen(
                [sys.executable, str(HERE / "reader.py")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=clean_environment(),
            )
        assert self.reader.stdin is not None
        assert self.reader.stdout is not None
        method, setup = self.reader_setup()
        before = cpu_seconds(self.serving())
        self.reader.stdin.write(json.dumps({"method": method, "setup": setup, "work": asdict(work)}) + "\n")
        self.reader.stdin.flush()
        line = self.reader.stdout.readline()
        if not line:
            raise SystemExit(f"the reader of {self.name} ended with status {self.reader.wait()}")
        answer: dict[str, Any] = json.loads(line)
        answer["serving_cpu_s"] = cpu_seconds(self.serving()) - before
        return answer

    def close(self) -> None:
        """End reader and servers, and remove what they kept."""
        if self.reader is not None:
            self.reader.communicate(timeout=30)  # closes its input, which ends it
        self.stop()
        shutil.rmtree(self.folder)


def cpu_seconds(pids: Sequence[int]) -> float:
    """Return user and system seconds of the processes and all their children, living or reaped."""
    total = 0.0
    seen: set[int] = set()
    for pid in pids:
        process = psutil.Process(pid)
        for one in [process, *process.children(recursive=True)]:
            if one.pid not in seen:
                seen.add(one.pid)
                times = one.cpu_times()
                total += times.user + times.system + times.children_user + times.children_system
    return total


class Native(Contestant):
    """The floor: the same bytes in plain files on the local disk."""

    name = "native files"
    page_cache = "warm"

    def __init__(self, workspace: Path, origin_url: str, root: Path) -> None:
        super().__init__(workspace, origin_url)
        self.root = root

    def reader_setup(self) -> tuple[str, dict[str, Any]]:
        return "folder", {"folder": str(self.root)}


class BareClient(Contestant):
    """The limit of what a store client reaches: obstore, straight from the server, keeping nothing."""

    name = "bare obstore"

    def reader_setup(self) -> tuple[str, dict[str, Any]]:
        return "obstore", {"url": self.origin_url, "bucket": BUCKET}


class OrchestraNode(Contestant):
    """A node of orchestra: daemon with a cache directory of its own."""

    mount_settings = ""  # more lines of the mount's table

    def start(self) -> None:
        # As pip does when it installs; a checkout, and PYTHONDONTWRITEBYTECODE, would compile at every start.
        compileall.compile_dir(str(Path(orchestra.__file__).parent), quiet=1)
        self.config = self.folder / "orchestra.toml"
        self.config.write_text(
            f"""\
[cache]
dir = "{self.folder / "cache"}"
size = "20GiB"
free_space_ratio = 0.01
extent_size = "1GiB"

[[mount]]
path = "/{BUCKET}"
uri = "s3://{BUCKET}"
readonly = true
freshness = "1h"
{self.mount_settings}
options = {{ endpoint_url = "{self.origin_url}", key = "${{BENCH_KEY}}", secret = "${{BENCH_SECRET}}" }}
"""
        )
        self.environment = clean_environment() | {"XDG_STATE_HOME": str(self.folder / "state")}
        self.orchestra("daemon", "start")
        self.daemon_pid = int(json.loads(self.orchestra("daemon", "status", "--json"))["pid"])

    def orchestra(self, *arguments: str) -> str:
        """Run a command of orchestra with this node's configuration."""
        command = [sys.executable, "-m", "orchestra", "--config", str(self.config), *arguments]
        return run(*command, environment=self.environment)

    def serving(self) -> Sequence[int]:
        return (self.daemon_pid,)

    def stop(self) -> None:
        self.orchestra("daemon", "stop")


class OrchestraFsspec(OrchestraNode):
    """orchestra through fsspec, in the reader's own process."""

    name = "orchestra fsspec"
    page_cache = "warm (cache directory)"

    def reader_setup(self) -> tuple[str, dict[str, Any]]:
        options = {"config": str(self.config)}
        return "fsspec", {"protocol": "orchestra", "options": options, "prefix": f"/{BUCKET}/", "by_file": False}

    def list_folders(self, folders: Sequence[str]) -> None:
        for folder in folders:
            self.orchestra("ls", f"/{BUCKET}/{folder}")


class OrchestraMount(OrchestraNode):
    """orchestra as a folder."""

    name = "orchestra mount (auto)"
    page_cache = "warm"
    mode = "auto"

    def start(self) -> None:
        super().start()
        self.mountpoint = self.folder / "mnt"
        self.show()

    def show(self) -> None:
        """Mount the node's namespace on `mountpoint`."""
        self.mountpoint.mkdir()
        self.orchestra("fuse", "mount", "--mode", self.mode, str(self.mountpoint))
        mounts = json.loads(self.orchestra("fuse", "ls", "--json"))
        self.mount_pid = next(int(m["pid"]) for m in mounts if m["folder"] == str(self.mountpoint))

    def reader_setup(self) -> tuple[str, dict[str, Any]]:
        return "folder", {"folder": f"{self.mountpoint}/{BUCKET}"}

    def serving(self) -> Sequence[int]:
        return (self.daemon_pid, self.mount_pid)

    def list_folders(self, folders: Sequence[str]) -> None:
        for folder in folders:
            os.listdir(f"{self.mountpoint}/{BUCKET}/{folder}")

    def cached_file(self, size: int) -> Path:
        """Return the file of the cache directory that holds an object of this size whole."""
        found = [p for p in (self.folder / "cache" / "extents").rglob("*") if p.is_file() and p.stat().st_size == size]
        if len(found) != 1:
            raise SystemExit(f"expected one cached file of {size} bytes, found {len(found)}")
        return found[0]

    def stop(self) -> None:
        self.orchestra("fuse", "umount", str(self.mountpoint))
        super().stop()


class OrchestraPagecacheMount(OrchestraMount):
    """orchestra as a folder, every warm byte in the kernel's page cache."""

    name = "orchestra mount (pagecache)"
    mode = "pagecache"


class PeerMount(Contestant):
    """A peer's FUSE mount in the foreground."""

    page_cache = "warm"

    def command(self) -> list[str]:
        """Return the command that mounts on `self.mountpoint` and stays."""
        raise NotImplementedError

    def start(self) -> None:
        self.mountpoint = self.folder / "mnt"
        self.mountpoint.mkdir()
        (self.folder / "cache").mkdir()
        with (self.folder / "log").open("wb") as log:
            self.process = subprocess.Popen(self.command(), env=clean_environment(), stdout=log, stderr=log)
        wait_mounted(self.mountpoint, self.process)

    def reader_setup(self) -> tuple[str, dict[str, Any]]:
        return "folder", {"folder": str(self.mountpoint)}

    def serving(self) -> Sequence[int]:
        return (self.process.pid,)

    def list_folders(self, folders: Sequence[str]) -> None:
        for folder in folders:
            os.listdir(self.mountpoint / folder)

    def stop(self) -> None:
        run("umount", str(self.mountpoint))
        self.process.wait(30)


class RcloneMount(PeerMount):
    """rclone mount with its whole-file disk cache."""

    name = "rclone mount (vfs full)"

    def command(self) -> list[str]:
        config = self.folder / "rclone.conf"
        config.write_text(
            f"[bench]\ntype = s3\nprovider = Other\nendpoint = {self.origin_url}\n"
            f"access_key_id = {KEY}\nsecret_access_key = {SECRET}\nforce_path_style = true\n"
        )
        options = ["--vfs-cache-mode", "full", "--cache-dir", str(self.folder / "cache"), "--read-only"]
        options += ["--dir-cache-time", "1h", "--attr-timeout", "1h", "--poll-interval", "0"]
        return ["rclone", "--config", str(config), "mount", f"bench:{BUCKET}", str(self.mountpoint), *options]


class S3fsFuse(PeerMount):
    """s3fs-fuse with its disk cache."""

    name = "s3fs-fuse (use_cache)"

    def command(self) -> list[str]:
        secrets = self.folder / "passwd"
        secrets.write_text(f"{KEY}:{SECRET}\n")
        secrets.chmod(0o600)
        options = [f"url={self.origin_url}", f"passwd_file={secrets}", "use_path_request_style", "endpoint=us-east-1"]
        options += [f"use_cache={self.folder / 'cache'}", "max_stat_cache_size=200000", "stat_cache_expire=3600"]
        options += ["parallel_count=16", "multipart_size=10", "ro"]
        flags = [flag for option in options for flag in ("-o", option)]
        return ["s3fs", BUCKET, str(self.mountpoint), "-f", *flags]


class S3fsPython(Contestant):
    """s3fs, fsspec's own S3 client: no cache of data."""

    name = "s3fs"

    def options(self) -> dict[str, Any]:
        """Return the options of fsspec's S3 file system."""
        return {"key": KEY, "secret": SECRET, "endpoint_url": self.origin_url, "default_cache_type": "readahead"}

    def reader_setup(self) -> tuple[str, dict[str, Any]]:
        return "fsspec", {"protocol": "s3", "options": self.options(), "prefix": f"{BUCKET}/", "by_file": False}


class FsspecCache(S3fsPython):
    """One of fsspec's caching file systems over s3fs."""

    page_cache = "warm (its files)"
    protocol = ""

    def reader_setup(self) -> tuple[str, dict[str, Any]]:
        options = {
            "target_protocol": "s3",
            "target_options": self.options(),
            "cache_storage": str(self.folder / "cache"),
        }
        return "fsspec", {"protocol": self.protocol, "options": options, "prefix": f"{BUCKET}/", "by_file": True}


class FileCache(FsspecCache):
    name = "fsspec filecache over s3fs"
    protocol = "filecache"


class SimpleCache(FsspecCache):
    name = "fsspec simplecache over s3fs"
    protocol = "simplecache"


class BlockCache(FsspecCache):
    name = "fsspec blockcache over s3fs"
    protocol = "blockcache"
