"""The mount table as the daemon publishes it to every process of the node: what a client needs to find a path's blocks,
and nothing secret (no options, no credentials).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from orchestra.config import MountConfig
from orchestra.errors import CacheDirectoryError

_FORMAT = 1


@dataclass(frozen=True, slots=True)
class PublishedMount:
    """One mount. `error` says why its store could not be opened; "" if it could."""

    path: str
    store_id: str
    readonly: bool
    freshness_s: float
    prefetch: str
    error: str = ""


@dataclass(frozen=True, slots=True)
class PublishedNamespace:
    """All mounts, how blocks are cut, and which configuration the daemon runs with."""

    mounts: tuple[PublishedMount, ...]
    block_size_bytes: int
    extent_size_bytes: int
    verify: str
    fingerprint: str
    source: str


def fingerprint(mounts: Iterable[MountConfig]) -> str:
    """Return a hash of the mounts as configured (with `${VAR}` unexpanded), to see whether a configuration changed."""
    rows = [
        [
            *(mount.path, list(mount.uris), mount.readonly, mount.freshness_s, mount.prefetch),
            *(sorted(mount.options.items()), mount.quota_bytes, mount.ttl_s),
        ]
        for mount in mounts
    ]
    return hashlib.blake2b(json.dumps(rows).encode(), digest_size=16).hexdigest()


def write_namespace(path: Path, namespace: PublishedNamespace) -> None:
    """Publish, atomically."""
    body: dict[str, Any] = {"format": _FORMAT, **asdict(namespace)}
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(body))
    temporary.rename(path)


def read_namespace(path: Path) -> PublishedNamespace | None:
    """Return what is published, None if no daemon published anything yet.

    Raises CacheDirectoryError if it may not be read, or was written by another version of orchestra.
    """
    try:
        body = dict(json.loads(path.read_bytes()))
        made_by = body.pop("format")
        if made_by == _FORMAT:
            mounts = tuple(PublishedMount(**mount) for mount in body.pop("mounts"))
            return PublishedNamespace(mounts, **body)
    except (FileNotFoundError, NotADirectoryError):  # what is wrong with the directory is said by whoever makes it
        return None
    except OSError as error:
        raise CacheDirectoryError(f"{path} cannot be read: {error.strerror}; is cache.dir another user's?") from error
    except (ValueError, TypeError, KeyError) as error:
        raise CacheDirectoryError(f"{path} is damaged; restart the daemon to write it anew") from error
    raise CacheDirectoryError(f"{path} was written by another version of orchestra; restart the daemon")
