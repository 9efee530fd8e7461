"""How a face gets its client."""

from __future__ import annotations

from pathlib import Path

from orchestra.client.guest import GuestClient
from orchestra.client.node import NodeClient
from orchestra.client.process import foreign_owner
from orchestra.config import load_config


def connect(config: str | Path | None = None) -> NodeClient:
    """Return a client of the node that `config` describes (a path; None looks where the command line looks).

    Nothing is started or sent before the first use. Raises ConfigError.
    """
    settings = load_config(config)
    if foreign_owner(settings.cache.dir) is not None:
        return GuestClient(settings)
    return NodeClient(settings)
