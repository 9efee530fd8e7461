"""The limit of a read between nodes: `sendfile` from the same files, over as many connections, and nothing else.

    python benchmarks/cluster_raw.py FILE...        prints its port

A request is 24 bytes (file, offset, length); the answer is those bytes. A thread serves each connection.
"""

from __future__ import annotations

import os
import socket
import struct
import sys
import threading

REQUEST = struct.Struct("<QQQ")


def serve(connection: socket.socket, fds: list[int]) -> None:
    """Answer until the other side hangs up."""
    with connection:
        while len(head := connection.recv(REQUEST.size, socket.MSG_WAITALL)) == REQUEST.size:
            number, offset, length = REQUEST.unpack(head)
            while length:
                sent = os.sendfile(connection.fileno(), fds[number], offset, length)
                offset, length = offset + sent, length - sent


def main() -> None:
    """Serve until killed."""
    fds = [os.open(path, os.O_RDONLY) for path in sys.argv[1:]]
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(listener.getsockname()[1], flush=True)
        while True:
            connection, _ = listener.accept()
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=serve, args=(connection, fds), daemon=True).start()


if __name__ == "__main__":
    main()
