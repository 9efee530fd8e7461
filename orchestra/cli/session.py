"""What every command is given: which configuration, and the client made from it on first use.

Owns: the global options' values. Leaves to others: reading the file (config), reaching the daemon (client).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import click

from orchestra.config import Config, load_config

if TYPE_CHECKING:
    from orchestra.client.asking import DaemonAsker
    from orchestra.client.node import NodeClient


@dataclass(slots=True)
class Session:
    """The global options of one run of the command line; `ctx.obj` of every command."""

    config_path: str | None = None
    debug: bool = False
    _client: NodeClient | None = field(default=None, repr=False)
    _asker: DaemonAsker | None = field(default=None, repr=False)

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

    def daemon_request(self, method: str, route: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """As NodeClient's, without a client where there is none yet: what it takes to read is half of such a command's
        time."""
        if self._client is None and self._asker is None:
            from orchestra.client.asking import DaemonAsker
            from orchestra.client.process import foreign_owner

            settings = self.config
            if foreign_owner(settings.cache.dir) is None:
                self._asker = DaemonAsker(settings)
        if self._client is None and self._asker is not None:
            return self._asker.request(method, route, body)
        return self.client.daemon_request(method, route, body)

    def close(self) -> None:
        """Close what was opened. Idempotent."""
        if self._asker is not None:
            self._asker.close()
            self._asker = None
        if self._client is not None:
            self._client.close()
            self._client = None


pass_session = click.make_pass_decorator(Session, ensure=True)
