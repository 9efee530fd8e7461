"""`orchestra stalls`: what readers of this node waited for, also where the script says nothing.

Owns: what is printed. Leaves to others: counting (observe/stalls), the steps of a training (orchestra.torch.watch).
"""

from __future__ import annotations

from typing import Any

import click

from orchestra.cli.output import format_percent, print_fields, print_json, print_table
from orchestra.cli.session import Session, pass_session
from orchestra.observe.stalls import CAUSES, NodeFigures, Waits, node_advice
from orchestra.units import format_duration, format_size

_MINUTES_SHOWN = 10


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print exact numbers as JSON.")
@pass_session
def stalls(session: Session, as_json: bool) -> None:
    """Show what readers of this node waited for.

    Since the daemon started, by cause: store, peers (other nodes), disk, queue, look-ups. Seconds are added up over all
    readers: eight workers that wait one second each waited eight.
    """
    answer = session.daemon_request("GET", "/v1/stalls")
    figures = NodeFigures.from_json(answer["figures"])
    if as_json:
        print_json({**answer, "advice": node_advice(figures)})
        return
    print_fields(_fields(figures, answer["uptime_s"]))
    if figures.waits.total_s > 0:
        click.echo()
        print_table(("CAUSE", "WAITED", "SHARE"), _cause_rows(figures.waits))
    _print_minutes(answer["minutes"])
    _print_plans(answer["plans"])
    click.echo(f"\n{node_advice(figures)}")


def _fields(figures: NodeFigures, uptime_s: float) -> list[tuple[str, str]]:
    rate = figures.fetched_bytes / figures.store_busy_s if figures.store_busy_s else 0.0
    return [
        ("daemon up for", format_duration(uptime_s)),
        ("read", f"{format_size(figures.read_bytes)}, {format_size(figures.missed_bytes)} of it not here at once"),
        ("fetched", f"{format_size(figures.fetched_bytes)}, at {format_size(rate)}/s while it fetched"),
        ("waited", f"{format_duration(figures.waits.total_s)} for {figures.misses} fetches, over all readers"),
    ]


def _cause_rows(waits: Waits) -> list[tuple[str, str, str]]:
    rows = [(cause, getattr(waits, f"{cause}_s")) for cause in CAUSES]
    total_us = max(1, round(waits.total_s * 1e6))
    return [
        (cause, format_duration(seconds), format_percent(round(seconds * 1e6), total_us))
        for cause, seconds in sorted(rows, key=lambda row: -row[1])
        if seconds > 0
    ]


def _print_minutes(minutes: list[dict[str, Any]]) -> None:
    rows = []
    for minute in minutes[:_MINUTES_SHOWN]:
        waits = Waits(**minute["waits"])
        if waits.total_s > 0:
            ago = minute["minutes_ago"]
            when = f"{ago} min ago" if ago else "this minute"
            rows.append((when, format_duration(waits.total_s), waits.largest()))
    if rows:
        click.echo()
        print_table(("WHEN", "WAITED", "MOST FOR"), rows)


def _print_plans(plans: list[dict[str, Any]]) -> None:
    rows = [
        (
            plan["plan"],
            str(plan["epoch"]),
            f"{plan['position']} of {plan['epoch_samples']}",
            f"{plan['ahead_samples']} samples, {format_size(plan['ahead_bytes'])}",
            str(plan["failed"]),
        )
        for plan in plans
    ]
    if rows:
        click.echo()
        print_table(("PLAN", "PASS", "READ", "AHEAD", "FAILED"), rows)
