"""Which extent to evict next: one contract, one file per policy."""

from __future__ import annotations

from orchestra.blocks.eviction.contract import EvictionPolicy
from orchestra.blocks.eviction.lru import LruPolicy

__all__ = ["EvictionPolicy", "LruPolicy", "make_policy"]


def make_policy(name: str) -> EvictionPolicy:
    """Return the policy of that name; "auto" is LRU until a scan-aware one exists. Raises KeyError."""
    return {"lru": LruPolicy, "auto": LruPolicy}[name]()
