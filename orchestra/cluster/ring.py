"""Which nodes own an extent: weighted rendezvous hashing, pure, the same on every node and in every language.

Owns: the ring as a value, the draw of a node for a key, the order of nodes by score. Leaves to others: which nodes
there are (membership), what a node that does not answer costs (peers).

A key's draw on a node is xxh64 of the key's own hash, seeded by the node's: 52 bits of it make an odd numerator `a`
over 2**53, so 0 < u < 1. The node's score is the *real number* weight / -ln(u), the logarithmic method of Schindelhauer
and Schomaker ("Weighted distributed hash tables", SPAA 2005): the chance of being first is exactly weight / total, and
a change of one node's weight moves keys only to it or only from it. Because the score is defined as a real number, no
language's logarithm is part of the definition: whoever computes in doubles must decide two scores that lie closer than
their error by another means (here: 60 decimal digits). Two scores are equal only for the same draw and weight (both
numerators are odd), and then the smaller node id comes first. Test vectors: docs/ring-vectors.json.
"""

from __future__ import annotations

import decimal
import heapq
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final

import xxhash

from orchestra.errors import UsageError
from orchestra.values import ObjectId

# "orchestr" in ASCII. Part of the format: another seed is another placement of everything.
RING_SEED: Final = 0x6F72636865737472
# A look-up costs 0.3 to 0.6 us a node; larger clusters want another structure (a tree of rings).
NODES_MAX: Final = 1024
WEIGHT_MAX: Final = 1 << 60
_DRAW_BITS = 52
_DENOMINATOR = 1 << (_DRAW_BITS + 1)
# The logarithm of any libm, the quotient and the weight's rounding are each within 1e-15 of the truth: a thousand times
# that is surely a difference, and about one key in 10**11 comes that near.
_CERTAIN = 1e-12
_EXACT = decimal.Context(prec=60)


@dataclass(frozen=True, slots=True, order=True)
class RingNode:
    """A node of the ring. `weight` is its capacity in bytes; only ratios of weights matter."""

    node_id: str
    weight: int

    def __post_init__(self) -> None:
        if not self.node_id or not 1 <= self.weight <= WEIGHT_MAX:
            raise UsageError(f"not a node of a ring: {self.node_id!r} with weight {self.weight}")


@dataclass(frozen=True, slots=True)
class Ring:
    """The nodes of one revision of the membership, ordered by id. Never changes; a change is another ring.

    Two rings with the same nodes place every key alike, whatever their revisions; `digest` says whether they have.
    """

    revision: int
    nodes: tuple[RingNode, ...]
    digest: str = field(init=False, compare=False)
    _seeds: tuple[int, ...] = field(init=False, repr=False, compare=False)
    _weights: tuple[int, ...] = field(init=False, repr=False, compare=False)
    _is_even: bool = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        ids = [node.node_id for node in self.nodes]
        if len(ids) > NODES_MAX:
            raise UsageError(f"a ring of {len(ids)} nodes; at most {NODES_MAX}")
        if any(first >= second for first, second in pairwise(ids)):
            raise UsageError("the nodes of a ring are ordered by id, each once (make it with ring_of)")
        text = "".join(f"{node.node_id}\0{node.weight}\0" for node in self.nodes)
        object.__setattr__(self, "digest", xxhash.xxh64_hexdigest(text.encode(), RING_SEED))
        object.__setattr__(self, "_seeds", tuple(xxhash.xxh64_intdigest(name.encode(), RING_SEED) for name in ids))
        weights = tuple(node.weight for node in self.nodes)
        object.__setattr__(self, "_weights", weights)
        object.__setattr__(self, "_is_even", len(set(weights)) <= 1)

    def owners(self, key: bytes, replicas: int) -> tuple[RingNode, ...]:
        """Return the `replicas` nodes with the highest scores for `key`, best first; all nodes where there are fewer.

        The next owner of a key whose owners do not answer is the one that would stand after them.
        """
        if replicas < 1:
            raise UsageError(f"an extent needs at least one owner, not {replicas}")
        draws = self.draws(key)
        if self._is_even:  # the score grows with the draw
            best = heapq.nsmallest(replicas, range(len(draws)), key=lambda at: (-draws[at], at))
        else:
            best = self._by_score(draws, replicas)
        return tuple(self.nodes[at] for at in best)

    def draws(self, key: bytes) -> list[int]:
        """Return each node's draw for `key`, 0 to 2**52 - 1, in the order of `nodes`."""
        hashed = xxhash.xxh64_intdigest(key, RING_SEED).to_bytes(8, "little")
        draw, shift = xxhash.xxh64_intdigest, 64 - _DRAW_BITS
        return [draw(hashed, seed) >> shift for seed in self._seeds]

    def _by_score(self, draws: list[int], replicas: int) -> list[int]:
        log = math.log
        # The logarithms are below 0, so the smallest quotient is the highest score.
        scores = [
            weight / log((2 * draw + 1) / _DENOMINATOR) for weight, draw in zip(self._weights, draws, strict=True)
        ]
        order = sorted(range(len(scores)), key=scores.__getitem__)
        for first, second in pairwise(order[: replicas + 1]):
            if scores[second] - scores[first] <= -scores[first] * _CERTAIN:
                return self._by_exact_score(draws)[:replicas]
        return order[:replicas]

    def _by_exact_score(self, draws: list[int]) -> list[int]:
        scores = [_score(weight, draw) for weight, draw in zip(self._weights, draws, strict=True)]
        return sorted(range(len(scores)), key=lambda at: (scores[at], at))


def ring_of(revision: int, nodes: Iterable[RingNode]) -> Ring:
    """Return the ring of `nodes`, given in any order."""
    return Ring(revision, tuple(sorted(nodes)))


def extent_key(object_id: ObjectId, extent_index: int) -> bytes:
    """Return the key under which an extent of one version of an object is placed: "e", its digest, ":", the index.

    A rewritten object is another object, placed anew. Other kinds of keys begin with another letter.
    """
    return digest_key(object_id.digest(), extent_index)


def digest_key(digest: str, extent_index: int) -> bytes:
    """Return the key of an extent of the object with that digest."""
    return f"e{digest}:{extent_index}".encode()


def _score(weight: int, draw: int) -> decimal.Decimal:
    """Return the score times -1, as the doubles are."""
    share = _EXACT.divide(decimal.Decimal(2 * draw + 1), decimal.Decimal(_DENOMINATOR))
    return _EXACT.divide(decimal.Decimal(weight), _EXACT.ln(share))
