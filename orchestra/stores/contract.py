"""What every under store promises. `orchestra.testing.under_store.UnderStoreSuite` proves it for each one.

A store is opened on a root (bucket and prefix, folder, URL); keys are relative to it, use "/", and have no leading
slash.
All methods are coroutines of one event loop, safe to call many at a time, and safe to cancel.
Foreign exceptions never leave a store: they are translated to `orchestra.errors` with `from`, credentials left out.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from orchestra.values import ByteRange, ObjectInfo

# What a read returns: bytes, or a store's own buffer, without a copy. len() of it is the number of bytes.
Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class ListPage:
    """One answer of the store to one LIST request. `prefixes` end with "/"; both are relative to the store's root."""

    objects: tuple[ObjectInfo, ...]
    prefixes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class StoreSettings:
    """How to open a store: its URI and the mount's options, `${VAR}` already expanded. Never logged whole."""

    uri: str
    options: Mapping[str, str]


@runtime_checkable
class UnderStore(Protocol):
    """One opened under store."""

    @property
    def store_id(self) -> str:
        """Names the store (scheme, bucket, endpoint, root) without secrets; the same on every node and every day."""
        ...

    async def head(self, key: str) -> ObjectInfo:
        """Return what the store says now about `key`, with one request. Raises NotFoundError."""
        ...

    def list_directory(self, prefix: str) -> AsyncIterator[ListPage]:
        """Yield the objects and common prefixes directly below `prefix` ("" or ending with "/"), one page a request.

        Yields nothing (or one empty page) for a prefix that holds nothing; every key comes exactly once. An object
        whose key equals `prefix` (a folder marker) may be among the objects; callers drop it. Sizes, times and
        versions come with the listing: no request per object. Closing the iterator early is allowed.
        """
        ...

    async def read(self, info: ObjectInfo, byte_range: ByteRange) -> Buffer:
        """Return exactly `byte_range.length` bytes of exactly `info.version`, with one conditional request.

        Raises StaleObjectError if the object now has another version or is gone, StoreUnavailableError for a short
        body, a wrong range or anything else that another try may mend. `byte_range` lies within the object and is
        not empty.
        """
        ...

    async def probe(self) -> None:
        """Return if the store can be reached and its root exists, else raise with a sentence for the operator:
        NotFoundError (missing bucket, missing folder), AccessDeniedError, StoreUnavailableError."""
        ...

    async def close(self) -> None:
        """Release connections. The store is not used again."""
        ...
