"""What mounts and users ask of the space: pins, quotas, ages. Pure values.

Owns: whose an extent is (`Origin`) and which rules it falls under. Leaves to others: paths and mounts (the daemon turns
them into stores and keys), keeping to the rules (accounts).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class Origin:
    """Which object of which store an extent holds a version of."""

    store_id: str
    key: str

    def is_under(self, prefix: str) -> bool:
        """Whether it is the object `prefix`, or lies below it as a folder; "" is the whole store."""
        return not prefix or self.key == prefix or self.key.startswith(f"{prefix}/")


@dataclass(frozen=True, slots=True)
class StoreRule:
    """What holds for all extents of one store; None: no such limit."""

    quota_bytes: int | None = None
    ttl_s: float | None = None


@dataclass(frozen=True, slots=True)
class SpaceRules:
    """Everything asked for. `pins` are (store id, key): that object, and what lies below it as a folder."""

    pins: frozenset[tuple[str, str]] = frozenset()
    stores: Mapping[str, StoreRule] = field(default_factory=lambda: MappingProxyType({}))

    def is_pinned(self, origin: Origin | None) -> bool:
        """Whether a pin covers the object; it costs as many look-ups as its key has components, however many pins."""
        if not self.pins or origin is None:
            return False
        key = origin.key
        while (origin.store_id, key) not in self.pins:
            if not key:
                return False
            key = key.rpartition("/")[0]
        return True

    def rule_of(self, origin: Origin | None) -> StoreRule:
        """What holds for the object."""
        return _NO_RULE if origin is None else self.stores.get(origin.store_id, _NO_RULE)


_NO_RULE = StoreRule()
