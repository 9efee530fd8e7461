"""Reads `[[mount]]`: one namespace path, the stores behind it and their options.

Owns: the keys of a mount, `${VAR}` in options (its syntax and its expansion), which options look like secrets. Leaves
to others: whether paths fit together (namespace), whether schemes exist (stores).
"""

from __future__ import annotations

import difflib
import math
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orchestra.config import MountConfig
from orchestra.config_cluster import parse_replication
from orchestra.config_keys import Key, checked, config_error, did_you_mean, durations, sizes, switch, words
from orchestra.errors import ConfigError
from orchestra.units import KIB, SIZE_LIMIT_BYTES

# More replicas of the same data than anyone keeps; each costs a round trip before an error is final.
URIS_MAX = 16
KEYS_LATER = ("write_policy",)
# Below a block nothing that matters fits; the daemon compares it with the block size of its cache.
QUOTA_MIN_BYTES = 4 * KIB
TTL_MIN_S = 1.0

_VARIABLE = re.compile(r"\$?\$\{([^}]*)(\}?)")
_VARIABLE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")
_SECRET_NAME = re.compile(
    r"secret|token|passw|passphrase|credential|account_key|private_key|customer_?key|api_key|sas_key|signature|connection_string",
    re.I,
)
_SECRET_WORDS = ("secret", "token", "password", "passphrase", "credential", "signature")
# One letter too few, too many or two swapped in the shortest of these; "region" and "sign" are far below.
_SECRET_WORD_LIKENESS = 0.8
_HARMLESS_NAME = re.compile(r"(_file|_path|_endpoint|_url|_uri|_id|_name|_type)\Z", re.I)
_INLINE_PASSWORD = re.compile(r"\A[A-Za-z0-9+.-]+://[^/@:]*:[^/@]+@")
_durations = durations(0.0)


def parse_freshness_s(value: object) -> float:
    """Return seconds: inf for "immutable", 0 for "strict". Raises ValueError that says what is allowed."""
    if value == "immutable":
        return math.inf
    if value == "strict":
        return 0.0
    try:
        return _durations(value)
    except ValueError as error:
        raise ValueError(f'{error}, or "immutable", or "strict"') from error


def format_freshness(seconds: float) -> str:
    """Return the text that `parse_freshness_s` reads as `seconds`, in the largest unit that is exact."""
    if math.isinf(seconds):
        return "immutable"
    if seconds == 0:
        return "strict"
    for unit, unit_s in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds % unit_s == 0:
            return f"{seconds / unit_s:.0f}{unit}"
    return f"{seconds:g}s"


def looks_secret(name: str, value: str) -> bool:
    """Whether the option holds a secret itself, rather than a `${VAR}` that names one: by its name, also a mistyped one
    that is refused later, a password in an address, or a secret in JSON."""
    if value.lower() in ("", "true", "false") or "${" in value:
        return False
    if _INLINE_PASSWORD.match(value):
        return True
    if value.lstrip().startswith("{") and _SECRET_NAME.search(value):  # client_kwargs and the like hold JSON
        return True
    named = _SECRET_NAME.search(name) is not None or any(
        difflib.get_close_matches(word, _SECRET_WORDS, 1, _SECRET_WORD_LIKENESS) for word in name.lower().split("_")
    )
    return named and _HARMLESS_NAME.search(name) is None


def uri_without_password(uri: str) -> str:
    """Return `uri` with `user:password@` cut to `user:***@`, fit to be shown."""
    return re.sub(r"\A([A-Za-z0-9+.-]+://[^/@:]*):[^/@]+@", r"\1:***@", uri)


def expand(text: str, environ: Mapping[str, str], where: str) -> str:
    """See `orchestra.config.expand_variables`."""
    check_variables(text, where)

    def value_of(match: re.Match[str]) -> str:
        if match[0].startswith("$$"):
            return match[0][1:]
        if match[1] not in environ:
            raise ConfigError(f"environment variable {match[1]} is not set (needed by {where})")
        return environ[match[1]]

    return _VARIABLE.sub(value_of, text)


def check_variables(text: str, where: str) -> None:
    """Raise ConfigError if a `${` in `text` is not closed or names no variable. The text itself is not repeated."""
    for match in _VARIABLE.finditer(text):
        if match[0].startswith("$$"):
            continue
        if not match[2]:
            raise ConfigError(f"{where}: '${{' without a closing '}}' (write '$${{' for the characters themselves)")
        if not _VARIABLE_NAME.match(match[1]):
            raise config_error(f"{where}: '${{{match[1]}}}' does not name an environment variable")


def parse_mounts(tables: object, label: str) -> tuple[MountConfig, ...]:
    """Return the mounts in the order written. Raises ConfigError that begins with `label` and the mount's number."""
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise config_error(f"{label}mount: expected tables, each headed [[mount]] with two brackets")
    return tuple(_parse_mount(table, f"{label}mount {number}") for number, table in enumerate(tables, start=1))


def parse_mount(table: Mapping[str, Any]) -> MountConfig:
    """Return the mount that `table` describes with the keys of the file, as when one is added by hand."""
    return _parse_mount(table, "mount")


def refuse_readable_secrets(source: Path, mounts: tuple[MountConfig, ...]) -> None:
    """Raise ConfigError if others may read `source` and it holds a secret."""
    mode = stat.S_IMODE(source.stat().st_mode)
    if not mode & stat.S_IROTH:
        return
    for mount in mounts:
        names = [f"option {name}" for name, value in mount.options.items() if looks_secret(name, value)]
        names += ["the password in its uri" for uri in mount.uris if _INLINE_PASSWORD.match(uri)]
        if names:
            raise ConfigError(
                f"{source} holds a secret (mount {mount.path}, {names[0]}) and is mode {mode:04o}, readable by others; "
                f"chmod 600 {source} or write ${{VAR}} in its place"
            )


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"expected text, got {value!r}")
    if not value or not value.isprintable():
        # The value is not repeated: an address may hold a password.
        raise ValueError("expected text that is not empty and holds no control characters")
    return value


def _uris(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not 1 <= len(value) <= URIS_MAX:
        raise ValueError(f'expected a list of 1 to {URIS_MAX} addresses such as ["s3://bucket/folder"], got {value!r}')
    return tuple(_text(uri) for uri in value)


def _uri(value: object) -> tuple[str, ...]:
    return (_text(value),)


_KEYS = {
    key.name: key
    for key in (
        Key("path", "path", _text),
        Key("uri", "uris", _uri),
        Key("uris", "uris", _uris),
        Key("readonly", "readonly", switch),
        Key("freshness", "freshness_s", parse_freshness_s),
        Key("prefetch", "prefetch", words("none", "readahead", "dataset")),
        Key("quota", "quota_bytes", sizes(QUOTA_MIN_BYTES, SIZE_LIMIT_BYTES)),
        Key("ttl", "ttl_s", durations(TTL_MIN_S)),
    )
}


def _parse_mount(table: Mapping[str, Any], where: str) -> MountConfig:
    if isinstance(table.get("path"), str):
        where = f"{where} ({table['path']})"
    values: dict[str, Any] = {}
    for name, value in table.items():
        if name in KEYS_LATER:
            raise config_error(f"{where}: key '{name}' is not supported by this version yet")
        if name == "options":
            values["options"] = _options(value, where)
        elif name == "replication":
            values["replication"] = parse_replication(value, where)
        elif name in _KEYS:
            values[_KEYS[name].field] = checked(f"{where}: {name}", _KEYS[name], value)
        else:
            raise config_error(f"{where}: unknown key '{name}'{did_you_mean(name, [*_KEYS, 'options', 'replication'])}")
    if "path" not in values:
        raise config_error(f"{where}: key 'path' is missing")
    if ("uri" in table) == ("uris" in table):
        raise config_error(f"{where}: exactly one of the keys 'uri' and 'uris' is needed")
    return MountConfig(**values)


def _options(table: object, where: str) -> dict[str, str]:
    if not isinstance(table, dict):
        raise config_error(f'{where}: options: expected a table such as {{ endpoint_url = "..." }}')
    options = {}
    for name, value in table.items():
        if isinstance(value, bool):
            options[name] = "true" if value else "false"
        elif isinstance(value, (int, str)):
            options[name] = str(value)
        else:
            kind = type(value).__name__
            raise config_error(f"{where}: option {name}: expected text, a whole number or true/false, got a {kind}")
        check_variables(options[name], f"{where}: option {name}")
    return options
