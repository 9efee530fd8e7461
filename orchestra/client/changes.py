"""The node's log of changes, as paths of the namespace.

Owns: which paths a key of a store is seen at. Leaves to others: the log (observe), what is done about it (faces).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from orchestra.client.contract import Extent
from orchestra.errors import OrchestraError
from orchestra.namespace.mounts import MountTable
from orchestra.namespace.paths import join
from orchestra.namespace.published import PublishedMount
from orchestra.observe.change_log import Change, ChangeReader, Scope

_EXTENTS = {
    Scope.KEY: Extent.PATH,
    Scope.CHILDREN: Extent.CHILDREN,
    Scope.PATH: Extent.PATH,
    Scope.BELOW: Extent.BELOW,
}


class NodeChanges:
    """See `orchestra.client.contract.Changes`. Raises OSError where there is no log."""

    def __init__(self, table: Callable[[], MountTable[PublishedMount]], path: str, position: int | None) -> None:
        self._table = table
        self._reader = ChangeReader(path, position)

    @property
    def position(self) -> int:
        """See Changes."""
        return self._reader.position

    def wait(self) -> Sequence[tuple[Extent, str]] | None:
        """See Changes."""
        changes = self._reader.wait()
        if changes is None:
            return None
        try:
            table = self._table()
        except OrchestraError:  # no mount table can be had now, so nobody knows which paths these keys are
            return [(Extent.BELOW, "/")]
        # A dict, as the same is often said twice; the order is of no importance.
        return list(dict.fromkeys(pair for change in changes for pair in _seen_at(table, change)))

    def close(self) -> None:
        """See Changes."""
        self._reader.close()


def _seen_at(table: MountTable[PublishedMount], change: Change) -> Iterator[tuple[Extent, str]]:
    extent = _EXTENTS[change.scope]
    if change.scope in (Scope.PATH, Scope.BELOW):
        yield extent, change.name
        return
    key = change.name.rstrip("/")
    for mount in table:
        if mount.store_id == change.store_id:
            yield extent, join(mount.path, key) if key else mount.path
