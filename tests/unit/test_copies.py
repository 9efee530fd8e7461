"""Copies of what other nodes own: they take free space, and leave before anything that this node owns."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orchestra.blocks.accounts import Accounts, NotAdmittedError, SpaceLimit
from orchestra.blocks.eviction import NeverPolicy
from orchestra.blocks.rules import Origin, SpaceRules
from orchestra.clock import SystemClock
from orchestra.cluster.ring import Ring, RingNode
from orchestra.daemon.nodes.marks import CopyMarks
from orchestra.units import GIB
from tests.support.cache import Cache, data_of, digest_of, full_disk

A, B, C, D = (f"{index:032x}" for index in range(4))


def books_with(copies: dict[str, int], own: dict[str, int], capacity: int = 100) -> Accounts:
    """Accounts whose policy lets nothing in once the cache is full."""
    books = Accounts(NeverPolicy(), SpaceLimit(capacity, 0.0, full_disk(free_bytes=GIB)))
    for name, size in copies.items():
        books.expect(name, Origin("s3://x/", name))
        books.copies.expect(name, is_copy=True)
        books.grow(name, size)
    for name, size in own.items():
        books.grow(name, size)
    return books


def test_copies_leave_for_what_the_node_owns_whatever_the_policy_says() -> None:
    """Oldest first, as many as are needed; what is owned stays."""
    books = books_with({A: 40, B: 40}, {C: 20})
    victims = books.choose_victims(30, (), D)
    assert list(victims) == [A]
    books.evict(victims)
    assert [books.remove(name) for name in victims] == [40]
    assert list(books.choose_victims(60, (), D)) == [B]


def test_a_copy_displaces_nothing() -> None:
    """Neither what is owned nor another copy; where there is room it is kept."""
    books = books_with({A: 40}, {B: 40})
    books.copies.expect(C, is_copy=True)
    assert list(books.choose_victims(20, (), C)) == []
    with pytest.raises(NotAdmittedError):
        books.choose_victims(30, (), C)


def test_copies_that_are_busy_or_pinned_stay() -> None:
    """The policy is asked then, and refuses here."""
    books = books_with({A: 50, B: 50}, {})
    books.set_rules(SpaceRules(pins=frozenset({("s3://x/", A)})))
    assert list(books.choose_victims(30, (), C)) == [B]
    with pytest.raises(NotAdmittedError):
        books.choose_victims(30, {B}, C)


def test_what_a_daemon_finds_and_is_told_to_be_a_copy_leaves_first() -> None:
    """After a restart nothing is marked: what is marked then leaves as copies do, and stays again when it is owned."""
    books = books_with({}, {A: 40, B: 40, C: 20})
    with pytest.raises(NotAdmittedError):
        books.choose_victims(30, (), D)
    books.copies.mark(B)
    assert list(books.choose_victims(30, (), D)) == [B]
    books.copies.expect(B, is_copy=False)
    with pytest.raises(NotAdmittedError):
        books.choose_victims(30, (), D)


def test_what_this_node_comes_to_own_is_no_copy_any_more() -> None:
    """The ring changed: the extent is this node's now, and does not leave for others."""
    books = books_with({A: 60}, {B: 40})
    books.copies.expect(A, is_copy=False)
    with pytest.raises(NotAdmittedError):
        books.choose_victims(30, (), C)


async def test_copies_of_which_a_crash_lost_whose_they_are_are_found_again(tmp_path: Path) -> None:
    """Also what the daemon puts in its place at the start, or counts there anew, is marked once its path is known."""
    first = Cache(tmp_path)
    first.put("a", data_of("a", 100))
    first.crash()
    found = Cache(tmp_path)
    assert found.store.space.unknown_digests() == {digest_of("a")}

    async def learn() -> None:
        found.store.space.learn({digest_of("a"): Origin("s3://x/", "a")})

    cluster: Any = SimpleNamespace(ring=Ring(1, (RingNode("me", 1), RingNode("other", 1 << 60))), node_id="me")
    mount = SimpleNamespace(opened=SimpleNamespace(store_id="s3://x/"), config=None)
    engine: Any = SimpleNamespace(mounts=[mount])
    marks = CopyMarks(cluster, found.store, engine, SystemClock(), lambda config: 1, learn)
    looking = asyncio.create_task(marks.run())
    async with asyncio.timeout(10):
        while not marks.status()["copies_found"]:
            await asyncio.sleep(0)
    looking.cancel()
    assert digest_of("a") in found.accounts.copies
    found.close()
