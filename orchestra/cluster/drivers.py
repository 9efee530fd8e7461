"""Which driver the settings name.

Owns: that choice. Leaves to others: what each driver does.
"""

from __future__ import annotations

from orchestra.clock import Clock
from orchestra.cluster.contract import MembershipDriver
from orchestra.cluster.etcd import EtcdDriver
from orchestra.cluster.probing import ProbingDriver, listed, resolved
from orchestra.cluster.records import NodeRecord
from orchestra.config import ClusterConfig
from orchestra.config_cluster import split_address


def make_driver(cluster: ClusterConfig, own: NodeRecord, clock: Clock) -> MembershipDriver:
    """Return the driver of `cluster.membership`; it connects to nothing before it runs."""
    if cluster.membership == "etcd":
        return EtcdDriver(cluster.endpoints, clock)
    if cluster.membership == "dns":
        return ProbingDriver(own, resolved(cluster.name, split_address(cluster.listen)[1]))
    return ProbingDriver(own, listed(cluster.nodes))
