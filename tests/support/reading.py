"""A process that reads through the node and says what it saw: `python -m tests.support.reading CONFIG PATH...`.

Prints one JSON object: the sha256 of each file, the messages it sent to the daemon, and the daemon's pid if asked for.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 60.0


def sha256(data: bytes) -> str:
    """The hash that a reading process tells of a file."""
    return hashlib.sha256(data).hexdigest()


def reading_process(config: Path, paths: Iterable[str], *, asks_pid: bool = False) -> subprocess.Popen[str]:
    """Start a process that reads `paths`."""
    command = [sys.executable, "-m", "tests.support.reading", str(config), "--pid" if asks_pid else "--", *paths]
    return subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def told_by(process: subprocess.Popen[str]) -> dict[str, Any]:
    """Wait for a reading process and return what it says."""
    out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, err
    return dict(json.loads(out))


def read_in_new_process(config: Path, paths: Iterable[str]) -> dict[str, Any]:
    """Read `paths` in a process of its own, and return what it says."""
    return told_by(reading_process(config, paths))


def main() -> None:
    """See the module."""
    from orchestra.client.connect import connect

    config, option, *paths = sys.argv[1:]
    client = connect(config)
    hashes = {path: sha256(client.read_file(path)) for path in paths}
    messages = client.messages_sent
    pid = client.daemon_request("GET", "/v1/status")["pid"] if option == "--pid" else None
    print(json.dumps({"hashes": hashes, "messages": messages, "daemon": pid, "pid": os.getpid()}))
    client.close()


if __name__ == "__main__":
    main()
