"""The ring: that all agree, that a change moves no more than it must, that load is as even as chance allows.

docs/ring-vectors.json is what another language is checked with; the rendering below is its definition, and a second
implementation of the score (60 digits for every node, no shortcut) checks every vector.
"""

from __future__ import annotations

import decimal
import json
import math
from collections import Counter
from pathlib import Path

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestra.cluster.ring import NODES_MAX, RING_SEED, Ring, RingNode, extent_key, ring_of
from orchestra.errors import UsageError
from orchestra.units import GIB, TIB
from orchestra.values import ObjectId

VECTORS = Path(__file__).resolve().parents[2] / "docs" / "ring-vectors.json"
RINGS = {
    "one": [("node-a", 1)],
    "even": [(f"10.0.0.{number}:7420", 800 * GIB) for number in range(1, 5)],
    "uneven": [("small", 100 * GIB), ("medium", 400 * GIB), ("large", TIB), ("käfer", 7)],
    "wide": [(f"node-{number:02d}", (number + 1) * GIB) for number in range(16)],
}
KEYS = [
    b"",
    b"e",
    extent_key(ObjectId("s3://bucket", "train/0001.tar", '"9b2cf535f27731c974343645a3985328"'), 0),
    extent_key(ObjectId("s3://bucket", "train/0001.tar", '"9b2cf535f27731c974343645a3985328"'), 1),
    *(f"e{number:032x}:0".encode() for number in range(12)),
]


def ring(*weights: int) -> Ring:
    """Return a ring of nodes with these weights."""
    return ring_of(1, [RingNode(f"node-{number:03d}", weight) for number, weight in enumerate(weights)])


def names(nodes: tuple[RingNode, ...]) -> list[str]:
    return [node.node_id for node in nodes]


def render_vectors() -> str:
    """Return the text of docs/ring-vectors.json."""
    rings = []
    for name, nodes in RINGS.items():
        placed = ring_of(1, [RingNode(*node) for node in nodes])
        keys = [
            {
                "key": key.decode(),
                "draws": [f"{draw:013x}" for draw in placed.draws(key)],
                "owners": names(placed.owners(key, len(nodes))),
            }
            for key in KEYS
        ]
        listed = [[node.node_id, node.weight] for node in placed.nodes]
        rings.append({"name": name, "nodes": listed, "digest": placed.digest, "keys": keys})
    return json.dumps({"format": 1, "seed": f"{RING_SEED:016x}", "rings": rings}, indent=1, ensure_ascii=False) + "\n"


def test_the_published_vectors_are_what_the_ring_answers() -> None:
    """docs/ring-vectors.json holds exactly these bytes: a change of it is a new placement of everything."""
    assert VECTORS.read_bytes() == render_vectors().encode()


def test_a_second_implementation_from_the_definition_gives_the_vectors() -> None:
    """Hashes chained as documented and scores of 60 digits for every node give each vector's draws and owners."""
    context = decimal.Context(prec=60)
    for given_ring in json.loads(VECTORS.read_text())["rings"]:
        for vector in given_ring["keys"]:
            scored = []
            hashed = xxhash.xxh64(vector["key"].encode(), seed=RING_SEED).intdigest().to_bytes(8, "little")
            for (name, weight), draw in zip(given_ring["nodes"], vector["draws"], strict=True):
                seed = xxhash.xxh64(name.encode(), seed=RING_SEED).intdigest()
                assert xxhash.xxh64(hashed, seed=seed).intdigest() >> 12 == int(draw, 16)
                u = context.divide(decimal.Decimal(2 * int(draw, 16) + 1), decimal.Decimal(2**53))
                scored.append((context.divide(decimal.Decimal(weight), -context.ln(u)), name))
            assert [name for _, name in sorted(scored, reverse=True)] == vector["owners"]


weights = st.lists(st.one_of(st.just(GIB), st.integers(1, 1 << 60)), min_size=1, max_size=12)
keys = st.binary(max_size=40)


@given(st.permutations(range(8)), keys, st.integers(1, 9))
def test_nodes_that_learned_of_one_another_in_any_order_agree(order: list[int], key: bytes, replicas: int) -> None:
    """The order in which members became known changes neither owners nor digest."""
    nodes = [RingNode(f"n{number}", (number + 1) * GIB) for number in range(8)]
    mine, other = ring_of(7, nodes), ring_of(7, [nodes[number] for number in order])
    assert mine.owners(key, replicas) == other.owners(key, replicas)
    assert mine.digest == other.digest


@given(weights, keys, st.integers(1, 14))
def test_owners_are_distinct_and_as_many_as_there_can_be(given_weights: list[int], key: bytes, replicas: int) -> None:
    """R owners are R nodes; more replicas add owners behind the ones there were."""
    placed = ring(*given_weights)
    owners = placed.owners(key, replicas)
    assert len({node.node_id for node in owners}) == len(owners) == min(replicas, len(given_weights))
    assert placed.owners(key, replicas + 1)[: len(owners)] == owners


@given(weights, st.integers(1, 1 << 60), keys, st.integers(1, 4))
def test_a_node_that_joins_only_takes(given_weights: list[int], weight: int, key: bytes, replicas: int) -> None:
    """The owners of before keep their order; the new node stands somewhere among them or nowhere, and it leaves so."""
    before = ring(*given_weights)
    after = ring_of(2, [*before.nodes, RingNode("new", weight)])
    kept = [name for name in names(after.owners(key, replicas)) if name != "new"]
    assert kept == names(before.owners(key, replicas))[: len(kept)]
    assert len(kept) >= min(replicas, len(given_weights)) - 1


@given(weights, st.integers(0, 11), st.integers(1, 1 << 60), keys)
def test_a_changed_weight_moves_only_to_or_from_that_node(
    given_weights: list[int], at: int, weight: int, key: bytes
) -> None:
    """A node that grows only takes keys, one that shrinks only gives; all others keep their order among themselves."""
    at %= len(given_weights)
    before = ring(*given_weights)
    changed = RingNode(before.nodes[at].node_id, weight)
    after = ring_of(2, [node for node in before.nodes if node.node_id != changed.node_id] + [changed])
    was, now = (names(one.owners(key, len(given_weights))) for one in (before, after))
    assert [name for name in was if name != changed.node_id] == [name for name in now if name != changed.node_id]
    moved = now.index(changed.node_id) - was.index(changed.node_id)
    assert moved <= 0 if weight >= given_weights[at] else moved >= 0


@pytest.mark.parametrize("weight", [800 * GIB, 1600 * GIB])
def test_a_join_moves_its_fair_share(weight: int) -> None:
    """Of 20,000 extents on four nodes the fifth takes weight / total of them, within four standard deviations."""
    before = ring(*[800 * GIB] * 4)
    after = ring_of(2, [*before.nodes, RingNode("new", weight)])
    count = 20_000
    share = weight / (4 * 800 * GIB + weight)
    moved = 0
    for number in range(count):
        key = f"e{number:032x}:0".encode()
        moved += before.owners(key, 1) != after.owners(key, 1)
    assert abs(moved - share * count) < 4 * math.sqrt(count * share * (1 - share))


@pytest.mark.parametrize("given_weights", [[GIB] * 4, [GIB, 2 * GIB, 3 * GIB, 4 * GIB]], ids=["even", "uneven"])
def test_the_load_is_as_even_as_the_formula_says(given_weights: list[int]) -> None:
    """The fullest of n nodes holds at most 1 + sqrt(2 ln n / extents a node) of its fair share, and 2 %."""
    placed = ring(*given_weights)
    count = 60_000
    held = Counter(placed.owners(f"e{number:032x}:{number % 7}".encode(), 1)[0].node_id for number in range(count))
    total = sum(given_weights)
    for node in placed.nodes:
        fair = count * node.weight / total
        assert held[node.node_id] / fair <= 1 + math.sqrt(2 * math.log(len(given_weights)) / fair) + 0.02


@pytest.mark.parametrize("above", [0, 1])
def test_scores_too_near_for_doubles_are_decided_exactly(above: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight that misses the other's score by less than 1 in 2**59 stands behind it, one byte more before it."""
    draws = [1 << 50, 1 << 51]
    with decimal.localcontext(prec=60):
        logs = [decimal.Decimal(2 * draw + 1).ln() - decimal.Decimal(2**53).ln() for draw in draws]
        balanced = int(decimal.Decimal(1 << 60) * logs[1] / logs[0])
    assert float(balanced) == float(balanced + 1)
    monkeypatch.setattr(Ring, "draws", lambda self, key: draws)
    owners = names(ring(1 << 60, balanced + above).owners(b"", 2))
    assert owners == (["node-001", "node-000"] if above else ["node-000", "node-001"])


@given(weights, keys)
@settings(max_examples=50)
def test_the_shortcut_gives_what_the_exact_comparison_gives(given_weights: list[int], key: bytes) -> None:
    """Doubles where they are certain, and draws alone where weights are equal, order nodes as 60 digits do."""
    placed = ring(*given_weights)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("orchestra.cluster.ring._CERTAIN", math.inf)
        object.__setattr__(exact := ring(*given_weights), "_is_even", False)
        expected = exact.owners(key, 12)
    assert placed.owners(key, 12) == expected


def test_what_is_no_ring_is_refused() -> None:
    """A node without a name or capacity, one that stands twice, no owner at all, too many nodes: each is an error."""
    node = RingNode("a", 1)
    for weight in (0, -1, (1 << 60) + 1):
        with pytest.raises(UsageError):
            RingNode("a", weight)
    with pytest.raises(UsageError):
        RingNode("", 1)
    with pytest.raises(UsageError, match="each once"):
        ring_of(1, [node, RingNode("a", 2)])
    with pytest.raises(UsageError, match="at least one owner"):
        ring_of(1, [node]).owners(b"k", 0)
    with pytest.raises(UsageError, match=f"at most {NODES_MAX}"):
        ring(*[1] * (NODES_MAX + 1))
    assert ring_of(0, []).owners(b"k", 2) == ()
