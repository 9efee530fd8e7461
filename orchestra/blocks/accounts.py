"""How much the cache holds and of whom, how much it may hold, and what leaves first.

Owns: sizes, origins and use, in memory, persisted in batches; the limits: capacity, free-space floor, quotas, ages, and
the pins that stand above them. Leaves to others: the files themselves (store), the order (eviction), paths (daemon).
Not thread-safe: the block store calls it under its lock.

A pinned extent is in no policy's order, so nothing ever looks at it in search of a victim. A store with a quota has a
policy of its own beside the common one: each knows the order in which it would evict.
"""

# Over 500 lines: the limits are looked at together, so that what one of them makes leave counts for the next.

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from orchestra.blocks.copies import Copies
from orchestra.blocks.eviction import EvictionPolicy, LruPolicy, PlanPolicy
from orchestra.blocks.index import BlockIndex, IndexRow
from orchestra.blocks.rules import Origin, SpaceRules
from orchestra.clock import Clock, SystemClock


class CacheFullError(Exception):
    """There is no room, not even after evicting what may leave. The engine then serves without caching."""


class DiskFullError(CacheFullError):
    """The disk itself says so, whatever the accounts see."""


class NotAdmittedError(CacheFullError):
    """The policy keeps what it has: this newcomer is not worth the place of another."""


# What a disk keeps for the cache's own records, presence maps and index, even where no share of it has to stay free.
_RECORDS_BYTES_MAX = 1024 * 1024
_RECORDS_RATIO_MAX = 0.05
# Objects asked for whose bytes are not here (yet): what is in flight, and what was refused and is noted as read a
# moment later. 128 MiB of 10 kB objects in flight are 13,000; loads ask for more than is in flight.
_EXPECTED_MAX = 65_536


@dataclass(frozen=True, slots=True)
class SpaceLimit:
    """What bounds the cache: its own size, the share of its disk that stays free for others, and the disk itself."""

    capacity_bytes: int
    free_space_ratio: float
    statvfs: Callable[[], os.statvfs_result]

    def room_bytes(self, used_bytes: int) -> int:
        """Bytes that may still be added; negative when something must leave."""
        disk = self.statvfs()
        total_bytes = disk.f_blocks * disk.f_frsize
        records_bytes = min(_RECORDS_BYTES_MAX, total_bytes * _RECORDS_RATIO_MAX)
        floor = int(max(total_bytes * self.free_space_ratio, records_bytes))
        return min(self.capacity_bytes - used_bytes, disk.f_bavail * disk.f_frsize - floor)


@dataclass(slots=True)
class _Held:
    """One extent or small object."""

    size_bytes: int = 0
    last_use: int = 0  # a counter: the order of use
    used_s: int = 0  # seconds since boot
    origin: Origin | None = None
    is_pinned: bool = False


@dataclass(slots=True)
class _Space:
    """A part of the cache with an order of its own: all of it, or one store's quota."""

    policy: EvictionPolicy
    limit_bytes: int = 0
    used_bytes: int = 0
    reserved_bytes: int = 0
    pinned_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Victims:
    """What is to leave, by whose order: a quota's own, or that of the whole cache."""

    of_quota: list[str] = field(default_factory=list)
    of_all: list[str] = field(default_factory=list)
    copies: list[str] = field(default_factory=list)  # of what other nodes own: in no policy's order

    def __iter__(self) -> Iterator[str]:
        yield from self.of_quota
        yield from self.of_all
        yield from self.copies


class Accounts:
    """What is held by extent name, kept in step with eviction policies and an index on disk."""

    def __init__(
        self,
        policy: EvictionPolicy,
        limit: SpaceLimit,
        index: BlockIndex | None = None,
        *,
        make_policy: Callable[[], EvictionPolicy] = LruPolicy,
        clock: Clock | None = None,
    ) -> None:
        """`make_policy` makes those of quotas."""
        self._limit = limit
        self._index = index
        self._make_policy = make_policy
        self._clock = clock or SystemClock()
        self._rules = SpaceRules()
        self.copies = Copies()
        self._held: dict[str, _Held] = {}
        self._all = _Space(policy)
        self._quotas: dict[str, _Space] = {}
        # Names of stores whose extents age, by store; the longest unused first. Without pinned ones.
        self._by_age: dict[str, OrderedDict[str, None]] = {}
        self._expected: OrderedDict[str, Origin] = OrderedDict()  # by digest
        self._asked_for: OrderedDict[str, None] = OrderedDict()  # digests: somebody said that he wants them here
        self._use_counter = 0
        self._changed: set[str] = set()
        self._removed: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self._held

    def __len__(self) -> int:
        return len(self._held)

    @property
    def used_bytes(self) -> int:
        """Bytes held."""
        return self._all.used_bytes

    @property
    def pinned_bytes(self) -> int:
        """Bytes held that may not leave."""
        return self._all.pinned_bytes

    @property
    def reserved_bytes(self) -> int:
        """Bytes about to be written."""
        return self._all.reserved_bytes

    @property
    def plans(self) -> list[PlanPolicy]:
        """Where readers' plans are told; empty if the policy does not follow any."""
        policies = [self._all.policy, *(quota.policy for quota in self._quotas.values())]
        return [policy for policy in policies if isinstance(policy, PlanPolicy)]

    def names(self) -> list[str]:
        """All names held."""
        return list(self._held)

    def size_of(self, name: str) -> int:
        """Bytes charged for that name, 0 if it is not held."""
        held = self._held.get(name)
        return held.size_bytes if held is not None else 0

    def used_s(self, name: str) -> int:
        """When that name, which is held, was used last, in seconds since boot."""
        return self._held[name].used_s

    def is_pinned(self, name: str) -> bool:
        """Whether that name is held and may not leave."""
        held = self._held.get(name)
        return held is not None and held.is_pinned

    def origins(self) -> list[tuple[str, Origin | None]]:
        """Every name held, and whose it is; None where a crash lost that."""
        return [(name, held.origin) for name, held in self._held.items()]

    def used_by_store(self) -> dict[str, int]:
        """Bytes held by store id; "" for what is not known."""
        used: dict[str, int] = {}
        for held in self._held.values():
            store_id = held.origin.store_id if held.origin is not None else ""
            used[store_id] = used.get(store_id, 0) + held.size_bytes
        return used

    def room_bytes(self, store_id: str = "") -> int:
        """Bytes that may be added (of that store) before anything has to leave; negative when something must."""
        room = self._limit.room_bytes(self.used_bytes) - self._all.reserved_bytes
        quota = self._quotas.get(store_id)
        if quota is not None:
            room = min(room, quota.limit_bytes - quota.used_bytes - quota.reserved_bytes)
        return room

    # -- rules -----------------------------------------------------------------------------------------------------

    def set_rules(self, rules: SpaceRules) -> None:
        """From now on these hold, also for what is held already; what they make leave, `choose_excess` names."""
        by_use = sorted(self._held, key=lambda name: self._held[name].last_use)
        changed = [name for name in by_use if rules.is_pinned(self._held[name].origin) != self._held[name].is_pinned]
        for name in changed:
            self._leave(name)
        limits = {store_id: rule.quota_bytes for store_id, rule in rules.stores.items() if rule.quota_bytes is not None}
        # A quota that stays keeps its policy, and with it what that has learned and been told of plans.
        self._quotas = {store_id: quota for store_id, quota in self._quotas.items() if store_id in limits}
        self._rules = rules
        for name in changed:
            self._enter(name)
        new = {store_id: _Space(self._make_policy()) for store_id in limits if store_id not in self._quotas}
        self._quotas |= new
        for store_id, limit_bytes in limits.items():
            self._quotas[store_id].limit_bytes = limit_bytes
        self._by_age = {store_id: OrderedDict() for store_id, rule in rules.stores.items() if rule.ttl_s is not None}
        for name in by_use:
            held = self._held[name]
            if held.origin is not None and held.origin.store_id in new:
                self._count_in(new[held.origin.store_id], name, held)
            self._note_age(name, held)

    def learn(self, origins: Mapping[str, Origin]) -> None:
        """Take note of whose the objects with these digests are, where that is not known."""
        for name, held in self._held.items():
            origin = origins.get(digest_of(name)) if held.origin is None else None
            if origin is not None:
                self._leave(name)
                held.origin = origin
                self._enter(name)
                self._changed.add(name)

    def expect(self, digest: str, origin: Origin, *, is_asked_for: bool = False) -> None:
        """The object with that digest is about to be written, or read without being kept. `is_asked_for`: somebody said
        that it is to be here, so a policy that keeps what it has is not asked, and it does not leave as a newcomer."""
        if is_asked_for:
            self._asked_for[digest] = None
            if len(self._asked_for) > _EXPECTED_MAX:
                self._asked_for.popitem(last=False)
        self._expected[digest] = origin
        self._expected.move_to_end(digest)
        if len(self._expected) > _EXPECTED_MAX:
            self._expected.popitem(last=False)

    def origin_of(self, name: str) -> Origin | None:
        """Whose that extent is, held or expected, if it is known."""
        held = self._held.get(name)
        if held is not None and held.origin is not None:
            return held.origin
        return self._expected.get(digest_of(name))

    def quota_of(self, store_id: str) -> tuple[int, int, int] | None:
        """Return (limit, used, pinned) bytes of that store's quota, None if it has none."""
        quota = self._quotas.get(store_id)
        return None if quota is None else (quota.limit_bytes, quota.used_bytes, quota.pinned_bytes)

    def fits(self, size_bytes: int, name: str) -> bool:
        """Whether there is room (for `name`) without anything having to leave: True is certain, and the usual case."""
        origin = self.origin_of(name) if self._quotas else None
        return size_bytes <= self.room_bytes("" if origin is None else origin.store_id)

    # -- victims ---------------------------------------------------------------------------------------------------

    def choose_victims(self, size_bytes: int, busy: Container[str], name: str = "") -> Victims:
        """Return what must leave before `size_bytes` can be added (to `name`); none of `busy`.

        Raises NotAdmittedError if the policy prefers what it has (never of a pinned name), CacheFullError if even
        evicting all that may leave would not make room. Nothing has changed then.
        """
        quota = self._quota(self.origin_of(name))
        victims = Victims()
        if quota is not None:
            short = size_bytes + quota.reserved_bytes + quota.used_bytes - quota.limit_bytes
            victims.of_quota.extend(self._choose(quota, short, size_bytes, busy, name))
        freed = sum(self._held[victim].size_bytes for victim in victims.of_quota)
        short = size_bytes + self._all.reserved_bytes - self._limit.room_bytes(self.used_bytes) - freed
        if short > 0 and name in self.copies and not self._is_wanted(name):
            raise NotAdmittedError("a copy of what another node owns takes only space that is free")
        victims.copies.extend(self.copies.first(short, _Both(busy, set(victims.of_quota)), self._unpinned_bytes))
        short -= sum(self._held[victim].size_bytes for victim in victims.copies)
        leaving = {*victims.of_quota, *victims.copies}
        victims.of_all.extend(self._choose(self._all, short, size_bytes, _Both(busy, leaving), name))
        return victims

    def _unpinned_bytes(self, name: str) -> int:
        return 0 if self.is_pinned(name) else self._held[name].size_bytes

    def _choose(self, space: _Space, short: int, size_bytes: int, busy: Container[str], name: str) -> list[str]:
        if short <= 0:
            return []
        movable_bytes = space.used_bytes - space.pinned_bytes
        # All names are walked over only where that can help: on a disk that others have filled it never does.
        if short <= movable_bytes:
            if name and not self._is_wanted(name) and not space.policy.admits(name):
                raise NotAdmittedError("the cache is full, and keeps what it has")
            victims = self._first(space.policy, short, busy)
            short -= sum(self._held[victim].size_bytes for victim in victims)
            if short <= 0:
                return victims
        pinned = f" ({space.pinned_bytes} of {space.used_bytes} bytes are pinned)" if space.pinned_bytes else ""
        raise CacheFullError(f"no room for {size_bytes} bytes: {short} short even if all were evicted{pinned}")

    def _is_wanted(self, name: str) -> bool:
        return digest_of(name) in self._asked_for or self._rules.is_pinned(self.origin_of(name))

    def choose_oldest(self, size_bytes: int, busy: Container[str]) -> list[str]:
        """Return the first names in the policy's order that hold `size_bytes` together (or all); none of `busy`."""
        return self._first(self._all.policy, size_bytes, busy)

    def _first(self, policy: EvictionPolicy, size_bytes: int, busy: Container[str]) -> list[str]:
        victims: list[str] = []
        if size_bytes > 0:
            for name in policy.victims():
                if name not in busy:
                    victims.append(name)
                    size_bytes -= self._held[name].size_bytes
                    if size_bytes <= 0:
                        break
        return victims

    def choose_excess(self, busy: Container[str]) -> Victims:
        """Return what is held above a quota, the capacity or the free-space floor, whatever brought that about: rules
        that changed, others who fill the disk. Nothing leaves where that would not restore the floor."""
        victims = Victims()
        for quota in self._quotas.values():
            victims.of_quota.extend(self._first(quota.policy, quota.used_bytes - quota.limit_bytes, busy))
        freed = sum(self._held[name].size_bytes for name in victims.of_quota)
        short = -self._limit.room_bytes(self.used_bytes) - freed
        if 0 < short <= self.used_bytes - self.pinned_bytes - freed:
            victims.of_all.extend(self._first(self._all.policy, short, _Both(busy, set(victims.of_quota))))
        return victims

    def choose_expired(self, busy: Container[str]) -> list[str]:
        """Return the names that were not used for as long as their mount's `ttl`; none of `busy`, none pinned."""
        now_s = self._now_s()
        expired: list[str] = []
        for store_id, by_age in self._by_age.items():
            ttl_s = self._rules.stores[store_id].ttl_s
            assert ttl_s is not None, "only stores whose extents age are here"
            for name in by_age:
                if self._held[name].used_s + ttl_s > now_s:
                    break
                if name not in busy:
                    expired.append(name)
        return expired

    # -- what is held ----------------------------------------------------------------------------------------------

    def load(self, rows: list[IndexRow]) -> None:
        """Start from what an earlier daemon wrote, oldest use first."""
        now_s = self._now_s()
        for row in rows:
            used_s = min(row.used_s, now_s) if row.used_s else now_s
            self._held[row.name] = _Held(row.size_bytes, row.last_use, used_s, row.origin)
            self._use_counter = max(self._use_counter, row.last_use)
            self._enter(row.name)

    def reserve(self, size_bytes: int, name: str = "") -> None:
        """Count bytes that are about to be written (to `name`)."""
        self._count_reserved(size_bytes, self.origin_of(name))

    def settle(self, size_bytes: int, origin: Origin | None = None) -> None:
        """Take a reservation back, whether the bytes were written (then also `grow`) or not. `origin` as it was."""
        self._count_reserved(-size_bytes, origin)
        assert self._all.reserved_bytes >= 0, "a reservation was settled twice"

    def _count_reserved(self, size_bytes: int, origin: Origin | None) -> None:
        self._all.reserved_bytes += size_bytes
        quota = self._quota(origin)
        if quota is not None:  # never below 0: the quota may have been given while the bytes were under way
            quota.reserved_bytes = max(0, quota.reserved_bytes + size_bytes)

    def grow(self, name: str, size_bytes: int) -> None:
        """Charge `size_bytes` more to `name`, which may be new; it counts as used."""
        digest = digest_of(name)
        held = self._held.get(name)
        if held is None:
            held = self._held[name] = _Held(origin=self._expected.get(digest))
            self.copies.enter(name)
            self._enter(name)
        elif held.origin is None and digest in self._expected:  # now it is known whose it is
            self._leave(name)
            held.origin = self._expected[digest]
            self._enter(name)
        elif not held.is_pinned:
            for space in self._spaces(held):
                space.policy.add(name)
        held.size_bytes += size_bytes
        is_asked_for = not held.is_pinned and digest in self._asked_for
        for space in self._spaces(held):
            space.used_bytes += size_bytes
            space.pinned_bytes += size_bytes if held.is_pinned else 0
            if is_asked_for:
                # As if it had been read, after the read that it came for: policies let go of newcomers that were not.
                space.policy.touch(name)
                space.policy.touch(name)
        self._removed.discard(name)
        self._mark_used(name, held)

    def touch(self, name: str) -> None:
        """`name` was read, whether it is held or not."""
        self._all.policy.touch(name)
        if self._quotas and (quota := self._quota(self.origin_of(name))) is not None:
            quota.policy.touch(name)
        held = self._held.get(name)
        if held is not None:
            self._mark_used(name, held)

    def remove(self, name: str) -> int:
        """Forget `name`, which leaves for another reason than a policy's order; return the bytes it was charged."""
        if name not in self._held:
            return 0
        self._leave(name)
        self.copies.leave(name)
        self._changed.discard(name)
        self._removed.add(name)
        return self._held.pop(name).size_bytes

    def evict(self, victims: Victims) -> None:
        """Tell the policies that what they chose leaves now; `remove` each name then."""
        for name in victims.of_all:
            self._all.policy.evict(name)
        for name in victims.of_quota:
            quota = self._quota(self._held[name].origin)
            if quota is not None:
                quota.policy.evict(name)

    def _enter(self, name: str) -> None:
        """Count a held name where it belongs, and give it to the policies, unless it is pinned."""
        held = self._held[name]
        held.is_pinned = self._rules.is_pinned(held.origin)
        for space in self._spaces(held):
            self._count_in(space, name, held)
        self._note_age(name, held)

    @staticmethod
    def _count_in(space: _Space, name: str, held: _Held) -> None:
        space.used_bytes += held.size_bytes
        if held.is_pinned:
            space.pinned_bytes += held.size_bytes
        else:
            space.policy.add(name)

    def _note_age(self, name: str, held: _Held) -> None:
        if not held.is_pinned and held.origin is not None and held.origin.store_id in self._by_age:
            self._by_age[held.origin.store_id][name] = None

    def _leave(self, name: str) -> None:
        """Undo `_enter`."""
        held = self._held[name]
        for space in self._spaces(held):
            space.used_bytes -= held.size_bytes
            space.pinned_bytes -= held.size_bytes if held.is_pinned else 0
            space.policy.remove(name)
        if held.origin is not None and held.origin.store_id in self._by_age:
            self._by_age[held.origin.store_id].pop(name, None)

    def _spaces(self, held: _Held) -> Iterable[_Space]:
        quota = self._quota(held.origin)
        return (self._all,) if quota is None else (self._all, quota)

    def _quota(self, origin: Origin | None) -> _Space | None:
        return None if origin is None else self._quotas.get(origin.store_id)

    def _mark_used(self, name: str, held: _Held) -> None:
        self._use_counter += 1
        held.last_use = self._use_counter
        held.used_s = self._now_s()
        self._changed.add(name)
        if self._by_age and held.origin is not None:
            by_age = self._by_age.get(held.origin.store_id)
            if by_age is not None and name in by_age:
                by_age.move_to_end(name)

    def _now_s(self) -> int:
        return self._clock.now_ns() // 1_000_000_000

    # -- the index -------------------------------------------------------------------------------------------------

    def take_changes(self) -> tuple[list[IndexRow], list[str]]:
        """Return rows to write and names to delete since the last call."""
        rows = [self._row(name) for name in self._changed]
        removed = list(self._removed)
        self._changed.clear()
        self._removed.clear()
        return rows, removed

    def _row(self, name: str) -> IndexRow:
        held = self._held[name]
        return IndexRow(name, held.size_bytes, held.last_use, held.used_s, held.origin)

    def write_changes(self, changes: tuple[list[IndexRow], list[str]]) -> None:
        """Write what `take_changes` returned; may be called outside the lock, by one thread at a time.

        Raises IndexUnavailableError; `put_back` then keeps the changes for the next try.
        """
        if self._index is not None and any(changes):
            self._index.write(*changes)

    def put_back(self, changes: tuple[list[IndexRow], list[str]]) -> None:
        """Have the next `take_changes` return these again, as they are by then."""
        for name in (*(row.name for row in changes[0]), *changes[1]):
            (self._changed if name in self._held else self._removed).add(name)


@dataclass(frozen=True, slots=True)
class _Both:
    """Two containers seen as one."""

    first: Container[str]
    second: Container[str]

    def __contains__(self, name: object) -> bool:
        return name in self.first or name in self.second


def digest_of(name: str) -> str:
    """Return the digest of the object that an extent is of."""
    return name.partition(".")[0]
