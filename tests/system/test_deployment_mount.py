"""The folder as the container of docker/kubernetes/daemonset.yaml makes it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.support.clusters import wait_until
from tests.support.node import DaemonNode, folder_daemon_node

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(not os.path.exists("/dev/fuse") or os.geteuid() != 0, reason="no /dev/fuse, or not root"),
]


@contextmanager
def mounted(node: DaemonNode, folder: Path) -> Iterator[psutil.Popen]:
    """The mount's container: its command, nowhere to write but the cache."""
    command = [sys.executable, "-m", "orchestra", "--config", str(node.config_path), "fuse", "mount", "--foreground"]
    environment = {**os.environ, "XDG_STATE_HOME": "/dev/null/state"}
    process = psutil.Popen([*command, "--allow-other", "/", str(folder)], env=environment)
    try:
        wait_until(lambda: _answers(folder))
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait(20)
        subprocess.run(["umount", "-l", str(folder)], check=False, capture_output=True)


def _answers(folder: Path) -> bool:
    try:
        return (folder / "data" / "a.txt").read_text() == "hello"
    except OSError:  # not there yet, or still the dead one
        return False


def test_a_mount_whose_container_was_killed_is_made_anew_by_the_next(tmp_path: Path) -> None:
    """All of its processes die at once, as when a container is killed, so that nobody can take the folder away: the
    same command finds the dead mount and puts a living one in its place. Nothing is written outside of the cache."""
    with folder_daemon_node(tmp_path, daemon={"autostart": False}) as (node, store):
        (store / "a.txt").write_text("hello")
        node.start()
        folder = tmp_path / "m"
        folder.mkdir()
        with mounted(node, folder) as first:
            family = [first, *first.children(recursive=True)]
            for one in family:
                one.send_signal(signal.SIGSTOP)
            for one in family:
                one.kill()
            psutil.wait_procs(family, 20)
            with pytest.raises(OSError, match="Transport endpoint is not connected"):
                os.statvfs(folder)
            with mounted(node, folder) as second:
                assert second.pid != first.pid
                assert _answers(folder)
