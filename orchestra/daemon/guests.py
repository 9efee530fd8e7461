"""The daemon's second socket, for processes of other users of this machine, which may read and nothing else.

Owns: where it is, whom `daemon.readers` lets in, how many at a time. Leaves to others: what guests are answered
(api/guests). Without `daemon.readers` there is no such socket: the daemon reads with its owner's credentials, and who
may use them is for the owner to say.
"""

from __future__ import annotations

import asyncio
import contextlib
import grp
import logging
import os
import pwd
import socket
import stat
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from orchestra.blocks.layout import SOCKET_PATH_LIMIT_BYTES
from orchestra.daemon.api.app import serving
from orchestra.daemon.api.context import Activity
from orchestra.daemon.api.guests import make_guest_app
from orchestra.daemon.assembly import Node
from orchestra.errors import CacheDirectoryError

log = logging.getLogger(__name__)

# Guests must not use up the descriptors that the owner's own readers need.
GUEST_CONNECTIONS_MAX = 512
_BACKLOG = 128
# A guest that is quiet for so long connects anew, which costs it 50 us.
_KEEPALIVE_S = 60.0
_DRAIN_TIMEOUT_S = 5.0
_EVERYBODY = "*"


class Admission:
    """Says whether `daemon.readers` names a user: by name, by number, by a group ("@ml"), or everybody ("*")."""

    def __init__(self, readers: Sequence[str]) -> None:
        self._readers = frozenset(readers)
        self._known: dict[int, bool] = {0: True, os.geteuid(): True}

    async def admits(self, uid: int) -> bool:
        """Return it. The user database, which may be a directory service far away, is asked once for each user."""
        known = self._known.get(uid)
        if known is None:
            known = self._known[uid] = await asyncio.to_thread(self._look, uid)
        return known

    def _look(self, uid: int) -> bool:
        if _EVERYBODY in self._readers or str(uid) in self._readers:
            return True
        try:
            user = pwd.getpwuid(uid)
        except KeyError:
            return False
        return user.pw_name in self._readers or not self._readers.isdisjoint(_groups_of(user))


def _groups_of(user: pwd.struct_passwd) -> list[str]:
    names = []
    for number in os.getgrouplist(user.pw_name, user.pw_gid):
        with contextlib.suppress(KeyError):
            names.append(f"@{grp.getgrgid(number).gr_name}")
    return names


@contextlib.asynccontextmanager
async def answering_guests(node: Node, activity: Activity) -> AsyncIterator[None]:
    """Answer other users inside the block, if `daemon.readers` names any. Raises CacheDirectoryError."""
    readers = node.config.daemon.readers
    if not readers:
        yield
        return
    app = make_guest_app(node, activity, Admission(readers).admits)
    async with serving(app, drain_timeout_s=_DRAIN_TIMEOUT_S, keepalive_s=_KEEPALIVE_S) as web_server:

        def connection() -> asyncio.Protocol:
            if len(web_server.connections) >= GUEST_CONNECTIONS_MAX:
                return _Full()
            return web_server()

        path = node.layout.guest_socket
        listener = _listener(path)
        server = await asyncio.get_running_loop().create_unix_server(connection, sock=listener, backlog=_BACKLOG)
        log.info("other users may read at %s: %s", path, ", ".join(readers))
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                path.unlink()
            server.close()


class _Full(asyncio.Protocol):
    """A connection too many: closed, and its client tries again or says that nobody answers."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio.BaseProtocol."""
        transport.close()


def _listener(path: Path) -> socket.socket:
    """Return a socket at `path` that everybody may connect to: who may go on is told from who the other end is."""
    if len(os.fsencode(path)) > SOCKET_PATH_LIMIT_BYTES:
        raise CacheDirectoryError(f"daemon.readers needs a socket at {path}, a path too long: shorten cache.dir")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _remove_own(path)
        listener.bind(str(path))
        # By descriptor: the folder may be one where others could put a link in the socket's place meanwhile.
        fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            if not _is_own_socket(os.fstat(fd)):
                raise CacheDirectoryError(f"daemon.readers: somebody replaced the socket {path}; use another cache.dir")
            os.chmod(f"/proc/self/fd/{fd}", 0o666)
        finally:
            os.close(fd)
    except OSError as error:
        listener.close()
        if isinstance(error, CacheDirectoryError):
            raise
        raise CacheDirectoryError(
            f"daemon.readers: the socket for other users, {path}, cannot be made: {error.strerror}; the daemon must "
            "be able to write in that folder"
        ) from error
    return listener


def _remove_own(path: Path) -> None:
    """Remove what a dead daemon of ours left."""
    try:
        info = path.lstat()
    except FileNotFoundError:
        return
    if not _is_own_socket(info):
        raise CacheDirectoryError(f"daemon.readers: {path} is in the way, and is no socket of ours: remove it")
    path.unlink()


def _is_own_socket(info: os.stat_result) -> bool:
    return stat.S_ISSOCK(info.st_mode) and info.st_uid == os.geteuid()
