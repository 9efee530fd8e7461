"""`orchestra mount`: which store stands where in the namespace.

Owns: options of the commands and what is printed. Leaves to others: checking and keeping the table (daemon, namespace).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

import click

from orchestra.cli.output import print_json, print_table
from orchestra.cli.session import Session, pass_session
from orchestra.config import MountConfig
from orchestra.config_mounts import format_freshness, looks_secret, parse_mount, uri_without_password
from orchestra.errors import NotFoundError

ROUTE = "/v1/mounts"

_readonly_option = click.option(
    "--readonly/--writable", default=None, help="Whether writes are refused (default: readonly)."
)
_freshness_option = click.option(
    "--freshness", metavar="AGE", help='How old what is known of the store may be: "60s", "immutable", "strict".'
)
_options_option = click.option(
    "--option",
    "options",
    metavar="KEY=VALUE",
    multiple=True,
    help="An option of the store, e.g. endpoint_url=http://127.0.0.1:9000. Write '${VAR}' for a secret (in single "
    "quotes): the daemon reads that variable, and the secret shows in no process list.",
)


@click.group()
def mount() -> None:
    """Attach stores to the namespace."""


@mount.command()
@click.argument("path")
@click.argument("uris", metavar="URI...", nargs=-1, required=True)
@_readonly_option
@_freshness_option
@_options_option
@pass_session
def add(
    session: Session,
    path: str,
    uris: tuple[str, ...],
    readonly: bool | None,
    freshness: str | None,
    options: tuple[str, ...],
) -> None:
    """Attach the store at URI at PATH; more URIs name copies of the same data, tried in order."""
    session.client.daemon_request("POST", ROUTE, _body(path, uris, readonly, freshness, options))


@mount.command("ls")
@click.option("--json", "as_json", is_flag=True, help="Print the mounts as JSON.")
@pass_session
def list_mounts(session: Session, as_json: bool) -> None:
    """List the mounts."""
    mounts = [_shown(table) for table in session.client.daemon_request("GET", ROUTE)["mounts"]]
    if as_json:
        print_json(mounts)
        return
    rows = [
        (
            table["path"],
            " ".join(table["uris"]),
            "readonly" if table["readonly"] else "writable",
            format_freshness(_seconds(table["freshness_s"])),
            table["source"],
            " ".join(f"{name}={value}" for name, value in sorted(table["options"].items())),
        )
        for table in sorted(mounts, key=lambda table: str(table["path"]))
    ]
    print_table(("PATH", "STORE", "MODE", "FRESHNESS", "FROM", "OPTIONS"), rows)


@mount.command("rm")
@click.argument("path")
@pass_session
def remove(session: Session, path: str) -> None:
    """Detach the store at PATH; nothing in the store changes."""
    session.client.daemon_request("DELETE", f"{ROUTE}?path={quote(path, errors='surrogateescape')}")


@mount.command()
@click.argument("path")
@click.argument("uris", metavar="[URI]...", nargs=-1)
@_readonly_option
@_freshness_option
@_options_option
@click.option("--remove-option", "removed", metavar="KEY", multiple=True, help="Drop an option of the store.")
@pass_session
def update(
    session: Session,
    path: str,
    uris: tuple[str, ...],
    readonly: bool | None,
    freshness: str | None,
    options: tuple[str, ...],
    removed: tuple[str, ...],
) -> None:
    """Change what is given of the mount at PATH, and keep the rest."""
    mounts = session.client.daemon_request("GET", ROUTE)["mounts"]
    path = path.rstrip("/") or "/"
    current = next((table for table in mounts if table["path"] == path), None)
    if current is None:
        raise NotFoundError(f"nothing is mounted at {path} (see: orchestra mount ls)")
    body = _body(path, uris or tuple(current["uris"]), readonly, freshness, options)
    if readonly is None:
        body["readonly"] = current["readonly"]
    if freshness is None:
        body["freshness_s"] = current["freshness_s"]
    kept = {name: value for name, value in current["options"].items() if name not in removed}
    body["options"] = kept | body["options"]
    session.client.daemon_request("PUT", ROUTE, body)


def _body(
    path: str, uris: tuple[str, ...], readonly: bool | None, freshness: str | None, options: tuple[str, ...]
) -> dict[str, Any]:
    table: dict[str, Any] = {"path": path, "uris": list(uris), "options": _parsed_options(options)}
    if readonly is not None:
        table["readonly"] = readonly
    if freshness is not None:
        table["freshness"] = freshness
    return _mount_fields(parse_mount(table))


def _mount_fields(mount: MountConfig) -> dict[str, Any]:
    return {
        "path": mount.path,
        "uris": list(mount.uris),
        "readonly": mount.readonly,
        "freshness_s": mount.freshness_s,
        "options": dict(mount.options),
    }


def _parsed_options(options: tuple[str, ...]) -> dict[str, str]:
    table = {}
    for option in options:
        name, equals, value = option.partition("=")
        if not name or not equals:
            # What stands there may be a secret whose name was forgotten, so it is not repeated.
            raise click.BadParameter("expected KEY=VALUE", param_hint="'--option'")
        table[name] = value
    return table


def _seconds(value: float | None) -> float:
    # JSON has no infinity: null stands for "immutable".
    return math.inf if value is None else float(value)


def _shown(table: Mapping[str, Any]) -> dict[str, Any]:
    """Return the mount as it may be shown: no secret that was given inline."""
    options = {name: "***" if looks_secret(name, value) else value for name, value in table["options"].items()}
    uris = [uri_without_password(uri) for uri in table["uris"]]
    freshness_s = _seconds(table["freshness_s"])
    return {**table, "uris": uris, "options": options, "freshness_s": None if math.isinf(freshness_s) else freshness_s}
