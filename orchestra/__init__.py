"""orchestra: a data-orchestration file system for machine-learning training."""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = ["__version__", "connect"]

if TYPE_CHECKING:
    from orchestra.client.contract import Client


def connect(config: str | None = None) -> Client:
    """Return a client of this node's cache; starts the node daemon on first need.

    `config` is a path to an `orchestra.toml`; None looks where the command line looks. Raises ConfigError.
    """
    from orchestra.client.connect import connect as _connect

    return _connect(config)
