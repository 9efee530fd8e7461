"""The mount table that all nodes of a cluster have in common, in etcd below /orchestra/v1/mounts.

Owns: which mounts go there and come from there, that no secret does, what a node starts with while etcd is away. Leaves
to others: following etcd (etcd_table), opening stores and publishing (daemon.mounts).

A row is the JSON of a mount as the API has it, options as they were written: each node puts in its own variables.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from orchestra.cluster.etcd_gateway import EtcdUnreachableError
from orchestra.cluster.etcd_table import EtcdTable, Row
from orchestra.config import MountConfig
from orchestra.config_mounts import looks_secret, uri_without_password
from orchestra.daemon.mounts import MountAdmin, mount_from_json, mount_to_json
from orchestra.errors import ConfigError, DaemonUnavailableError, OrchestraError
from orchestra.namespace.mounts import check_mount_path

# A mount's path begins with a slash.
PREFIX = b"/orchestra/v1/mounts"
log = logging.getLogger(__name__)


class SharedMounts:
    """Adds, changes and removes mounts of the whole cluster. One event loop."""

    def __init__(self, endpoints: Sequence[str], mounts: MountAdmin, kept: Path) -> None:
        """`kept` is where this node keeps the table for a start without etcd; what is there is mounted at once."""
        self._mounts = mounts
        self._kept = kept
        self._table = EtcdTable(endpoints, PREFIX, self._take)
        self._known: tuple[MountConfig, ...] = ()
        self._mount(_read(kept))

    async def run(self) -> None:
        """Follow the table until cancelled."""
        await self._table.run()

    async def close(self) -> None:
        """Close connections."""
        await self._table.close()

    def has(self, path: str) -> bool:
        """Whether that mount is one of the cluster's."""
        return any(mount.path == path for mount in self._known)

    async def add(self, mount: MountConfig) -> None:
        """Mount it on every node, once its store answered here. Raises what MountAdmin.add does, ConfigError for a
        secret in it, DaemonUnavailableError where etcd does not answer: then nothing has changed."""
        refuse_secrets(mount)
        self._mounts.check_free(mount.path)
        await self._mounts.check_store(mount)
        if not await self._put(mount):
            raise ConfigError(f"mount {mount.path}: another node mounted something there; see: orchestra mount ls")

    async def update(self, mount: MountConfig) -> None:
        """Replace a mount of the cluster. Raises as `add` does."""
        refuse_secrets(mount)
        await self._mounts.check_store(mount)
        if not await self._put(mount):
            raise ConfigError(f"mount {mount.path}: another node changed it just now; see: orchestra mount ls")

    async def remove(self, path: str) -> None:
        """Unmount it on every node. Raises ConfigError, DaemonUnavailableError."""
        try:
            is_done = await self._table.delete(_name(path))
        except EtcdUnreachableError as error:
            raise _unchanged(path, error) from error
        if not is_done:
            raise ConfigError(f"mount {path}: another node changed it just now; see: orchestra mount ls")

    async def _put(self, mount: MountConfig) -> bool:
        try:
            return await self._table.put(_name(mount.path), json.dumps(mount_to_json(mount)).encode())
        except EtcdUnreachableError as error:
            raise _unchanged(mount.path, error) from error

    def _take(self, rows: Mapping[bytes, Row]) -> None:
        mounts = tuple(mount for name in sorted(rows) if (mount := _mount_of(name, rows[name])) is not None)
        if mounts == self._known:
            return
        self._mount(mounts)
        _write(self._kept, self._known)

    def _mount(self, mounts: tuple[MountConfig, ...]) -> None:
        try:
            self._mounts.share(mounts)
        except (OrchestraError, OSError) as error:
            log.error("the cluster's mounts cannot be taken, and stay as they were: %s", error)
            return
        self._known = mounts


def refuse_secrets(mount: MountConfig) -> None:
    """Raise ConfigError if the mount holds a secret itself: etcd is no place for one."""
    named = [f"option {name}" for name, value in mount.options.items() if looks_secret(name, value)]
    named += ["the password in its address" for uri in mount.uris if uri_without_password(uri) != uri]
    if named:
        raise ConfigError(
            f"mount {mount.path}: refusing to write a secret ({named[0]}) to etcd, where the cluster's mounts are; "
            "write '${VARIABLE}' in its place, and set that variable where each daemon is started"
        )


def _unchanged(path: str, error: EtcdUnreachableError) -> DaemonUnavailableError:
    return DaemonUnavailableError(f"mount {path}: the cluster's mounts cannot be changed now: {error}")


def _name(path: str) -> bytes:
    return path.encode("utf-8", "surrogateescape")


def _mount_of(name: bytes, row: Row) -> MountConfig | None:
    """The mount in a row; None for what is none, on every node alike."""
    try:
        body = json.loads(row.value)
        if not isinstance(body, dict):
            raise ConfigError("not a mount")
        mount = mount_from_json(body)
        check_mount_path(mount.path)
        if _name(mount.path) != name:
            raise ConfigError(f"it is of the path {mount.path}")
    except (ValueError, OrchestraError) as error:
        log.warning("etcd's key %r is left out: %s", PREFIX + name, error)
        return None
    return mount


def _read(kept: Path) -> tuple[MountConfig, ...]:
    try:
        return tuple(mount_from_json(row) for row in json.loads(kept.read_bytes()))
    except FileNotFoundError:
        return ()
    except (OSError, ValueError, TypeError, OrchestraError) as error:
        log.warning("%s cannot be used until etcd answers: %s", kept, error)
        return ()


def _write(kept: Path, mounts: tuple[MountConfig, ...]) -> None:
    """Keep the table for a start without etcd. A disk without room for it is said in the log."""
    temporary = kept.with_suffix(".tmp")
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "wb") as file:
            file.write(json.dumps([mount_to_json(mount) for mount in mounts], indent=1).encode())
        temporary.rename(kept)
    except OSError as error:
        log.warning("the cluster's mounts cannot be kept at %s: %s", kept, error.strerror)
