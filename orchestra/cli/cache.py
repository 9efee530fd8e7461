"""`orchestra free, pin, unpin`: what the cache keeps and what it lets go of.

Owns: what is printed, and whether a pin can be kept. Leaves to others: pins and files (daemon).
"""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

import click

from orchestra.cli.files import walk
from orchestra.cli.output import print_json, print_lines, print_table, printable
from orchestra.cli.session import Session, pass_session
from orchestra.errors import OrchestraError
from orchestra.units import format_size

_json_option = click.option("--json", "as_json", is_flag=True, help="Print exact values as JSON.")


@click.command()
@click.argument("paths", metavar="PATH...", nargs=-1, required=True)
@click.option("-f", "--force", is_flag=True, help="Drop pinned files too; the pin stays, and keeps what comes next.")
@_json_option
@pass_session
def free(session: Session, paths: tuple[str, ...], force: bool, as_json: bool) -> None:
    """Drop what is cached at and below PATH; the store keeps everything."""
    rows = []
    for path in paths:
        body = {"path": path, "force": force}
        rows.append({"path": path, **session.daemon_request("POST", "/v1/free", body)})
    if as_json:
        print_json(rows)
    else:
        print_lines(_freed(row) for row in rows)
    held = [row for row in rows if row["pinned_bytes"] and not row["freed_bytes"]]
    if held:
        path = held[0]["path"]
        raise OrchestraError(
            f"nothing was freed at {path}: all of it ({format_size(held[0]['pinned_bytes'])}) is pinned; "
            f"run: orchestra unpin PATH (see: orchestra pin), or: orchestra free --force {path}"
        )


def _freed(row: dict[str, Any]) -> str:
    text = f"{printable(row['path'])}: freed {format_size(row['freed_bytes'])}"
    if row["pinned_bytes"]:
        text += f"; {format_size(row['pinned_bytes'])} are pinned and stay (--force drops them too)"
    if row["busy_bytes"]:
        text += f"; {format_size(row['busy_bytes'])} are being written just now and stay"
    return text


@click.command()
@click.argument("paths", metavar="[PATH]...", nargs=-1)
@click.option("--partial", is_flag=True, help="Pin although not all of it can be held; what comes first stays.")
@_json_option
@pass_session
def pin(session: Session, paths: tuple[str, ...], partial: bool, as_json: bool) -> None:
    """Keep what is cached below PATH, now and later; without PATH, list what is pinned."""
    if not paths:
        _list_pins(session, as_json)
        return
    paths = tuple(session.client.stat(path).path for path in paths)
    if not partial:
        for path in paths:
            _check_fits(session, path)
    rows = [{"path": path, **session.daemon_request("POST", "/v1/pins", {"path": path})} for path in paths]
    if as_json:
        print_json(rows)
        return
    for row in rows:
        cached = format_size(row["held_bytes"])
        name = printable(row["path"])
        print_lines([f"{name}: pinned, {cached} of it cached now (orchestra load {name} fetches the rest)"])


def _check_fits(session: Session, path: str) -> None:
    """Raise OrchestraError if what is below `path` is more than the cache, or the mount's quota, can ever hold."""
    client = session.client
    size_bytes = sum(entry.size_bytes for entry in walk(client.list, client.stat(path)))
    limits = [(int(client.daemon_request("GET", "/v1/status")["capacity_bytes"]), "the cache holds", "cache.size")]
    for mount in client.daemon_request("GET", "/v1/mounts")["mounts"]:
        if mount["quota_bytes"] is not None and f"{path}/".startswith(f"{mount['path'].rstrip('/')}/"):
            limits.append((int(mount["quota_bytes"]), f"the quota of {mount['path']} is", "that quota"))
    limit_bytes, what, setting = min(limits)
    if size_bytes > limit_bytes:
        raise OrchestraError(
            f"cannot pin {path}: it has {format_size(size_bytes)}, and {what} at most {format_size(limit_bytes)}; "
            f"pin a part of it, raise {setting}, or pin what fits with: orchestra pin --partial {path}"
        )


def _list_pins(session: Session, as_json: bool) -> None:
    pins = session.daemon_request("GET", "/v1/pins")["pins"]
    if as_json:
        print_json(pins)
    else:
        print_table(("CACHED", "PATH"), [(format_size(row["held_bytes"]), row["path"]) for row in pins])


@click.command()
@click.argument("paths", metavar="PATH...", nargs=-1, required=True)
@pass_session
def unpin(session: Session, paths: tuple[str, ...]) -> None:
    """Let what is cached below PATH leave again when room is needed."""
    for path in paths:
        left = session.daemon_request("DELETE", f"/v1/pins?path={quote(path, errors='surrogateescape')}")
        if left["pinned_bytes"]:
            kept = format_size(left["pinned_bytes"])
            print_lines([f"{printable(path)}: unpinned; {kept} of it stay pinned by another pin (see: orchestra pin)"])
