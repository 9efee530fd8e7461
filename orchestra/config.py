"""Settings: plain values, and how they are read from `orchestra.toml` and the environment.

Owns: the settings, their defaults, and the names `load_config` and `expand_variables`. How they are read (the table of
keys, limits, messages) is in `config_file`, `config_mounts` and `config_cluster`. Leaves to others: calling
`expand_variables` (namespace, at mount time, so that secrets are never held here) and everything that settings are for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from orchestra.units import GIB, MIB

# A 4 MiB GET at 90 MB/s takes 47 ms, so a 25 ms first byte is a third of the wait. At 1 MiB it
# is two thirds; at 16 MiB a 256 KiB random read throws 98 % of its bytes away.
BLOCK_SIZE_BYTES = 4 * MIB
# 64 blocks: one presence map fits a page, and a complete extent is worth a passthrough open.
EXTENT_SIZE_BYTES = 256 * MIB


@dataclass(frozen=True, slots=True)
class CacheConfig:
    """`[cache]`."""

    dir: Path
    size_bytes: int = 64 * GIB
    free_space_ratio: float = 0.1
    block_size_bytes: int = BLOCK_SIZE_BYTES
    extent_size_bytes: int = EXTENT_SIZE_BYTES
    eviction: str = "auto"  # see orchestra.blocks.eviction
    verify: str = "boot"  # boot: a block's crc is checked before its first use in a boot; always: on every read


@dataclass(frozen=True, slots=True)
class Replication:
    """A mount's `replication`. None: `min` is `[cluster]`'s `replicas`, `max` is no more than `min`."""

    min: int | None = None  # owners of an extent
    max: int | None = None  # of one that many nodes read
    passive: bool = True  # whether a node that is no owner keeps what it read


@dataclass(frozen=True, slots=True)
class MountConfig:
    """One `[[mount]]`. `options` are as written (`${VAR}` not expanded).

    `freshness_s` is inf for "immutable", 0 for "strict". `quota_bytes` and `ttl_s` are None for no such limit.
    """

    path: str
    uris: tuple[str, ...]
    readonly: bool = True
    freshness_s: float = 60.0
    prefetch: str = "readahead"
    options: Mapping[str, str] = field(default_factory=dict, repr=False)  # may hold a secret
    quota_bytes: int | None = None  # the most of the cache that this mount's files may take
    ttl_s: float | None = None  # what was not read for so long leaves the cache
    replication: Replication | None = None


@dataclass(frozen=True, slots=True)
class DaemonConfig:
    """`[daemon]`."""

    autostart: bool = True
    idle_timeout_s: float = 900.0
    readers: tuple[str, ...] = ()  # other users who may read through it: names, numbers, "@group", "*" for all
    wait_s: float = 30.0  # how long a reader waits for a daemon that is down before EIO


@dataclass(frozen=True, slots=True)
class FetchConfig:
    """`[fetch]`: what bounds the traffic to each under store."""

    requests_max: int = 128  # requests in flight to one store
    # 30 blocks of 4 MiB: at 50 ms and 90 MB/s a connection that is 1.3 GB/s, and what is asked for first comes first.
    in_flight_bytes_max: int = 128 * MIB
    attempt_timeout_s: float = 30.0  # one request without progress
    deadline_s: float = 120.0  # all tries of one read


@dataclass(frozen=True, slots=True)
class ClusterConfig:
    """`[cluster]`: addresses are "host:port". Of `nodes`, `name` and `endpoints` the one that `membership` asks for is
    given."""

    listen: str
    node_id: str = ""  # "": listen is this node's name, too
    membership: str = "static"
    nodes: tuple[str, ...] = ()
    name: str = ""
    endpoints: tuple[str, ...] = ()
    secret_file: Path | None = None
    replicas: int = 1  # owners of an extent
    ufs_fallback: str = "warn"  # allow | warn | fail: reading from the store what its owners should have given


@dataclass(frozen=True, slots=True)
class Config:
    """Everything; `source` is the file it came from, None for defaults."""

    cache: CacheConfig
    mounts: tuple[MountConfig, ...] = ()
    daemon: DaemonConfig = DaemonConfig()
    fetch: FetchConfig = FetchConfig()
    cluster: ClusterConfig | None = None  # one machine
    source: Path | None = None


def load_config(path: str | Path | None = None, environ: Mapping[str, str] | None = None) -> Config:
    """Return the settings of the first of: `path`, $ORCHESTRA_CONFIG, ./orchestra.toml, the user's config folder.

    No file at all means defaults; `environ` (None: the process's own) overrides single keys by ORCHESTRA_<TABLE>_<KEY>.
    Raises ConfigError with one line that names file, key, value and what is allowed. `${VAR}` in mount options is
    checked but not expanded.
    """
    from orchestra.config_file import load

    return load(path, environ)


def expand_variables(text: str, environ: Mapping[str, str], where: str) -> str:
    """Return `text` with each `${NAME}` replaced by that variable, once: what a variable holds is not expanded again.

    `$${` stands for a plain `${`. Raises ConfigError that names the missing variable and `where` ("mount /x option
    secret").
    """
    from orchestra.config_mounts import expand

    return expand(text, environ, where)
