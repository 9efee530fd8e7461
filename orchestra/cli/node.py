"""`orchestra node`: the nodes of the cluster, and taking one out of service.

Owns: what is printed. Leaves to others: who is a node and what it does (daemon.nodes).
"""

from __future__ import annotations

import threading
from typing import Any

import click

from orchestra.cli.output import format_percent, print_json, print_table
from orchestra.cli.session import Session, pass_session
from orchestra.errors import OrchestraError
from orchestra.units import format_size

ROUTE = "/v1/nodes"
# Between two looks at a node that is drained.
_ROUND_S = 0.5
_json_option = click.option("--json", "as_json", is_flag=True, help="Print exact values as JSON.")


@click.group()
def node() -> None:
    """Show the nodes of the cluster; drain one."""


@node.command("ls")
@_json_option
@pass_session
def list_nodes(session: Session, as_json: bool) -> None:
    """List the nodes: their state, what they hold, and their share of the ring."""
    found = session.daemon_request("GET", ROUTE)
    if as_json:
        print_json(found)
        return
    rows = [
        (
            one["node_id"],
            one["address"],
            one["state"],
            _size(one["capacity_bytes"]),
            _size(one["used_bytes"]),
            f"{100 * one['share']:.1f} %",
            _note(one),
        )
        for one in found["nodes"]
    ]
    print_table(("NODE", "ADDRESS", "STATE", "CAPACITY", "USED", "SHARE", "NOTE"), rows)
    if found["source_error"]:
        click.echo(f"orchestra: warning: {found['source_error']}; the nodes are those known before", err=True)


@node.command()
@click.argument("name", metavar="[NODE]", required=False, default="")
@click.option("--wait", is_flag=True, help="Wait until everything is handed over.")
@pass_session
def drain(session: Session, name: str, wait: bool) -> None:
    """Take NODE (this one) off the ring, and hand what it holds over to those that own it then.

    Reads go on, at that node too. It stays drained when its daemon restarts, until `orchestra node undrain`.
    """
    told = session.daemon_request("POST", f"{ROUTE}/drain", {"node": name})
    row = _row_of(session, told["node_id"])
    while wait and row["state"] != "drained":
        if row["state"] not in ("draining", "up"):
            raise OrchestraError(f"node {row['node_id']} is {row['state']}: {row['note']}")
        threading.Event().wait(_ROUND_S)
        row = _row_of(session, told["node_id"])
    click.echo(
        f"node {row['node_id']}: {row['state'] if wait else 'draining'}; {row['note'] or 'see: orchestra node ls'}"
    )


@node.command()
@click.argument("name", metavar="[NODE]", required=False, default="")
@pass_session
def undrain(session: Session, name: str) -> None:
    """Let NODE (this one) own its share of the ring again."""
    told = session.daemon_request("POST", f"{ROUTE}/drain", {"node": name, "undo": True})
    click.echo(f"node {told['node_id']}: owns its share again")


def _row_of(session: Session, node_id: str) -> dict[str, Any]:
    nodes: list[dict[str, Any]] = session.daemon_request("GET", ROUTE)["nodes"]
    for one in nodes:
        if one["node_id"] == node_id:
            return one
    raise OrchestraError(f"node {node_id} is not in the cluster any more")


def _size(size_bytes: int | None) -> str:
    return "-" if size_bytes is None else format_size(size_bytes)


def _note(row: dict[str, Any]) -> str:
    copies = row["hot_copies"]
    notes = ["this node"] if row["is_self"] else []
    notes += [f"{copies} hot cop{'y' if copies == 1 else 'ies'}"] if copies else []
    return "; ".join([*notes, row["note"]] if row["note"] else notes)


def where_lines(nodes: list[dict[str, Any]], size_bytes: int) -> list[str]:
    """Return a line of what each node holds of a file of that size, those that hold or own something first."""
    lines = []
    for one in sorted(nodes, key=lambda one: (not one["held_bytes"] and not one["owns_bytes"], one["node_id"])):
        held = "does not answer" if one["error"] else format_percent(one["held_bytes"], size_bytes)
        owns = f", owns {format_percent(one['owns_bytes'], size_bytes)}" if one["owns_bytes"] else ""
        hot = f", {format_percent(one['hot_bytes'], size_bytes)} because it is read often" if one["hot_bytes"] else ""
        here = " (this node)" if one["is_self"] else ""
        lines.append(f"{one['node_id']}{here}: {held}{owns}{hot}")
    return lines
