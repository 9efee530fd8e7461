"""One client a process for each configuration, however many objects of a face use it.

Owns: which of them share. Leaves to others: what a client is (contract), making one (connect).
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from orchestra.client.contract import Client

# No lock guards it: a lock held by another thread at a fork would stay held in the child for ever.
_clients: dict[object, Client] = {}


def shared_client(config: str | None) -> Client:
    """Return the process's client for `config`: a path, None looks where the command line looks. Raises ConfigError."""
    variables = frozenset(item for item in os.environ.items() if item[0].startswith("ORCHESTRA_"))
    try:
        folder = os.getcwd()
    except FileNotFoundError:
        folder = ""  # it was removed, so no configuration is found in it
    key = (config, folder, variables)
    client = _clients.get(key)
    if client is None:
        from orchestra.client.connect import connect

        made = connect(config)
        client = _clients.setdefault(key, made)
        if client is not made:
            made.close()
    return client


def close_shared_clients() -> None:
    """Close and forget them; one that is still in use connects again."""
    while _clients:
        _clients.popitem()[1].close()
