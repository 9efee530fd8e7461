"""What every command is given: which configuration, and the client made from it on first use.

Owns: the global options' values. Leaves to others: reading the file (config), reaching the daemon (client).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import click

from orchestra.config import Config, load_config

if TYPE_CHECKING:
    from orchestra.client.node import NodeClient


@dataclass(slots=True)
class Session:
    """The global options of one run of the command line; `ctx.obj` of every command."""

    config_path: str | None = None
    debug: bool = False
    _client: NodeClient | None = field(default=None, repr=False)

    @property
    def config(self) -> Config:
        """The settings. Raises ConfigError."""
        return load_config(self.config_path)

    @property
    def client(self) -> NodeClient:
        """The node's client, made at first use. Raises ConfigError."""
        if self._client is None:
            from orchestra.client.connect import connect

            self._client = connect(self.config_path)
        return self._client

    def close(self) -> None:
        """Close the client if there is one. Idempotent."""
        if self._client is not None:
            self._client.close()
            self._client = None


pass_session = click.make_pass_decorator(Session, ensure=True)
