"""Asking the node's daemon, which is started if none runs.

Owns: trying again when the daemon goes away meanwhile, and a connection for who asks for nothing else. Leaves to
others: the wire, the process. Without what reading takes: a command that only asks is over before that is imported.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from orchestra.blocks.layout import CacheLayout
from orchestra.client.process import start_daemon
from orchestra.client.wire import ConnectionLostError, DaemonConnection
from orchestra.config import Config
from orchestra.errors import DaemonUnavailableError

# A daemon that dies this often within one request will not answer it: something kills it, or the request does.
_DAEMON_TRIES_MAX = 6
# Above the fetch deadline of the daemon: it answers with the real reason before we give up on it.
_ANSWER_MARGIN_S = 30.0

T = TypeVar("T")


def answer_timeout_s(config: Config) -> float:
    """How long an answer of the daemon is waited for."""
    return config.fetch.deadline_s + _ANSWER_MARGIN_S


def with_daemon(
    config: Config, connection: DaemonConnection, call: Callable[[DaemonConnection], T], *, start: bool = True
) -> T:
    """Return what `call` returns, starting a daemon if none runs (unless `start` is False or it is configured off).

    Raises what it raises, and DaemonUnavailableError.
    """
    may_start = start and config.daemon.autostart
    tries = 0
    while True:
        try:
            return call(connection)
        except ConnectionLostError as lost:
            # The daemon may be another one by now, or have broken off an answer that it could not finish.
            tries += 1
            if tries >= (_DAEMON_TRIES_MAX if may_start else 2):
                layout = CacheLayout(config.cache.dir)
                text = f"no daemon runs for cache.dir {layout.root}; start one with: orchestra daemon start"
                if may_start:
                    text = f"the daemon went away {tries} times: {lost}; see {layout.log}"
                raise DaemonUnavailableError(text) from lost
        if may_start:
            start_daemon(config, autostarted=True)


class DaemonAsker:
    """Asks the daemon of a cache that is ours. One process, one thread."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._connection = DaemonConnection(
            str(CacheLayout(config.cache.dir).socket), timeout_s=answer_timeout_s(config)
        )

    def request(self, method: str, route: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """Send a request. Raises what the daemon answers, or DaemonUnavailableError."""
        return with_daemon(self._config, self._connection, lambda connection: connection.request(method, route, body))

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()
