"""What the node has done for its readers so far, asked of its daemon: for whoever measures.

Owns: asking without ever starting a daemon or waiting long. Leaves to others: what the figures mean (observe/stalls).
"""

from __future__ import annotations

from orchestra.blocks.layout import CacheLayout
from orchestra.client.wire import ConnectionLostError, DaemonConnection
from orchestra.config import load_config
from orchestra.errors import OrchestraError
from orchestra.observe.stalls import NodeFigures

# A daemon that takes longer is not worth a training's time.
_TIMEOUT_S = 1.0
_ROUTE = "/v1/stalls?brief=1"


class NodeWatcher:
    """Asks one node's daemon. Any thread, any process."""

    def __init__(self, config: str | None = None) -> None:
        """`config` is the path of an orchestra.toml. Raises ConfigError."""
        layout = CacheLayout(load_config(config).cache.dir)
        self._connection = DaemonConnection(str(layout.socket), timeout_s=_TIMEOUT_S)

    def figures(self) -> NodeFigures | None:
        """Return what was done since the daemon's start, None if none answers."""
        try:
            return NodeFigures.from_json(self._connection.request("GET", _ROUTE)["figures"])
        except (ConnectionLostError, OrchestraError, KeyError):
            return None

    def close(self) -> None:
        """Close the connection. Idempotent."""
        self._connection.close()
