"""The demo's node: its configuration, and the commands a user would type, each run as a process of its own.

Owns: the environment those commands see (the demo's own: nothing of the user's configuration, nothing left behind).
Leaves to others: what the commands do.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from orchestra.client.process import daemon_status
from orchestra.config import load_config
from orchestra.demo.bucket import BUCKET
from orchestra.errors import MountError, OrchestraError

MOUNT_PATH = "/demo"
_COMMAND_TIMEOUT_S = 60.0
# Room for the data several times over; the cache of a demo must not push anything out, nor fill the user's disk.
_CACHE_SIZE = "1GiB"


def demo_environment(folder: Path, store: Mapping[str, str], inherited: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of every process of the demo.

    Without the user's ORCHESTRA_* settings, without proxies between us and loopback, with the store's credentials where
    the configuration's ${...} finds them, and with logs and state below `folder`.
    """
    kept = {name: value for name, value in inherited.items() if not name.startswith("ORCHESTRA_")}
    return kept | {
        "NO_PROXY": "127.0.0.1,localhost",
        "no_proxy": "127.0.0.1,localhost",
        "XDG_STATE_HOME": str(folder / "state"),
        "DEMO_ACCESS_KEY": store["key"],
        "DEMO_SECRET_KEY": store["secret"],
        "ORCHESTRA_CONFIG": str(folder / "orchestra.toml"),
    }


def config_text(folder: Path, store: Mapping[str, str]) -> str:
    """Return the demo's orchestra.toml for a bucket with those mount options."""
    options = {**store, "key": "${DEMO_ACCESS_KEY}", "secret": "${DEMO_SECRET_KEY}"}
    table = ", ".join(f"{name} = {json.dumps(value)}" for name, value in options.items())
    return f"""\
[cache]
dir = {json.dumps(str(folder / "cache"))}
size = "{_CACHE_SIZE}"
free_space_ratio = 0.01

[[mount]]
path = "{MOUNT_PATH}"
uri = "s3://{BUCKET}"
readonly = true
freshness = "1h"
options = {{ {table} }}
"""


@dataclass(frozen=True, slots=True)
class ReadCounters:
    """What readers on this node read, as the daemon counts it: bytes on its disk already, and bytes it had to get."""

    hit_bytes: int
    miss_bytes: int


class Node:
    """One configured node: commands are run as `orchestra ...` with the demo's configuration."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder = folder
        self.environment = environment
        self.mount_folder = folder / "mnt"

    def run(self, *arguments: str) -> str:
        """Run `orchestra ARGUMENTS` and return what it printed. Raises OrchestraError with its one line."""
        ended = subprocess.run(
            [sys.executable, "-m", "orchestra", *arguments],
            env=self.environment,
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_COMMAND_TIMEOUT_S,
            start_new_session=True,
        )
        if ended.returncode != 0:
            lines = ended.stderr.strip().splitlines() or [f"no message, exit status {ended.returncode}"]
            raise OrchestraError(f"orchestra {' '.join(arguments)} failed: {lines[-1].removeprefix('orchestra: ')}")
        return ended.stdout

    def counters(self) -> ReadCounters:
        """Return the daemon's totals of what was read on this node."""
        # Asked without a process of its own, which would take the training's processor for a third of a second.
        status = daemon_status(load_config(self.folder / "orchestra.toml", self.environment))
        if status is None:
            raise OrchestraError(f"the demo's daemon has stopped; its log is in {self.folder / 'cache'}")
        reads = status["reads"]
        return ReadCounters(reads["hit_bytes"], reads["miss_bytes"])

    def mount(self) -> None:
        """Mount the namespace. Raises OrchestraError."""
        self.mount_folder.mkdir()
        self.run("fuse", "mount", str(self.mount_folder))
        if not os.path.ismount(self.mount_folder):
            raise MountError(f"orchestra fuse mount succeeded, and yet nothing is mounted on {self.mount_folder}")

    def unmount(self) -> None:
        """Unmount the namespace if it is mounted; by force if it does not go."""
        if not os.path.ismount(self.mount_folder):
            return
        try:
            self.run("fuse", "umount", str(self.mount_folder))
        except (OrchestraError, subprocess.TimeoutExpired):
            self.run("fuse", "umount", "--lazy", str(self.mount_folder))


@contextmanager
def running_node(folder: Path, store: Mapping[str, str]) -> Iterator[Node]:
    """Configure a node in `folder` for that bucket, run its daemon for as long as the block runs; afterwards nothing is
    mounted."""
    (folder / "orchestra.toml").write_text(config_text(folder, store))
    node = Node(folder, demo_environment(folder, store, os.environ))
    try:
        node.run("daemon", "start")
        yield node
    finally:
        try:
            node.unmount()
        finally:
            node.run("daemon", "stop")
