"""`orchestra mount`: which store stands where in the namespace.

Owns: options of the commands and what is printed. Leaves to others: checking and keeping the table (daemon, namespace).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar
from urllib.parse import quote

import click

from orchestra.cli.output import print_json, print_table, printable
from orchestra.cli.session import Session, pass_session
from orchestra.config import MountConfig
from orchestra.config_mounts import format_freshness, looks_secret, parse_mount, uri_without_password
from orchestra.errors import NotFoundError

ROUTE = "/v1/mounts"

# What the daemon's API calls the fields of a mount that may be given.
FIELDS = ("path", "uris", "readonly", "freshness_s", "prefetch", "options", "quota_bytes", "ttl_s", "replication")
# What the daemon's API calls an option of ours, where that differs.
_API_NAMES = {"freshness": "freshness_s", "quota": "quota_bytes", "ttl": "ttl_s"}

# Options that may be given as "none".
_LIMITS = ("quota", "ttl")

Command = TypeVar("Command", bound=Callable[..., Any])


def _settings(command: Command) -> Command:
    """Add the options that describe a mount."""
    for option in (
        click.option(
            "--option",
            "options",
            metavar="KEY=VALUE",
            multiple=True,
            help="An option of the store, e.g. endpoint_url=http://127.0.0.1:9000. Write '${VAR}' for a secret (in "
            "single quotes): the daemon reads that variable, and the secret shows in no process list.",
        ),
        click.option("--prefetch", type=click.Choice(["none", "readahead", "dataset"]), help="What is read ahead."),
        click.option(
            "--freshness",
            metavar="AGE",
            help='How old what is known of the store may be: "60s", "immutable", "strict".',
        ),
        click.option(
            "--quota", metavar="SIZE", help='The most of the cache that its files may take: 200GiB; "none": no limit.'
        ),
        click.option(
            "--ttl", metavar="AGE", help='What was not read for so long leaves the cache: 7d; "none": nothing.'
        ),
        click.option("--readonly/--writable", default=None, help="Whether writes are refused (default: readonly)."),
    ):
        command = option(command)
    return command


@click.group()
def mount() -> None:
    """Attach stores to the namespace."""


@mount.command()
@click.argument("path")
@click.argument("uris", metavar="URI...", nargs=-1, required=True)
@_settings
@pass_session
def add(session: Session, /, path: str, uris: tuple[str, ...], options: tuple[str, ...], **given: Any) -> None:
    """Attach the store at URI at PATH; more URIs name copies of the same data, tried in order."""
    table = _given(given) | {"path": path, "uris": list(uris), "options": parsed_options(options)}
    session.daemon_request("POST", ROUTE, to_wire(parse_mount(table)))
    warn_of_secrets(table["options"])


@mount.command("ls")
@click.option("--json", "as_json", is_flag=True, help="Print the mounts as JSON.")
@pass_session
def list_mounts(session: Session, as_json: bool) -> None:
    """List the mounts."""
    mounts = [_shown(table) for table in session.daemon_request("GET", ROUTE)["mounts"]]
    if as_json:
        print_json(mounts)
        return
    rows = [
        (
            table["path"],
            " ".join(table["uris"]),
            "readonly" if table["readonly"] else "writable",
            _freshness(table["freshness_s"]),
            table["source"],
            " ".join(f"{name}={value}" for name, value in sorted(table["options"].items())),
            table.get("error") or "",
        )
        for table in sorted(mounts, key=lambda table: str(table["path"]))
    ]
    print_table(("PATH", "STORE", "MODE", "FRESHNESS", "FROM", "OPTIONS", "ERROR"), rows)


@mount.command("rm")
@click.argument("path")
@pass_session
def remove(session: Session, path: str) -> None:
    """Detach the store at PATH; nothing in the store changes."""
    path = path.rstrip("/") or "/"
    session.daemon_request("DELETE", f"{ROUTE}?path={quote(path, errors='surrogateescape')}")


@mount.command()
@click.argument("path")
@click.argument("uris", metavar="[URI]...", nargs=-1)
@_settings
@click.option("--remove-option", "removed", metavar="KEY", multiple=True, help="Drop an option of the store.")
@pass_session
def update(
    session: Session,
    /,
    path: str,
    uris: tuple[str, ...],
    options: tuple[str, ...],
    removed: tuple[str, ...],
    **given: Any,
) -> None:
    """Change what is given of the mount at PATH, and keep the rest."""
    mounts = session.daemon_request("GET", ROUTE)["mounts"]
    path = path.rstrip("/") or "/"
    current = next((table for table in mounts if table["path"] == path), None)
    if current is None:
        raise NotFoundError(f"nothing is mounted at {path} (see: orchestra mount ls)")
    kept = {name: value for name, value in current["options"].items() if name not in removed}
    # What is given is checked as a mount of its own; only those fields then replace the current ones.
    table = _given(given) | {"path": path, "uris": list(uris) or current["uris"], "options": parsed_options(options)}
    checked = to_wire(parse_mount(table))
    changes = {name: checked[name] for name in _names(given)}  # None for a limit that is to be no more
    body = {name: current[name] for name in FIELDS if name in current} | changes
    body |= {"uris": checked["uris"], "options": kept | checked["options"]}
    session.daemon_request("PUT", ROUTE, body)
    warn_of_secrets(table["options"])


def _given(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that were given, as the configuration file has them: without a limit that is to be none."""
    given = {name: value for name, value in settings.items() if value is not None}
    return {name: value for name, value in given.items() if name not in _LIMITS or value != "none"}


def _names(settings: Mapping[str, Any]) -> set[str]:
    """Return the API's names of the settings that were given, also as "none"."""
    return {_API_NAMES.get(name, name) for name, value in settings.items() if value is not None}


def to_wire(mount: MountConfig) -> dict[str, Any]:
    """Return a mount as the daemon's API takes it."""
    return {
        "path": mount.path,
        "uris": list(mount.uris),
        "readonly": mount.readonly,
        # JSON has no infinity.
        "freshness_s": "immutable" if math.isinf(mount.freshness_s) else mount.freshness_s,
        "prefetch": mount.prefetch,
        "options": dict(mount.options),
        "quota_bytes": mount.quota_bytes,
        "ttl_s": mount.ttl_s,
    }


def parsed_options(options: tuple[str, ...]) -> dict[str, str]:
    """Read `--option KEY=VALUE`, given any number of times."""
    table = {}
    for option in options:
        name, equals, value = option.partition("=")
        if not name or not equals:
            # What stands there may be a secret whose name was forgotten, so it is not repeated.
            raise click.BadParameter("expected KEY=VALUE", param_hint="'--option'")
        table[name] = value
    return table


def warn_of_secrets(options: Mapping[str, str]) -> None:
    """Say of each secret that was typed as it is where others may have seen it, and what to write instead."""
    for name, value in options.items():
        if looks_secret(name, value):
            click.echo(
                f"orchestra: warning: option {printable(name)} holds the secret itself: the process list showed it, "
                "and the cache directory's mounts.json keeps it; better set a variable where the daemon is started "
                f"and write --option '{printable(name)}=${{VARIABLE}}'",
                err=True,
            )


def _freshness(value: str | float) -> str:
    return value if isinstance(value, str) else format_freshness(value)


def _shown(table: Mapping[str, Any]) -> dict[str, Any]:
    """Return the mount as it may be shown: no secret that was given inline."""
    options = {name: "***" if looks_secret(name, value) else value for name, value in table["options"].items()}
    return {**table, "uris": [uri_without_password(uri) for uri in table["uris"]], "options": options}
