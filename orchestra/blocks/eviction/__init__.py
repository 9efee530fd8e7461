"""Which extent to evict next, and what is worth its place: one contract, one file per policy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from orchestra.blocks.eviction.auto import AutoPolicy
from orchestra.blocks.eviction.contract import EvictionPolicy
from orchestra.blocks.eviction.lru import LruPolicy, NeverPolicy
from orchestra.blocks.eviction.plan import NextUses, PlanPolicy
from orchestra.blocks.eviction.s3fifo import S3FifoPolicy
from orchestra.blocks.eviction.sieve import SievePolicy

__all__ = [
    "POLICIES",
    "AutoPolicy",
    "EvictionPolicy",
    "LruPolicy",
    "NeverPolicy",
    "NextUses",
    "PlanPolicy",
    "S3FifoPolicy",
    "SievePolicy",
    "make_policy",
]

# What `cache.eviction` may be. A plan that is known is followed by default too.
POLICIES: Mapping[str, Callable[[], EvictionPolicy]] = MappingProxyType(
    {
        "auto": lambda: PlanPolicy(AutoPolicy()),
        "lru": LruPolicy,
        "never": NeverPolicy,
        "plan": lambda: PlanPolicy(LruPolicy()),
        "s3fifo": S3FifoPolicy,
        "sieve": SievePolicy,
    }
)


def make_policy(name: str) -> EvictionPolicy:
    """Return a new policy of that name. Raises KeyError."""
    return POLICIES[name]()
