"""The daemon's mount table: from the configuration and from `orchestra mount add`, with stores opened and published.

Owns: which mounts there are, and telling every process of the node. Leaves to others: what a path means (namespace),
how a store is opened (stores).
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from orchestra.blocks.geometry import Geometry
from orchestra.blocks.layout import CacheLayout
from orchestra.config import Config, FetchConfig, MountConfig, Replication, expand_variables
from orchestra.daemon.kept import replace_document
from orchestra.engine.mounted import OpenedMount
from orchestra.errors import CacheDirectoryError, ConfigError, NotFoundError, OrchestraError
from orchestra.namespace.mounts import MountTable, check_mount_path
from orchestra.namespace.published import (
    PublishedMount,
    PublishedNamespace,
    fingerprint,
    read_namespace,
    write_namespace,
)
from orchestra.observe.change_log import Change, Scope
from orchestra.stores.contract import StoreSettings, UnderStore
from orchestra.units import format_size

log = logging.getLogger(__name__)

StoreOpener = Callable[[StoreSettings, FetchConfig], UnderStore]


class MountAdmin:
    """Adds, changes and removes mounts; `on_change` gets each new table. One event loop."""

    def __init__(
        self,
        config: Config,
        layout: CacheLayout,
        geometry: Geometry,
        *,
        open_store: StoreOpener,
        open_failover: Callable[[Sequence[UnderStore]], UnderStore],
        environ: Mapping[str, str],
        on_change: Callable[[MountTable[OpenedMount]], None],
        tell: Callable[[list[Change]], object] = lambda changes: None,
    ) -> None:
        """Opens the stores (without network traffic) and publishes the table. Raises ConfigError for a bad table.

        `tell` gets the paths that are served otherwise than it was published before, also by an earlier daemon.
        """
        self._config = config
        self._layout = layout
        self._geometry = geometry
        self._open_store = open_store
        self._open_failover = open_failover
        self._environ = environ
        self._on_change = on_change
        self._tell = tell
        self._added = _read_added(layout)
        self._shared: tuple[MountConfig, ...] = ()
        self._opened: dict[tuple[MountConfig, str], OpenedMount] = {}
        self._retired: list[UnderStore] = []
        self._apply(config, self._added)

    @property
    def table(self) -> MountTable[OpenedMount]:
        """The current table."""
        return self._table

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the configuration's mounts, as they were last read."""
        return fingerprint(self._config.mounts)

    def reload(self, config: Config) -> None:
        """Take the mounts of a configuration that was read again, and publish the table.

        Raises ConfigError, and changes nothing, if they do not fit together.
        """
        if fingerprint(config.mounts) != fingerprint(self._config.mounts):
            self._apply(config, self._added)
        else:
            self._publish()  # whoever asks for a reload may have found nothing published, or nothing readable

    async def add(self, mount: MountConfig) -> None:
        """Add a mount whose store answers, and remember it.

        Raises ConfigError (a bad path or URI, a mount over a mount, a bad option), or what the store says: a missing
        bucket, refused credentials, no connection. Then nothing has changed.
        """
        self.check_free(mount.path)
        await self._open_checked(mount)
        self._apply(self._config, [*self._added, mount])

    def check_free(self, path: str) -> None:
        """Raise ConfigError unless `path` can be a mount point and nothing is mounted there."""
        check_mount_path(path)
        if self._table.get(path) is not None:
            raise ConfigError(f"mount {path}: something is mounted there already; see: orchestra mount ls")

    async def check_store(self, mount: MountConfig) -> None:
        """Raise what `add` would raise of the mount's store; nothing is mounted."""
        await self._open_checked(mount, source="cluster")

    def share(self, mounts: Sequence[MountConfig]) -> None:
        """Take these as the mounts that all nodes of the cluster have. One whose path the configuration, or an added
        mount, has already is left out, and the log says so."""
        before, self._shared = self._shared, tuple(mounts)
        try:
            self._apply(self._config, self._added)
        except OrchestraError:
            self._shared = before
            raise

    async def update(self, mount: MountConfig) -> None:
        """Replace an added mount. Raises as `add` does; ConfigError for a mount of the configuration file."""
        self._check_added(mount.path)
        await self._open_checked(mount)
        self._apply(self._config, [mount if old.path == mount.path else old for old in self._added])

    async def _open_checked(self, mount: MountConfig, *, source: str = "added") -> None:
        if mount.quota_bytes is not None and mount.quota_bytes < self._geometry.block_size_bytes:
            raise ConfigError(
                f"mount {mount.path}: quota ({format_size(mount.quota_bytes)}) must hold at least one block of "
                f"{format_size(self._geometry.block_size_bytes)}"
            )
        opened = self._open(mount, source)
        opened.check_usable()
        try:
            await opened.store.probe()
        except OrchestraError:
            await opened.store.close()
            raise
        self._opened[_identity(mount, source)] = opened

    def remove(self, path: str) -> None:
        """Remove an added mount. What is cached of it stays until evicted. Raises ConfigError, NotFoundError."""
        self._check_added(path)
        self._apply(self._config, [old for old in self._added if old.path != path])

    async def close(self) -> None:
        """Close all stores."""
        for store in [*self._retired, *(mount.opened for mount in self._table if mount.opened is not None)]:
            await store.close()

    def _check_added(self, path: str) -> None:
        if any(old.path == path for old in self._added):
            return
        if self._table.get(path) is not None:
            raise ConfigError(f"mount {path} is defined in {self._config.source}: change it there")
        mounts = ", ".join(sorted(mount.path for mount in self._table)) or "none"
        raise NotFoundError(f"nothing is mounted at {path} (mounts: {mounts})")

    def _apply(self, config: Config, added: Iterable[MountConfig]) -> None:
        """Open what is new, then switch: table, memory on disk, publication."""
        added = list(added)
        wanted = [(mount, "config") for mount in config.mounts] + [(mount, "added") for mount in added]
        taken = {mount.path for mount, _ in wanted}
        for mount in self._shared:
            if mount.path in taken:
                log.warning("the cluster's mount %s is left out: this node has one of its own there", mount.path)
        wanted += [(mount, "cluster") for mount in self._shared if mount.path not in taken]
        opened = [self._opened.get(_identity(mount, source)) or self._open(mount, source) for mount, source in wanted]
        table = MountTable(opened)
        if added != self._added:
            _write_added(self._layout, added)
        kept = {_identity(mount.config, mount.source): mount for mount in opened}
        # Reads under way still use these; they are closed with the daemon.
        self._retired += [old.opened for key, old in self._opened.items() if key not in kept and old.opened is not None]
        self._opened, self._added, self._config, self._table = kept, added, config, table
        self._publish()
        self._on_change(table)

    def _open(self, mount: MountConfig, source: str) -> OpenedMount:
        try:
            options = {
                name: expand_variables(
                    value,
                    self._environ,
                    f"option {name}; set it where the daemon is started, and run: orchestra daemon stop",
                )
                for name, value in mount.options.items()
            }
            stores = [self._open_store(StoreSettings(uri, options), self._config.fetch) for uri in mount.uris]
            store = stores[0] if len(stores) == 1 else self._open_failover(stores)
            return OpenedMount(mount, source, store)
        except OrchestraError as error:
            log.error("mount %s cannot be used: %s", mount.path, error)
            return OpenedMount(mount, source, None, error)

    def _publish(self) -> None:
        mounts = tuple(
            PublishedMount(
                path=mount.path,
                store_id=mount.opened.store_id if mount.opened is not None else "",
                readonly=mount.config.readonly,
                freshness_s=mount.freshness_s,
                prefetch=mount.config.prefetch,
                error=str(mount.error) if mount.error is not None else "",
            )
            for mount in self._table
        )
        before = self._published()
        write_namespace(
            self._layout.namespace,
            PublishedNamespace(
                mounts=mounts,
                block_size_bytes=self._geometry.block_size_bytes,
                extent_size_bytes=self._geometry.extent_size_bytes,
                verify=self._config.cache.verify,
                fingerprint=fingerprint(self._config.mounts),
                source=str(self._config.source or ""),
            ),
        )
        self._tell(changed_paths(before, mounts))

    def _published(self) -> tuple[PublishedMount, ...]:
        try:
            found = read_namespace(self._layout.namespace)
        except CacheDirectoryError:
            return ()
        return () if found is None else found.mounts


def changed_paths(before: Iterable[PublishedMount], after: Iterable[PublishedMount]) -> list[Change]:
    """Return what a path now leads to something else for: everything below a mount that came, went, or has another
    store, and the folders that lead to it."""
    old, new = ({mount.path: (mount.store_id, mount.error) for mount in mounts} for mounts in (before, after))
    differing = sorted(path for path in old.keys() | new.keys() if old.get(path) != new.get(path))
    above = {path[:at] for path in differing for at in range(1, len(path)) if path[at] == "/"}
    return [Change(Scope.PATH, "", path) for path in sorted(above)] + [
        Change(Scope.BELOW, "", path) for path in differing
    ]


def mount_to_json(mount: MountConfig) -> dict[str, Any]:
    """Return the mount as the API and the cache directory hold it: freshness inf as "immutable", options unexpanded."""
    return {
        "path": mount.path,
        "uris": list(mount.uris),
        "readonly": mount.readonly,
        "freshness_s": "immutable" if math.isinf(mount.freshness_s) else mount.freshness_s,
        "prefetch": mount.prefetch,
        "options": dict(mount.options),
        "quota_bytes": mount.quota_bytes,
        "ttl_s": mount.ttl_s,
        "replication": None if mount.replication is None else dataclasses.asdict(mount.replication),
    }


def mount_from_json(body: Mapping[str, Any]) -> MountConfig:
    """Return the mount that `mount_to_json` described. Raises ConfigError naming the field that is wrong."""
    try:
        freshness = body.get("freshness_s", 60.0)
        uris = tuple(str(uri) for uri in body["uris"])
        if not uris:
            raise ConfigError("a mount needs at least one uri")
        return MountConfig(
            path=str(body["path"]),
            uris=uris,
            readonly=bool(body.get("readonly", True)),
            freshness_s=math.inf if freshness in ("immutable", None) else float(freshness),
            prefetch=str(body.get("prefetch", "readahead")),
            options={str(name): str(value) for name, value in dict(body.get("options", {})).items()},
            quota_bytes=None if body.get("quota_bytes") is None else int(body["quota_bytes"]),
            ttl_s=None if body.get("ttl_s") is None else float(body["ttl_s"]),
            replication=None if body.get("replication") is None else Replication(**body["replication"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, OrchestraError):
            raise
        raise ConfigError(f"not a mount: {error}") from error


def _identity(mount: MountConfig, source: str) -> tuple[MountConfig, str]:
    """A key for a dict: a mount's options are a dict and so cannot be hashed; sorted pairs can."""
    return dataclasses.replace(mount, options=_HashableOptions(mount.options)), source


class _HashableOptions(dict[str, str]):
    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))


def _read_added(layout: CacheLayout) -> list[MountConfig]:
    try:
        rows = json.loads(layout.added_mounts.read_bytes())
        return [mount_from_json(row) for row in rows]
    except FileNotFoundError:
        return []
    except (ValueError, TypeError) as error:
        raise CacheDirectoryError(
            f"{layout.added_mounts} is damaged ({error}); remove it and add the mounts again"
        ) from error


def _write_added(layout: CacheLayout, added: Iterable[MountConfig]) -> None:
    replace_document(layout.added_mounts, json.dumps([mount_to_json(mount) for mount in added], indent=1).encode())
