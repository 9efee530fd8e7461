"""A real node whose namespace is a local folder: a configuration, a daemon at first need, and its end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from orchestra.client.process import stop_daemon
from orchestra.config import load_config


@dataclass(frozen=True)
class FolderNode:
    """What lies in `store` is seen below /data; `config` is the path of the node's orchestra.toml."""

    config: str
    store: Path


@contextmanager
def folder_node(root: Path, freshness: str = "strict") -> Iterator[FolderNode]:
    """Make a node below `root` (a short path: a socket lies in it), and stop its daemon in the end."""
    store = root / "store"
    store.mkdir()
    config = root / "orchestra.toml"
    config.write_text(
        f'[cache]\ndir = "{root}/cache"\nsize = "1GiB"\n'
        f'[[mount]]\npath = "/data"\nuri = "file://{store}"\nfreshness = "{freshness}"\n'
        '[daemon]\nidle_timeout = "2m"\n'
    )
    try:
        yield FolderNode(str(config), store)
    finally:
        stop_daemon(load_config(config))
