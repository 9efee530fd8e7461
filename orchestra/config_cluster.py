"""Reads `[cluster]` and a mount's `replication`: addresses, who else there is, how often bytes are kept.

Owns: their keys, what they must be together, when a secret is needed. Leaves to others: reading the secret (the daemon;
a training process loads the same file and need not be able to), whether an address can be bound or reached.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from orchestra.config import ClusterConfig, Replication
from orchestra.config_keys import Key, checked, config_error, counts, did_you_mean, number_literal, switch, words
from orchestra.errors import ConfigError

# As many as a ring has places for; every node probes every other.
NODES_MAX = 1024
ENDPOINTS_MAX = 16
# More copies than this in one cluster is a broadcast, which passive copies do better.
REPLICAS_MAX = 64
_ADDRESS = re.compile(r"(\[[0-9A-Fa-f:.%]{2,64}\]|[A-Za-z0-9._-]{1,253}):([0-9]{1,5})\Z")
# As in a node's record (cluster.records).
_NODE_ID = re.compile(r"[A-Za-z0-9._:\[\]-]{1,255}\Z")
_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,251}[A-Za-z0-9.])?\Z")
# What says who else there is, by `membership`.
_SOURCES = {"static": "nodes", "dns": "name", "etcd": "endpoints"}


def split_address(address: str) -> tuple[str, int]:
    """Return host (without brackets) and port of "host:port". Raises ValueError that says what is allowed."""
    match = _ADDRESS.match(address)
    if match is None or not 1 <= int(match[2]) <= 65535:
        raise ValueError(f"expected host:port such as 10.0.0.1:7420, got {address[:300]!r}")
    return match[1].strip("[]"), int(match[2])


def is_loopback(host: str) -> bool:
    """Whether nothing outside this machine reaches `host`. A name other than localhost may be anywhere."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def list_literal(text: str) -> object:
    """Return the list that an environment variable names: "a,b"."""
    return [part.strip() for part in text.split(",")]


def _address(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"expected host:port such as 10.0.0.1:7420, got {value!r}")
    split_address(value)
    return value


def _listen(value: object) -> str:
    address = _address(value)
    if split_address(address)[0] in ("0.0.0.0", "::"):
        raise ValueError(
            f"expected the address at which other nodes reach this one, got {address!r}; where the file is shared, set "
            "$ORCHESTRA_CLUSTER_LISTEN on each node"
        )
    return address


def _name(value: object) -> str:
    if not isinstance(value, str) or _NAME.match(value) is None:
        raise ValueError(
            f"expected a host name such as orchestra.default.svc (the port is that of listen), got {value!r}"
        )
    return value


def _node_id(value: object) -> str:
    if not isinstance(value, str) or _NODE_ID.match(value) is None:
        raise ValueError(f"expected a name of letters, digits and . _ - : [ ], got {value!r}")
    return value


def _endpoint(value: object) -> str:
    expected = f"expected an address such as http://127.0.0.1:2379, got {value!r}"
    if not isinstance(value, str):
        raise ValueError(expected)
    try:
        parts = urlsplit(value)
        is_whole = parts.scheme in ("http", "https") and parts.hostname and parts.port
    except ValueError as error:
        raise ValueError(expected) from error
    if parts.username is not None or parts.password is not None:
        raise ValueError("an address of etcd with a user or password in it is not supported")  # and is not repeated
    if not is_whole or parts.path not in ("", "/") or parts.query or parts.fragment:
        raise ValueError(expected)
    return value.rstrip("/")


def _several(one: Callable[[object], str], most: int) -> Callable[[object], tuple[str, ...]]:
    def parse(value: object) -> tuple[str, ...]:
        if not isinstance(value, list) or not 1 <= len(value) <= most:
            raise ValueError(f"expected a list of 1 to {most} addresses, got {value!r}")
        parsed = tuple(one(item) for item in value)
        twice = next((item for item in parsed if parsed.count(item) > 1), None)
        if twice is not None:
            raise ValueError(f"{twice!r} stands twice")
        return parsed

    return parse


def _file(value: object) -> Path:
    if not isinstance(value, str) or not value or "\0" in value or not Path(value).is_absolute():
        raise ValueError(f"expected the absolute path of a file, got {value!r}")
    return Path(value)


CLUSTER_KEYS = (
    Key("listen", "listen", _listen),
    Key("node_id", "node_id", _node_id),
    Key("membership", "membership", words(*_SOURCES)),
    Key("nodes", "nodes", _several(_address, NODES_MAX), list_literal),
    Key("name", "name", _name),
    Key("endpoints", "endpoints", _several(_endpoint, ENDPOINTS_MAX), list_literal),
    Key("secret_file", "secret_file", _file),
    Key("replicas", "replicas", counts(1, REPLICAS_MAX), number_literal),
    Key("ufs_fallback", "ufs_fallback", words("allow", "warn", "fail")),
)
_REPLICATION_KEYS = {
    key.name: key
    for key in (
        Key("min", "min", counts(1, REPLICAS_MAX)),
        Key("max", "max", counts(1, REPLICAS_MAX)),
        Key("passive", "passive", switch),
    )
}


def cluster_config(values: dict[str, Any], label: str) -> ClusterConfig | None:
    """Return the settings of the keys given in file and environment, None for none at all. Raises ConfigError for keys
    that do not fit together."""
    if not values:
        return None
    if "listen" not in values:
        raise ConfigError(f"{label}cluster: key 'listen' is missing (the address at which other nodes reach this one)")
    cluster = ClusterConfig(**values)
    for membership, key in _SOURCES.items():
        if membership == cluster.membership and key not in values:
            raise ConfigError(f"{label}cluster: key '{key}' is missing (membership is {membership})")
        if membership != cluster.membership and key in values:
            raise ConfigError(
                f"{label}cluster.{key} belongs to membership {membership}, and membership is {cluster.membership}"
            )
    if cluster.nodes and cluster.listen not in cluster.nodes:
        raise config_error(
            f"{label}cluster.nodes must contain this node's own address, {cluster.listen} (cluster.listen)"
        )
    outside = _first_outside(cluster)
    if outside is not None and cluster.secret_file is None:
        raise config_error(
            f"{label}cluster: key 'secret_file' is missing: refusing to speak with {outside}, which is not this "
            "machine, without a secret that all nodes share"
        )
    return cluster


def parse_replication(table: object, where: str) -> Replication:
    """Return the `replication` of a mount. Raises ConfigError that begins with `where`."""
    if not isinstance(table, dict):
        raise config_error(f"{where}: replication: expected a table such as {{ min = 1, max = 4 }}, got {table!r}")
    values: dict[str, Any] = {}
    for name, value in table.items():
        if name not in _REPLICATION_KEYS:
            raise config_error(f"{where}: unknown key '{name}' in replication{did_you_mean(name, _REPLICATION_KEYS)}")
        values[name] = checked(f"{where}: replication.{name}", _REPLICATION_KEYS[name], value)
    replication = Replication(**values)
    if replication.max is not None and replication.min is not None and replication.min > replication.max:
        raise config_error(f"{where}: replication.min ({replication.min}) is more than max ({replication.max})")
    return replication


def check_replications(
    replications: Mapping[str, Replication | None], cluster: ClusterConfig | None, label: str
) -> None:
    """Raise ConfigError if a mount asks for what its cluster cannot give."""
    for path, replication in replications.items():
        if replication is None:
            continue
        if cluster is None:
            raise config_error(f"{label}mount {path}: replication needs a table [cluster]")
        if replication.max is not None and replication.min is None and cluster.replicas > replication.max:
            raise config_error(
                f"{label}mount {path}: replication.max ({replication.max}) is less than cluster.replicas "
                f"({cluster.replicas}), which holds where min is not given"
            )


def _first_outside(cluster: ClusterConfig) -> str | None:
    """Return an address that is not this machine's own, None where all are."""
    addresses: Sequence[tuple[str, str]] = [
        *((address, split_address(address)[0]) for address in (cluster.listen, *cluster.nodes)),
        *((endpoint, urlsplit(endpoint).hostname or "") for endpoint in cluster.endpoints),
        *([(cluster.name, cluster.name)] if cluster.name else []),
    ]
    return next((address for address, host in addresses if not is_loopback(host)), None)
