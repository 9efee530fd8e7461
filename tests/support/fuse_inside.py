"""A real mount served by a thread of the test's own process, so that a test sees the session's counters and client.

Every call that reaches the mount must let other threads run: os.stat, os.open, os.read do; a page fault does not.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from orchestra.client.contract import Client
from orchestra.fuse import mount
from orchestra.fuse.names import root_entry
from orchestra.fuse.options import MountOptions
from orchestra.fuse.session import Session


@contextmanager
def mounted_inside(client: Client, target: Path, options: MountOptions) -> Iterator[Session]:
    """Serve `client` on `target`, and follow its changes as a worker does."""
    session = Session(mount.attach(str(target), options), client, root_entry(client, options.root), options)
    changes = session.notices.changes_of(client)
    threads = [threading.Thread(target=session.run, daemon=True)]
    if changes is not None:
        threads.append(threading.Thread(target=session.notices.follow, args=(changes,), daemon=True))
    for thread in threads:
        thread.start()
    try:
        os.stat(target)
        yield session
    finally:
        if changes is not None:
            changes.close()
        mount.unmount(str(target), lazy=True)
        for thread in threads:
            thread.join(60)
        os.close(session.channel.device_fd)
