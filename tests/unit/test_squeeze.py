"""How little a load takes while readers wait: down as long as nothing is lost, up again when something is."""

from __future__ import annotations

from collections.abc import Callable

from orchestra.prefetch.squeeze import LIMIT_AT_FIRST, LIMIT_MIN, Squeeze


def at_the_top(limit_max: int = 128) -> Squeeze:
    """One that has everything: nobody waited so far."""
    squeeze = Squeeze(limit_max)
    squeeze.tick(0.0, readers_wait=False)
    return squeeze


def limits(squeeze: Squeeze, rate: Callable[[int], float], ticks: int, *, readers_wait: bool = True) -> list[int]:
    """Run ticks in which the rate follows from the limit; return the limits."""
    return [squeeze.tick(rate(squeeze.limit), readers_wait=readers_wait) for _ in range(ticks)]


def test_nobody_waits_and_all_is_allowed() -> None:
    """Without readers the limit is the most, whatever the rate does."""
    assert set(limits(Squeeze(128), lambda limit: limit * 1e6, 50, readers_wait=False)) == {128}


def test_a_link_that_stays_full_is_left_to_readers() -> None:
    """Where 12 requests fill the link the limit goes down to 8 to 16, and stays there."""
    found = limits(at_the_top(), lambda limit: min(limit, 12) * 1e6, 200)
    assert found[12] <= 16
    assert all(8 <= limit <= 16 for limit in found[12:])
    assert found[12:].count(16) > 0.8 * len(found[12:]), "what loses throughput is tried rarely"


def test_where_every_request_counts_the_limit_stays() -> None:
    """Of a store that is far away and wide, the rate is what is in flight: trials to take less are rare and short."""
    found = limits(at_the_top(), lambda limit: limit * 1e6, 200)
    assert found.count(128) >= 0.9 * len(found)
    assert min(found) >= 64


def test_it_never_stops_altogether() -> None:
    """However full the link, something goes on."""
    assert min(limits(at_the_top(), lambda limit: 1e6, 100)) == LIMIT_MIN
    assert at_the_top(2).tick(0.0, readers_wait=True) == 2


def test_a_slower_store_is_believed_after_a_while() -> None:
    """When the store itself gives less, the limit comes down again."""
    squeeze = at_the_top()
    limits(squeeze, lambda limit: min(limit, 12) * 1e6, 50)
    found = limits(squeeze, lambda limit: min(limit, 12) * 0.5e6, 120)
    assert max(found) == 128, "first it tries whether more in flight helps"
    assert found[-1] <= 16


def test_readers_that_stop_waiting_give_it_all_back() -> None:
    """The tick after the last miss the load has everything again."""
    squeeze = at_the_top()
    limits(squeeze, lambda limit: 1e6, 20)
    assert squeeze.tick(1e6, readers_wait=False) == 128


def test_a_load_begins_small_and_doubles_while_that_helps() -> None:
    """Of a wide store everything is taken after a second; a link that is full at 20 never gets more than twice that."""
    assert limits(Squeeze(128), lambda limit: limit * 1e6, 4) == [32, 64, 128, 128]
    assert Squeeze(128).limit == LIMIT_AT_FIRST
    assert max(limits(Squeeze(128), lambda limit: min(limit, 20) * 1e6, 100)) <= 40
