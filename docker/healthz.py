#!/usr/bin/env python3
"""Exit status 0 if this container's node daemon answers GET /healthz, 1 with one line if not.

Asks at $ORCHESTRA_CLUSTER_LISTEN where the node is in a cluster, else at the unix socket in $ORCHESTRA_CACHE_DIR.
Imports nothing of orchestra: it runs every ten seconds, and must not cost what an import costs.
"""

from __future__ import annotations

import os
import socket
import sys

TIMEOUT_S = 3.0


def connected() -> socket.socket:
    """Return a connection to the daemon. Raises OSError, ValueError."""
    listen = os.environ.get("ORCHESTRA_CLUSTER_LISTEN")
    if listen:
        host, _, port = listen.rpartition(":")
        return socket.create_connection((host.strip("[]"), int(port)), TIMEOUT_S)
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(TIMEOUT_S)
    connection.connect(os.path.join(os.environ["ORCHESTRA_CACHE_DIR"], "daemon.sock"))
    return connection


def main() -> int:
    """Ask once."""
    try:
        with connected() as connection:
            connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            answer = connection.recv(4096)
    except (OSError, ValueError, KeyError) as error:
        sys.stderr.write(f"the node daemon does not answer: {type(error).__name__}: {error}\n")
        return 1
    if answer.split(b" ", 2)[1:2] == [b"200"]:
        return 0
    sys.stderr.write(f"the node daemon answers {answer[:60]!r}\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
