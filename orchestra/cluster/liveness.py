"""Who is there, judged by probes of a list of addresses; pure.

Owns: how many silent probes make a node lost, which node stands at which address. Leaves to others: the list and the
probes (probing).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from orchestra.cluster.membership import Changed
from orchestra.cluster.records import NodeRecord


@dataclass(slots=True)
class _Place:
    """One address: who answered there, None before the first answer and after too many silent probes."""

    record: NodeRecord | None = None
    silent_count: int = 0


class Liveness:
    """The addresses and who was found there. What changed comes out as events; None: nothing did."""

    def __init__(self, own: NodeRecord, silent_max: int) -> None:
        self._own = own
        self._silent_max = silent_max
        self._places: dict[str, _Place] = {}

    @property
    def to_probe(self) -> tuple[str, ...]:
        """Every address but this node's own."""
        return tuple(self._places)

    def keep(self, addresses: Iterable[str]) -> Changed | None:
        """Take the list as it is now; who stands at none of its addresses is gone."""
        wanted = dict.fromkeys(address for address in addresses if address != self._own.address)
        lost: list[str] = []
        for address in [known for known in self._places if known not in wanted]:
            lost += self._lost(self._places.pop(address))
        for address in wanted:
            self._places.setdefault(address, _Place())
        return Changed(0, lost=tuple(lost)) if lost else None

    def answered(self, address: str, record: NodeRecord) -> Changed | None:
        """Take an answer. It stands for its address; a node that answers at two addresses is reached at the first."""
        place = self._places.get(address)
        if place is None or record.node_id == self._own.node_id:
            return None
        place.silent_count = 0
        if place.record == record:
            return None
        before, place.record = place.record, record
        lost = () if before is None or self._stands(before.node_id) else (before.node_id,)
        return Changed(0, seen=(record,), lost=lost)

    def silent(self, address: str) -> Changed | None:
        """Take a probe without an answer."""
        place = self._places.get(address)
        if place is None:
            return None
        place.silent_count += 1
        if place.silent_count < self._silent_max:
            return None
        lost = self._lost(place)
        return Changed(0, lost=tuple(lost)) if lost else None

    def _lost(self, place: _Place) -> list[str]:
        record, place.record = place.record, None
        return [] if record is None or self._stands(record.node_id) else [record.node_id]

    def _stands(self, node_id: str) -> bool:
        return any(place.record is not None and place.record.node_id == node_id for place in self._places.values())
