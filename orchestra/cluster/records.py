"""What a node says of itself to others, and how that reads on the wire.

Owns: the record, its JSON, and the check of what others sent. Leaves to others: where records come from (the drivers)
and what follows from them (membership).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import msgspec

from orchestra.cluster.ring import WEIGHT_MAX
from orchestra.config_cluster import split_address

NODE_ID_CHARACTERS_MAX = 255
# A record takes 200 bytes; more is not one.
RECORD_BYTES_MAX = 4096
_NODE_ID = re.compile(rf"[A-Za-z0-9._:\[\]-]{{1,{NODE_ID_CHARACTERS_MAX}}}\Z")


@dataclass(frozen=True, slots=True)
class NodeRecord:
    """One node as others know it.

    `incarnation` grows with every registration of this `node_id` (0 where the driver has none), so that what an older
    one still does can be told apart. `instance` differs for every process: two of them under one id are an error.
    """

    node_id: str
    address: str  # host:port, where its peers reach it
    capacity_bytes: int
    is_draining: bool = False  # still answers, owns nothing new
    incarnation: int = 0
    instance: str = ""


class _Wire(msgspec.Struct, forbid_unknown_fields=False):
    """The JSON of a record; unknown keys are a newer version's and are left alone."""

    node_id: str
    address: str
    capacity_bytes: int
    is_draining: bool = False
    incarnation: int = 0
    instance: str = ""


def encode_record(record: NodeRecord) -> bytes:
    """Return the JSON that `parse_record` reads."""
    return msgspec.json.encode(record)


def parse_record(data: bytes) -> NodeRecord:
    """Return the record in `data`, which others wrote. Raises ValueError that says what is wrong with it."""
    if len(data) > RECORD_BYTES_MAX:
        raise ValueError(f"a node's record of {len(data)} bytes (at most {RECORD_BYTES_MAX})")
    try:
        wire = msgspec.json.decode(data, type=_Wire)
    except msgspec.DecodeError as error:
        raise ValueError(f"not a node's record: {error}") from error
    if _NODE_ID.match(wire.node_id) is None:
        raise ValueError(f"not a node's name: {wire.node_id[:300]!r}")
    split_address(wire.address)
    if not 1 <= wire.capacity_bytes <= WEIGHT_MAX:
        raise ValueError(f"node {wire.node_id}: a capacity of {wire.capacity_bytes} bytes")
    if wire.incarnation < 0 or len(wire.instance) > NODE_ID_CHARACTERS_MAX:
        raise ValueError(f"node {wire.node_id}: not an incarnation: {wire.incarnation}, {wire.instance[:300]!r}")
    return NodeRecord(
        node_id=wire.node_id,
        address=wire.address,
        capacity_bytes=wire.capacity_bytes,
        is_draining=wire.is_draining,
        incarnation=wire.incarnation,
        instance=wire.instance,
    )
