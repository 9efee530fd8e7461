"""How each node of the cluster is, as `orchestra node ls` shows it.

Owns: the rows, and what their states mean. Leaves to others: who is a node (membership), asking (calls).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from orchestra.cluster.records import NodeRecord
from orchestra.cluster.ring import Ring
from orchestra.daemon.cluster import ClusterNode
from orchestra.daemon.nodes.calls import NodeCalls
from orchestra.errors import OrchestraError

# up: answers, owns its share. draining: hands over what it owned. drained: has handed it over. away: is a node by the
# membership, and does not answer. down: is in the list of nodes, and the membership sees nothing of it.
STATES = ("up", "draining", "drained", "away", "down")


@dataclass(frozen=True, slots=True)
class NodeRow:
    """One node; `used_bytes` is None where it did not say."""

    node_id: str
    address: str
    state: str
    capacity_bytes: int | None
    used_bytes: int | None
    share: float  # of the ring: the part of all extents that it owns first
    is_self: bool = False
    note: str = ""
    hot_copies: int = 0  # extents that it keeps for others because they are read so often


def one_machine(capacity_bytes: int, used_bytes: int) -> dict[str, Any]:
    """Return what a daemon without a cluster says: one node, that owns everything."""
    row = NodeRow("this machine", "", "up", capacity_bytes, used_bytes, 1.0, is_self=True)
    return {"is_cluster": False, "membership": "", "ring": None, "source_error": "", "nodes": [asdict(row)]}


class Overview:
    """Asks all nodes how they are."""

    def __init__(self, cluster: ClusterNode, calls: NodeCalls, own_status: Callable[[], dict[str, Any]]) -> None:
        """`own_status` is this node's answer to the same question."""
        self._cluster = cluster
        self._calls = calls
        self._own_status = own_status

    async def describe(self) -> dict[str, Any]:
        """Return {is_cluster, membership, ring, source_error, nodes}; nodes that do not answer are in it, too."""
        members, ring = self._cluster.members, self._cluster.ring
        if self._cluster.node_id not in {member.node_id for member in members}:
            members = (self._cluster.own, *members)
        answers = await self._calls.ask_all(members, self._ask)
        rows = [_row(one, answer, ring, self._cluster.node_id) for one, answer in zip(members, answers, strict=True)]
        known = {row.address for row in rows}
        rows += [_silent(address) for address in self._cluster.config.nodes if address not in known]
        return {
            "is_cluster": True,
            "membership": self._cluster.config.membership,
            "ring": {"revision": ring.revision, "digest": ring.digest},
            "source_error": self._cluster.status()["source_error"],
            "nodes": [asdict(row) for row in sorted(rows, key=lambda row: row.node_id)],
        }

    async def _ask(self, node: NodeRecord) -> dict[str, Any]:
        if node.node_id == self._cluster.node_id:
            return self._own_status()
        return await self._calls.ask(node, "GET", "/v1/node/status")


def _row(node: NodeRecord, answer: dict[str, Any] | OrchestraError, ring: Ring, own_id: str) -> NodeRow:
    share = _share(ring, node.node_id)
    is_self = node.node_id == own_id
    if isinstance(answer, OrchestraError):
        return NodeRow(node.node_id, node.address, "away", node.capacity_bytes, None, share, is_self, str(answer))
    note = "" if answer.get("ring_digest") == ring.digest else "sees another ring just now"
    used = answer.get("used_bytes")
    used_bytes = used if isinstance(used, int) else None
    handover = answer.get("handover")
    hot = answer.get("hot_copies")
    hot_copies = hot if isinstance(hot, int) else 0
    if not node.is_draining:
        return NodeRow(
            node.node_id, node.address, "up", node.capacity_bytes, used_bytes, share, is_self, note, hot_copies
        )
    is_over = isinstance(handover, dict) and handover.get("is_over") is True
    note = str(handover.get("message", "")) if isinstance(handover, dict) else note
    state = "drained" if is_over else "draining"
    return NodeRow(node.node_id, node.address, state, node.capacity_bytes, used_bytes, share, is_self, note)


def _share(ring: Ring, node_id: str) -> float:
    total = sum(node.weight for node in ring.nodes)
    return sum(node.weight for node in ring.nodes if node.node_id == node_id) / total if total else 0.0


def _silent(address: str) -> NodeRow:
    return NodeRow(address, address, "down", None, None, 0.0, note="no node answered there yet")
