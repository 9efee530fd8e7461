"""Reads `orchestra.toml` and ORCHESTRA_* variables into a `Config`.

Owns: where the file is looked for, its size and syntax, the table of keys with their limits, the environment's
overrides. Leaves to others: `[[mount]]` (config_mounts), whether the cache directory can be used (blocks), whether
mounts fit together (namespace) and their schemes exist (stores).
"""

from __future__ import annotations

import os
import re
import shutil
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orchestra.config import CacheConfig, Config, DaemonConfig, FetchConfig
from orchestra.config_cluster import CLUSTER_KEYS, check_replications, cluster_config, list_literal
from orchestra.config_keys import (
    Key,
    checked,
    config_error,
    counts,
    did_you_mean,
    durations,
    folder,
    number_literal,
    ratios,
    sizes,
    switch,
    switch_literal,
    users,
    words,
)
from orchestra.config_mounts import parse_mounts, refuse_readable_secrets
from orchestra.errors import ConfigError
from orchestra.units import GIB, KIB, MIB, SIZE_LIMIT_BYTES, format_size

FILE_NAME = "orchestra.toml"
# A mount takes about 200 bytes, so this holds five thousand of them; more is some other file given by mistake.
FILE_SIZE_BYTES_MAX = MIB
# The default limit of the cache: enough for ImageNet's validation set many times over, and never more than half of the
# file system. Half of its size, not a part of what is free: that shrinks as the cache fills, so a restart would evict.
DEFAULT_CACHE_SIZE_BYTES = 64 * GIB
DEFAULT_CACHE_SHARE = 0.5


_TABLES: Mapping[str, tuple[Key, ...]] = {
    "cache": (
        Key("dir", "dir", folder),
        Key("size", "size_bytes", sizes(4 * KIB, SIZE_LIMIT_BYTES)),
        Key("free_space_ratio", "free_space_ratio", ratios(0, 0.95), number_literal),
        Key("block_size", "block_size_bytes", sizes(4 * KIB, GIB, power_of_two=True)),
        Key("extent_size", "extent_size_bytes", sizes(4 * KIB, 16 * GIB)),
        Key("eviction", "eviction", words("auto", "lru", "never", "plan", "s3fifo", "sieve")),
        Key("verify", "verify", words("boot", "always")),
    ),
    "daemon": (
        Key("autostart", "autostart", switch, switch_literal),
        Key("idle_timeout", "idle_timeout_s", durations(0.1)),
        Key("wait", "wait_s", durations(0.0)),
        Key("readers", "readers", users, list_literal),
    ),
    "fetch": (
        Key("requests_max", "requests_max", counts(1, 4096), number_literal),
        Key("in_flight_max", "in_flight_bytes_max", sizes(4 * KIB, SIZE_LIMIT_BYTES)),
        Key("attempt_timeout", "attempt_timeout_s", durations(0.1)),
        Key("deadline", "deadline_s", durations(0.1)),
    ),
    "cluster": CLUSTER_KEYS,
}
# Kubernetes sets these for a service called orchestra-cache: they are addresses, not settings of ours.
_KUBERNETES_NAME = re.compile(r"_(SERVICE_HOST|SERVICE_PORT|PORT)(_|\Z)")


def load(path: str | Path | None, environ: Mapping[str, str] | None) -> Config:
    """See `orchestra.config.load_config`."""
    environ = os.environ if environ is None else environ
    source = _find(path, environ)
    body = {} if source is None else _read(source)
    label = "" if source is None else f"{source}: "
    for table in body:
        _check_table_name(table, label)
    settings = {name: _read_table(name, body.get(name, {}), label) for name in _TABLES}
    for name, values in settings.items():
        values.update(_read_environment(name, environ))
    mounts = parse_mounts(body.get("mount", []), label)
    if source is not None:
        refuse_readable_secrets(source, mounts)
    config = Config(
        cache=_cache_config(settings["cache"]),
        mounts=mounts,
        daemon=DaemonConfig(**settings["daemon"]),
        fetch=FetchConfig(**settings["fetch"]),
        cluster=cluster_config(settings["cluster"], label),
        source=source,
    )
    _check_sizes(config, label)
    check_replications({mount.path: mount.replication for mount in mounts}, config.cluster, label)
    return config


def size_warning(config: Config) -> str | None:
    """Return one line when the cache's limit is more than its disk can ever hold, for whoever starts the daemon."""
    usage = shutil.disk_usage(_existing_parent(config.cache.dir))
    most = int(usage.total * (1 - config.cache.free_space_ratio))
    if config.cache.size_bytes <= most:
        return None
    return (
        f"cache.size is {format_size(config.cache.size_bytes)}, but the disk of {config.cache.dir} has "
        f"{format_size(usage.total)} ({format_size(usage.free)} free); at most {format_size(most)} will be used"
    )


def settings_of(config: Config) -> dict[str, str]:
    """Return each key of the tables ("cache.size") with its value as text; the mounts, which may hold secrets, are left
    out."""
    return {
        f"{table}.{key.name}": str(getattr(getattr(config, table), key.field))
        for table, keys in _TABLES.items()
        if getattr(config, table) is not None
        for key in keys
    }


def variable_names() -> frozenset[str]:
    """Return the environment variables that are settings."""
    return frozenset(f"ORCHESTRA_{table.upper()}_{key.name.upper()}" for table, keys in _TABLES.items() for key in keys)


def _find(path: str | Path | None, environ: Mapping[str, str]) -> Path | None:
    named = environ.get("ORCHESTRA_CONFIG")
    if path is not None:
        return _named_file(Path(path), "the argument --config")
    if named:
        return _named_file(Path(named), "$ORCHESTRA_CONFIG")
    from platformdirs import user_config_path

    for place in (Path(FILE_NAME), user_config_path("orchestra") / FILE_NAME):
        if place.exists():
            return place.absolute()
    return None


def _named_file(path: Path, by: str) -> Path:
    if "\0" in str(path) or not path.exists():
        raise ConfigError(f"config file not found: {path} (looked in {path.absolute()}, named by {by})")
    return path.absolute()


def _read(source: Path) -> dict[str, object]:
    try:
        with source.open("rb") as file:
            data = file.read(FILE_SIZE_BYTES_MAX + 1)
    except OSError as error:
        raise ConfigError(f"{source}: cannot be read: {error.strerror}") from error
    if len(data) > FILE_SIZE_BYTES_MAX:
        raise ConfigError(f"{source}: config file too large (over {format_size(FILE_SIZE_BYTES_MAX)})")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{source}:{line}: not UTF-8 text (byte {error.start} of the file)") from error
    try:
        return tomllib.loads(text)
    except RecursionError as error:
        raise ConfigError(f"{source}: arrays or tables nested too deeply") from error
    except ValueError as error:
        raise ConfigError(_syntax_message(source, text, str(error))) from error


def _syntax_message(source: Path, text: str, reason: str) -> str:
    # The offending line itself is left out: it may hold a secret.
    place = re.search(r" \(at line (\d+), column (\d+)\)\Z", reason)
    if place is None:
        return f"{source}: {reason.replace(' (at end of document)', '')} at the end of the file"
    line, column, reason = int(place[1]), int(place[2]), reason[: place.start()]
    if "overwrite" in reason or "twice" in reason:
        first = _first_line_like(text.replace("\r\n", "\n").split("\n"), line)
        reason = "given twice" if first is None else f"given twice (first in line {first})"
    return f"{source}:{line}:{column}: {reason}"


def _first_line_like(lines: list[str], line: int) -> int | None:
    """Return the line above `line` that defines the same key of the same table, or the same table."""
    # tomllib reports a key at the end of its value, or on the line after a header.
    for at in range(line - 1, max(-1, line - 3), -1):
        name = lines[at].split("=")[0].split("#")[0].strip() if at < len(lines) else ""
        if not name:
            continue
        for above in range(at - 1, -1, -1):
            other = lines[above].split("=")[0].split("#")[0].strip()
            if other == name:
                return above + 1
            if other.startswith("[") and not name.startswith("["):
                break
    return None


def _check_table_name(name: str, label: str) -> None:
    if name not in _TABLES and name != "mount":
        raise config_error(f"{label}unknown table '{name}'{did_you_mean(name, [*_TABLES, 'mount'])}")


def _read_table(name: str, table: object, label: str) -> dict[str, Any]:
    if not isinstance(table, dict):
        raise config_error(f"{label}{name}: expected a table [{name}], got {table!r}")
    keys = {key.name: key for key in _TABLES[name]}
    values: dict[str, Any] = {}
    for written, value in table.items():
        if written not in keys:
            raise config_error(f"{label}unknown key '{written}' in [{name}]{did_you_mean(written, keys)}")
        key = keys[written]
        values[key.field] = checked(f"{label}{name}.{written}", key, value)
    return values


def _read_environment(name: str, environ: Mapping[str, str]) -> dict[str, Any]:
    prefix = f"ORCHESTRA_{name.upper()}_"
    keys = {key.name.upper(): key for key in _TABLES[name]}
    values: dict[str, Any] = {}
    for variable in sorted(environ):
        if not variable.startswith(prefix) or _KUBERNETES_NAME.search(variable):
            continue
        key = keys.get(variable.removeprefix(prefix))
        if key is None:
            near = did_you_mean(variable, [prefix + known for known in keys])
            raise config_error(f"unknown variable ${variable}{near}")
        values[key.field] = checked(f"${variable}", key, key.literal(environ[variable]))
    return values


def _cache_config(values: dict[str, Any]) -> CacheConfig:
    if "dir" not in values:
        from platformdirs import user_cache_path

        values["dir"] = user_cache_path("orchestra")
    if "size_bytes" not in values:
        total_bytes = shutil.disk_usage(_existing_parent(values["dir"])).total
        values["size_bytes"] = min(DEFAULT_CACHE_SIZE_BYTES, int(total_bytes * DEFAULT_CACHE_SHARE))
    return CacheConfig(**values)


def _existing_parent(folder: Path) -> Path:
    # os.path.exists answers False where a parent is a file or may not be searched; blocks says what is wrong there.
    return next(place for place in (folder, *folder.parents) if os.path.exists(place))


def _check_sizes(config: Config, label: str) -> None:
    cache = config.cache
    if cache.extent_size_bytes % cache.block_size_bytes:
        raise ConfigError(
            f"{label}cache.extent_size ({format_size(cache.extent_size_bytes)}) must be a whole number of blocks "
            f"(cache.block_size is {format_size(cache.block_size_bytes)})"
        )
    for name, size_bytes in (
        ("cache.size", cache.size_bytes),
        ("fetch.in_flight_max", config.fetch.in_flight_bytes_max),
    ):
        if size_bytes < cache.block_size_bytes:
            raise ConfigError(
                f"{label}{name} ({format_size(size_bytes)}) must hold at least one block "
                f"(cache.block_size is {format_size(cache.block_size_bytes)})"
            )
    for mount in config.mounts:
        if mount.quota_bytes is not None and mount.quota_bytes < cache.block_size_bytes:
            raise ConfigError(
                f"{label}mount {mount.path}: quota ({format_size(mount.quota_bytes)}) must hold at least one block "
                f"(cache.block_size is {format_size(cache.block_size_bytes)})"
            )
