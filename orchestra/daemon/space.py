"""Who may take how much of the cache: pins, `free`, quotas and ages, by path.

Owns: the pinned paths, kept in pins.json; turning paths and mounts into the rules that blocks keep to. Leaves to
others: keeping to them (blocks), what a path is (namespace).
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from orchestra.blocks.rules import Origin, SpaceRules, StoreRule
from orchestra.blocks.space import Freed
from orchestra.blocks.store import BlockStore
from orchestra.daemon.kept import replace_document
from orchestra.engine.mounted import OpenedMount
from orchestra.errors import CacheDirectoryError, NotFoundError
from orchestra.metadata.reader import MetadataReader
from orchestra.namespace.mounts import MountTable
from orchestra.namespace.paths import normalize_path
from orchestra.values import EntryKind, ObjectId

log = logging.getLogger(__name__)

# More paths than anybody pins by hand; each costs a look-up for every store that it covers.
PINS_MAX = 10_000


@dataclass(frozen=True, slots=True)
class Usage:
    """What the cache holds at and below a path, all versions of it."""

    held_bytes: int
    pinned_bytes: int


class SpaceAdmin:
    """Pins, frees, and tells blocks which rules hold. One event loop; what walks over all extents goes to a thread."""

    def __init__(self, blocks: BlockStore, metadata: MetadataReader, pins_file: Path) -> None:
        """Raises CacheDirectoryError if the pins cannot be read: to forget them would let go of what must stay."""
        self._space = blocks.space
        self._metadata = metadata
        self._pins_file = pins_file
        self._pins = _read_pins(pins_file)
        self._table: MountTable[OpenedMount] = MountTable([])

    @property
    def pins(self) -> list[str]:
        """The pinned paths, sorted."""
        return sorted(self._pins)

    def use(self, table: MountTable[OpenedMount]) -> None:
        """From now on these are the mounts; their quotas and ages, and the pins in them, hold at once."""
        self._table = table
        self._space.set_rules(self._rules())

    async def pin(self, path: str) -> Usage:
        """Keep what is cached below `path`, now and later, until `unpin`; also over restarts. Raises NotFoundError."""
        path = normalize_path(path)
        self._check_mounted(path)
        if path not in self._pins and len(self._pins) >= PINS_MAX:
            raise NotFoundError(f"cannot pin {path}: {PINS_MAX} paths are pinned; unpin some, or pin a folder above")
        await self._change(self._pins | {path})
        return await self.usage(path)

    async def unpin(self, path: str) -> Usage:
        """Let what is below `path` leave again. Raises NotFoundError if exactly that path is not pinned."""
        path = normalize_path(path)
        if path not in self._pins:
            above = [pin for pin in self._pins if _covers(pin, path)]
            hint = f"it is kept by the pin on {min(above)}" if above else "see: orchestra pin"
            raise NotFoundError(f"{path} is not pinned; {hint}")
        await self._change(self._pins - {path})
        return await self.usage(path)

    async def free(self, path: str, *, pinned: bool = False) -> Freed:
        """Drop what is cached at and below `path`, also of versions and files that are gone from the store, but not
        what is pinned, unless asked to. Raises NotFoundError if no mount covers or is below it."""
        path = normalize_path(path)
        self._check_mounted(path)
        await self.adopt()
        targets = self._targets(path)
        return await asyncio.to_thread(
            self._space.free, lambda origin: _is_in(origin, targets, everything=path == "/"), pinned=pinned
        )

    async def usage(self, path: str) -> Usage:
        """Return what the cache holds at and below `path`, by its accounts. Raises NotFoundError as `free` does."""
        path = normalize_path(path)
        self._check_mounted(path)
        await self.adopt()
        targets = self._targets(path)
        held = await asyncio.to_thread(
            self._space.held_bytes, lambda origin: _is_in(origin, targets, everything=path == "/")
        )
        return Usage(*held)

    async def adopt(self) -> None:
        """Find out whose the extents are of which a crash lost that, from the listings that are published."""
        digests = await asyncio.to_thread(self._space.unknown_digests)
        if not digests:
            return
        stores = [mount.store.store_id for mount in self._table if mount.opened is not None]
        origins = await asyncio.to_thread(partial(_find, self._metadata, stores, digests))
        if origins:
            self._space.learn(origins)
            log.info("found the paths of %d of %d objects that a crash had left without", len(origins), len(digests))

    async def _change(self, pins: frozenset[str]) -> None:
        _write_pins(self._pins_file, pins)
        self._pins = pins
        await self.adopt()
        await asyncio.to_thread(self._space.set_rules, self._rules())

    def is_mounted(self, path: str) -> bool:
        """Whether a mount covers `path` or lies below it."""
        try:
            self._table.locate(path)
        except NotFoundError:
            return False
        return True

    def _check_mounted(self, path: str) -> None:
        self._table.locate(path)

    def _targets(self, path: str) -> list[tuple[str, str]]:
        """The stores and keys that `path` stands for: in the mount that covers it, and every mount below it."""
        below = [
            (mount.store.store_id, "")
            for mount in self._table
            if mount.opened is not None and _covers(path, mount.path)
        ]
        if not self.is_mounted(path):  # a pin of a path whose mount was removed holds nothing, until it is back
            return below
        location = self._table.locate(path)
        if location is None or location.mount.opened is None:
            return below
        return [(location.mount.store.store_id, location.key), *below]

    def _rules(self) -> SpaceRules:
        stores: dict[str, StoreRule] = {}
        for mount in self._table:
            if mount.opened is not None:
                # Two mounts of one store share its extents: the stricter limit holds.
                rule = stores.get(mount.store.store_id, StoreRule())
                stores[mount.store.store_id] = StoreRule(
                    quota_bytes=_least(rule.quota_bytes, mount.config.quota_bytes),
                    ttl_s=_least(rule.ttl_s, mount.config.ttl_s),
                )
        return SpaceRules(frozenset(target for pin in self._pins for target in self._targets(pin)), stores)


_Number = TypeVar("_Number", int, float)


def _least(first: _Number | None, second: _Number | None) -> _Number | None:
    return second if first is None else first if second is None else min(first, second)


def _covers(path: str, other: str) -> bool:
    """Whether `other` is `path` or lies below it."""
    return path in ("/", other) or other.startswith(f"{path}/")


def _is_in(origin: Origin | None, targets: Iterable[tuple[str, str]], *, everything: bool) -> bool:
    if everything:
        return True
    return origin is not None and any(
        origin.store_id == store_id and origin.is_under(key.rstrip("/")) for store_id, key in targets
    )


def _find(metadata: MetadataReader, stores: Iterable[str], digests: set[str]) -> dict[str, Origin]:
    """Go through every published listing for objects with these digests."""
    found: dict[str, Origin] = {}
    for store_id in stores:
        prefixes = [""]
        while prefixes and len(found) < len(digests):
            prefix = prefixes.pop()
            for entry in metadata.any_listing(store_id, prefix) or ():
                key = prefix + entry.name.decode("utf-8", "surrogateescape")
                if entry.kind is EntryKind.DIRECTORY:
                    prefixes.append(f"{key}/")
                elif (digest := ObjectId(store_id, key, entry.version).digest()) in digests:
                    found[digest] = Origin(store_id, key)
    return found


def _read_pins(path: Path) -> frozenset[str]:
    try:
        pins = json.loads(path.read_bytes())
        return frozenset(normalize_path(pin) for pin in pins)
    except FileNotFoundError:
        return frozenset()
    except (OSError, ValueError, TypeError) as error:
        raise CacheDirectoryError(f"{path} is damaged ({error}); remove it and pin the paths again") from error


def _write_pins(path: Path, pins: Iterable[str]) -> None:
    """Raises CacheDirectoryError."""
    try:
        replace_document(path, json.dumps(sorted(pins), indent=1).encode())
    except OSError as error:
        raise CacheDirectoryError(f"{path} cannot be written: {error.strerror}") from error
