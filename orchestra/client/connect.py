"""How a face gets its client."""

from __future__ import annotations

from pathlib import Path

from orchestra.client.node import NodeClient
from orchestra.config import load_config


def connect(config: str | Path | None = None) -> NodeClient:
    """Return a client of the node that `config` describes (a path; None looks where the command line looks).

    Nothing is started or sent before the first use. Raises ConfigError.
    """
    return NodeClient(load_config(config))
