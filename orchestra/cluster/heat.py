"""Extents that other nodes read so often that more nodes are to keep them; pure, without a clock or a network.

Owns: counting reads, when another copy is made and when that is over (`Heat`, at an extent's first owner); whom a
reader asks first where several nodes hold an extent (`Spread`). Leaves to others: making copies (daemon.nodes.hot),
which nodes stand at which place (ring).

A copy is named by its node's *place* in the ring's order for that extent: owners stand at 0 to least - 1, copies behind
them. A set of places is a number with a bit for each. Places mean something in one ring only: who sees another one
begins anew.

How many copies there are follows from reads alone: as soon as the owner was asked for an extent HOT_READS times within
a window another node is to keep it, and counting begins anew, so that each further copy needs as many reads again.
Readers that know of a copy spread over all who hold the extent, so its owner sees less of them. Where fewer than
COOL_READS came within a window for two of them, readers are told of no copies any more; those stay until something else
needs their space.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

# How often other nodes ask for an extent (all of its bytes; small objects: the object).
HOT_READS: Final = 8.0
COOL_READS: Final = 2.0
WINDOW_NS: Final = 30_000_000_000
# Places are told in 16 bits.
PLACES_MAX: Final = 16
_PLACES_MASK: Final = (1 << PLACES_MAX) - 1
# Of 200 bytes each. What was not asked for longest is forgotten.
_EXTENTS_MAX: Final = 16_384
# A reader that heard nothing of copies for so long asks the owner again, which knows better.
_TOLD_NS: Final = 2 * WINDOW_NS
# A node that does not hold what it was said to hold is not asked for it for so long.
_LACKED_NS: Final = 5_000_000_000

# An object's digest, and the index of an extent of it.
Name = tuple[str, int]


@dataclass(slots=True)
class _Reads:
    """One extent at its first owner."""

    began_ns: int  # of this window
    count: float = 0.0  # in this window
    before: float = 0.0  # in the one before it
    held: int = 0  # places that keep a copy
    asked: int = 0  # the place that is asked to
    refused: int = 0  # places that would not
    refused_ns: int = 0
    hot_until_ns: int = 0

    def roll(self, now_ns: int) -> None:
        """Begin the window that `now_ns` lies in."""
        windows = (now_ns - self.began_ns) // WINDOW_NS
        if windows > 0:
            self.before = self.count if windows == 1 else 0.0
            self.count = 0.0
            self.began_ns += windows * WINDOW_NS

    def recent(self, now_ns: int) -> float:
        """Reads within a window that ends now, as if those of the window before came evenly."""
        gone = (now_ns - self.began_ns) / WINDOW_NS
        return self.count + self.before * max(0.0, 1.0 - gone)


class Heat:
    """What a node knows of the extents that it owns first and others ask for."""

    def __init__(self, extents_max: int = _EXTENTS_MAX) -> None:
        self._extents_max = extents_max
        self._reads: OrderedDict[Name, _Reads] = OrderedDict()

    def asked(self, name: Name, share: float, least: int, most: int, nodes: int, now_ns: int) -> int | None:
        """Another node asked for that share of the extent, of which `least` to `most` of so many nodes may have it.
        Return the place that is to keep a copy from now on, None if none is; tell then with `answered`."""
        reads = self._of(name, now_ns)
        reads.roll(now_ns)
        reads.count += share
        self._keep_most(reads, least, most)
        recent = reads.recent(now_ns)
        if recent >= COOL_READS and reads.held:
            reads.hot_until_ns = now_ns + 2 * WINDOW_NS
        elif now_ns >= reads.hot_until_ns:
            reads.held = 0
        if recent < HOT_READS or reads.asked or least + reads.held.bit_count() >= most:
            return None
        if now_ns - reads.refused_ns >= 2 * WINDOW_NS:
            reads.refused = 0
        taken = reads.held | reads.refused
        place = next((place for place in range(least, min(nodes, PLACES_MAX)) if not taken >> place & 1), None)
        if place is not None:
            reads.asked = 1 << place
            reads.count = reads.before = 0.0
        return place

    def answered(self, name: Name, place: int, now_ns: int, *, is_kept: bool) -> None:
        """The node at that place keeps a copy (still), or does not."""
        reads = self._reads.get(name)
        bit = 1 << place
        if reads is None or not (reads.asked | reads.held) & bit:
            return  # forgotten meanwhile: it is a copy that nobody is told of
        if reads.asked == bit:
            reads.asked = 0
        if is_kept:
            reads.hot_until_ns = max(reads.hot_until_ns, now_ns + 2 * WINDOW_NS * (not reads.held & bit))
            reads.held |= bit
        else:
            reads.held &= ~bit
            reads.refused |= bit
            reads.refused_ns = now_ns

    def places(self, name: Name, now_ns: int) -> int:
        """The places that keep a copy which readers are told of."""
        reads = self._reads.get(name)
        return reads.held if reads is not None and now_ns < reads.hot_until_ns else 0

    def hot(self, now_ns: int) -> Iterator[tuple[Name, int]]:
        """The extents with copies that readers are told of, and the places of those."""
        for name, reads in list(self._reads.items()):
            if reads.held and now_ns < reads.hot_until_ns:
                yield name, reads.held

    def clear(self) -> None:
        """The ring changed: places mean other nodes now."""
        self._reads.clear()

    def _of(self, name: Name, now_ns: int) -> _Reads:
        reads = self._reads.get(name)
        if reads is None:
            reads = self._reads[name] = _Reads(now_ns)
            if len(self._reads) > self._extents_max:
                self._reads.popitem(last=False)
        else:
            self._reads.move_to_end(name)
        return reads

    @staticmethod
    def _keep_most(reads: _Reads, least: int, most: int) -> None:
        """Tell of no more copies than the mount allows now; owners are none."""
        reads.held &= ~((1 << least) - 1)
        while reads.held and least + reads.held.bit_count() > most:
            reads.held &= ~(1 << reads.held.bit_length() - 1)


class Spread:
    """What a reader heard of copies."""

    def __init__(self, first_turn: int = 0, extents_max: int = _EXTENTS_MAX) -> None:
        """`first_turn` differs between nodes, so that not all of them begin with one holder."""
        self._turn = first_turn
        self._extents_max = extents_max
        self._known: OrderedDict[Name, tuple[int, int]] = OrderedDict()  # places, and until when
        self._lacked: OrderedDict[tuple[Name, int], int] = OrderedDict()  # until when

    def told(self, name: Name, places: int, now_ns: int) -> None:
        """These places keep copies, as who holds the extent says."""
        self._known[name] = (places & _PLACES_MASK, now_ns + _TOLD_NS)
        self._known.move_to_end(name)
        if len(self._known) > self._extents_max:
            self._known.popitem(last=False)

    def holders(self, name: Name, least: int, now_ns: int) -> list[int]:
        """The places to ask, the one whose turn it is first; empty where only the owners are known to hold it."""
        known = self._known.get(name)
        if known is None:
            return []
        places, until_ns = known
        if now_ns >= until_ns:
            del self._known[name]
            return []
        found = [
            place
            for place in range(places.bit_length())
            if (place < least or places >> place & 1) and now_ns >= self._lacked.get((name, place), 0)
        ]
        if not found or found[-1] < least:
            return []
        self._turn += 1
        at = self._turn % len(found)
        return found[at:] + found[:at]

    def lacked(self, name: Name, place: int, now_ns: int) -> None:
        """The node at that place did not give it."""
        self._lacked[(name, place)] = now_ns + _LACKED_NS
        self._lacked.move_to_end((name, place))
        if len(self._lacked) > self._extents_max:
            self._lacked.popitem(last=False)

    def clear(self) -> None:
        """The ring changed: places mean other nodes now."""
        self._known.clear()
        self._lacked.clear()
