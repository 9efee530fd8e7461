"""Extents that are read often: when another copy is made, whom readers ask then; never are there more than `max`."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from orchestra.cluster.heat import COOL_READS, HOT_READS, PLACES_MAX, WINDOW_NS, Heat, Name, Spread
from orchestra.daemon.nodes.hot import KeptExtents

HOT: Name = ("0" * 32, 0)
COLD: Name = ("1" * 32, 0)
READS = int(HOT_READS)


def read(heat: Heat, times: int, *, least: int = 1, most: int = 3, nodes: int = 5, now_ns: int = 0) -> list[int]:
    """Ask so often for the whole extent; return the places that were to keep a copy."""
    answers = [heat.asked(HOT, 1.0, least, most, nodes, now_ns) for _ in range(times)]
    return [place for place in answers if place is not None]


def test_each_copy_needs_as_many_reads_again() -> None:
    """The next node of the ring's order keeps the first, the one after it the second; a copy that is being made is not
    asked for twice."""
    heat = Heat()
    assert read(heat, READS - 1) == []
    assert read(heat, 1) == [1]
    assert read(heat, 10 * READS) == []
    heat.answered(HOT, 1, 0, is_kept=True)
    assert heat.places(HOT, 0) == 0b10
    assert read(heat, 1) == [2]
    heat.answered(HOT, 2, 0, is_kept=True)
    assert heat.places(HOT, 0) == 0b110
    assert read(heat, 10 * READS) == [], "most are three"


def test_parts_of_an_extent_count_as_parts() -> None:
    """Eight nodes that each read half of it have read it four times."""
    heat = Heat()
    assert [heat.asked(HOT, 0.5, 1, 2, 2, 0) for _ in range(2 * READS)] == [None] * (2 * READS - 1) + [1]


def test_reads_long_ago_do_not_count() -> None:
    """Seven reads, a pause of two windows, seven reads: nothing is hot. Within a window and a bit it would be."""
    heat = Heat()
    assert read(heat, READS - 1) == []
    assert read(heat, READS - 1, now_ns=2 * WINDOW_NS) == []
    heat = Heat()
    assert read(heat, READS - 1) == []
    assert read(heat, READS - 1, now_ns=WINDOW_NS + WINDOW_NS // 2) == [1]


def test_a_node_that_has_no_room_is_passed_over() -> None:
    """The next one is asked; after a while it is asked again."""
    heat = Heat()
    assert read(heat, READS) == [1]
    heat.answered(HOT, 1, 0, is_kept=False)
    assert heat.places(HOT, 0) == 0
    assert read(heat, READS) == [2]
    heat.answered(HOT, 2, 0, is_kept=False)
    assert read(heat, 2 * READS, nodes=3) == [], "there is no other node"
    assert read(heat, READS, nodes=3, now_ns=2 * WINDOW_NS) == [1]


def test_what_is_not_read_any_more_cools_down() -> None:
    """Readers are told of copies for two windows after the last time that a few reads came; a few keep it warm."""
    heat = Heat()
    read(heat, READS)
    heat.answered(HOT, 1, 0, is_kept=True)
    now_ns = 0
    for _ in range(5):
        now_ns += WINDOW_NS
        read(heat, int(COOL_READS), now_ns=now_ns)
        assert heat.places(HOT, now_ns) == 0b10
    assert [name for name, _ in heat.hot(now_ns)] == [HOT]
    assert heat.places(HOT, now_ns + 2 * WINDOW_NS) == 0
    assert list(heat.hot(now_ns + 2 * WINDOW_NS)) == []
    assert read(heat, READS, now_ns=now_ns + 3 * WINDOW_NS) == [1], "and may become hot again"


def test_a_copy_that_left_is_told_of_no_more() -> None:
    """Its node says so when it is asked again."""
    heat = Heat()
    read(heat, READS)
    heat.answered(HOT, 1, 0, is_kept=True)
    heat.answered(HOT, 1, 0, is_kept=False)
    assert heat.places(HOT, 0) == 0


def test_what_was_not_asked_for_longest_is_forgotten() -> None:
    """The table is bounded; an answer that comes too late changes nothing."""
    heat = Heat(extents_max=1)
    assert read(heat, READS) == [1]
    heat.asked(COLD, 1.0, 1, 3, 5, 0)
    heat.answered(HOT, 1, 0, is_kept=True)
    assert heat.places(HOT, 0) == 0


@given(
    st.integers(1, 3),
    st.integers(0, 4),
    st.integers(1, 8),
    st.lists(
        st.one_of(
            st.tuples(st.just("read"), st.integers(1, 20)),
            st.tuples(st.just("wait"), st.integers(0, 3 * WINDOW_NS)),
            st.tuples(st.just("answer"), st.booleans()),
            st.tuples(st.just("left"), st.integers(0, PLACES_MAX)),
            st.tuples(st.just("most"), st.integers(1, 6)),
        ),
        max_size=60,
    ),
)
def test_never_more_than_most_and_only_nodes_that_there_are(
    least: int, more: int, nodes: int, events: list[tuple[str, int]]
) -> None:
    """Whatever is read, refused, forgotten or set anew: owners, copies and the one being made are at most `max`, and
    copies are at places behind the owners, each once."""
    heat, most, now_ns = Heat(), least + more, 0
    asked: list[int] = []
    for event, number in events:
        if event == "read":
            for _ in range(number):
                before = heat.places(HOT, now_ns)
                place = heat.asked(HOT, 1.0, least, most, nodes, now_ns)
                if place is not None:
                    assert not asked, "one at a time"
                    assert least <= place < nodes
                    assert not before >> place & 1
                    asked.append(place)
                    assert least + heat.places(HOT, now_ns).bit_count() + 1 <= most
                assert heat.places(HOT, now_ns) == 0 or least + heat.places(HOT, now_ns).bit_count() <= most
        elif event == "wait":
            now_ns += number
        elif event == "answer" and asked:
            heat.answered(HOT, asked.pop(), now_ns, is_kept=bool(number))
        elif event == "left":
            if number not in asked:
                heat.answered(HOT, number, now_ns, is_kept=False)
        elif event == "most" and not asked:
            most = max(least, number)
        assert not heat.places(HOT, now_ns) & ((1 << least) - 1)


def test_a_reader_asks_all_holders_in_turn() -> None:
    """Nine questions to an owner and two copies: three each; who did not have it is left out for a while."""
    spread = Spread()
    assert spread.holders(HOT, 1, 0) == [], "nothing is known of copies"
    spread.told(HOT, 0b10010, 0)
    firsts = [spread.holders(HOT, 1, 0)[0] for _ in range(9)]
    assert sorted(firsts) == [0, 0, 0, 1, 1, 1, 4, 4, 4]
    spread.lacked(HOT, 4, 0)
    assert sorted(spread.holders(HOT, 1, 0)) == [0, 1]
    assert sorted(spread.holders(HOT, 1, 6_000_000_000)) == [0, 1, 4]
    assert spread.holders(COLD, 1, 0) == []


def test_a_reader_forgets_what_it_did_not_hear_again() -> None:
    """After two windows the owner alone is asked, and tells anew; and what it knows is bounded."""
    spread = Spread(extents_max=2)
    spread.told(HOT, 0b10, 0)
    assert spread.holders(HOT, 1, 2 * WINDOW_NS) == []
    for number in range(3):
        spread.told((f"{number:032x}", 0), 0b10, 0)
    assert [bool(spread.holders((f"{number:032x}", 0), 1, 0)) for number in range(3)] == [False, True, True]
    spread.told(HOT, 0b1 << 40 | 0b1, 0)
    assert spread.holders(HOT, 1, 0) == [], "places beyond those that there can be"


def test_copies_that_a_node_keeps_are_found_by_object_counted_and_bounded() -> None:
    """Twice the same is one; beyond the bound the object that came first is forgotten."""
    kept = KeptExtents(3)
    for name in (HOT, (HOT[0], 1), HOT, COLD):
        kept.add(name, 100)
    assert (len(kept), dict(kept.of(HOT[0])), dict(kept.of(COLD[0]))) == (3, {0: 100, 1: 100}, {0: 100})
    kept.add((COLD[0], 7), 100)
    assert kept.all() == [((COLD[0], 0), 100), ((COLD[0], 7), 100)]
    for name in (COLD, COLD, HOT, (COLD[0], 7)):
        kept.remove(name)
    assert (len(kept), kept.all()) == (0, [])
