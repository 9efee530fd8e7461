"""A store that is mounted as a folder by its address alone: where it stands in the namespace meanwhile.

Owns: the path that a URI gets. Leaves to others: checking and keeping the table (daemon, namespace).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote, urlsplit

from orchestra.cli.mount import ROUTE, parsed_options, to_wire, warn_of_secrets
from orchestra.cli.session import Session
from orchestra.config_mounts import parse_mount
from orchestra.errors import UsageError


def attach_uri(session: Session, uri: str, options: tuple[str, ...], freshness: str | None) -> str:
    """Return the path of the namespace at which `uri` is attached, after attaching it if it is not yet.

    What is attached already in the same way, by the configuration or by an earlier mount, is used as it is.
    """
    given: dict[str, Any] = {"uris": [uri], "options": parsed_options(options)}
    if freshness is not None:
        given["freshness"] = freshness
    path = path_of(uri)
    wanted = to_wire(parse_mount(given | {"path": path}))
    mounts = session.daemon_request("GET", ROUTE)["mounts"]
    same = next((mount for mount in mounts if _is_same(mount, wanted)), None)
    if same is not None:
        return str(same["path"])
    if any(mount["path"] == path for mount in mounts):  # the same address, but another endpoint, account or freshness
        told = json.dumps([wanted["options"], wanted["freshness_s"]], sort_keys=True)
        scheme, _, rest = path[1:].partition("/")  # below the store's own path it would be seen as a name in it
        path = f"/{scheme}~{hashlib.sha256(told.encode()).hexdigest()[:8]}/{rest}"
    session.daemon_request("POST", ROUTE, to_wire(parse_mount(given | {"path": path})))
    warn_of_secrets(given["options"])
    return path


def _is_same(mount: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    return all(mount.get(name) == wanted[name] for name in ("uris", "options", "freshness_s")) and not mount.get(
        "error"
    )


def path_of(uri: str) -> str:
    """Return where a store stands that was given by its address: s3://bucket/a/b is /s3/bucket/a/b."""
    try:
        parts = urlsplit(uri)
        host = parts.hostname or ""
    except ValueError as error:
        raise UsageError(f"{uri!r} is not an address of a store: {error}") from None
    if parts.scheme == "s3" or not host:
        host = parts.netloc.rpartition("@")[2]  # buckets keep their case
    names = [parts.scheme, host, *unquote(parts.path).split("/")]
    return "/" + "/".join(name for name in names if name not in ("", ".", ".."))
