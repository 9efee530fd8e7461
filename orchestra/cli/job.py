"""`orchestra job`: what loads there are, how far they are, waiting for them and stopping them.

Owns: how a job is printed, the progress line, what Ctrl-C does. Leaves to others: the jobs (daemon.jobs).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from datetime import datetime
from typing import Any
from urllib.parse import quote

import click

from orchestra.cli.output import format_percent, print_fields, print_json, print_lines, print_table, printable
from orchestra.cli.session import Session, pass_session
from orchestra.errors import OrchestraError
from orchestra.units import format_duration, format_size

_OVER = ("SUCCEEDED", "FAILED", "STOPPED")
# On a terminal the line is drawn anew twice a second; a log file gets one line in ten seconds.
_TERMINAL_INTERVAL_S = 0.5
_PLAIN_ROUNDS = 20
_json_option = click.option("--json", "as_json", is_flag=True, help="Print exact numbers as JSON.")


@click.group()
def job() -> None:
    """List, watch and stop loads."""


@job.command("ls")
@_json_option
@pass_session
def list_jobs(session: Session, as_json: bool) -> None:
    """List the jobs, oldest first."""
    jobs = session.daemon_request("GET", "/v1/jobs")["jobs"]
    if as_json:
        print_json(jobs)
        return
    rows = [
        (
            one["id"],
            one["state"],
            format_percent(one["bytes_done"], one["bytes_total"]),
            f"{one['files_done']}/{one['files_total']}",
            str(one["files_failed"]),
            datetime.fromtimestamp(one["created_s"]).strftime("%Y-%m-%d %H:%M"),
            one["path"],
        )
        for one in jobs
    ]
    print_table(("ID", "STATE", "DONE", "FILES", "FAILED", "STARTED", "PATH"), rows)


@job.command()
@click.argument("job_id", metavar="ID")
@_json_option
@pass_session
def status(session: Session, job_id: str, as_json: bool) -> None:
    """Show a job, and what failed in it and why."""
    found = _ask(session, job_id)
    if as_json:
        print_json(found)
    else:
        print_job(found)


@job.command()
@click.argument("job_id", metavar="ID")
@_json_option
@pass_session
def wait(session: Session, job_id: str, as_json: bool) -> None:
    """Wait for the end of a job; exit status 0 only if everything it was asked for is there."""
    found = follow(session, _ask(session, job_id), quiet=as_json)
    if as_json:
        print_json(found)
    else:
        print_job(found)
    if status_of(found):
        raise OrchestraError(f"job {found['id']} of {found['path']}: {found['state']}: {found['message']}")


@job.command()
@click.argument("job_id", metavar="ID")
@pass_session
def stop(session: Session, job_id: str) -> None:
    """Stop a job; what is cached stays."""
    found = session.daemon_request("POST", f"/v1/jobs/{quote(job_id, safe='')}/stop", {})
    click.echo(f"job {found['id']}: {found['state']}")


def status_of(found: dict[str, Any]) -> int:
    """Return the exit status that says how a job is: 0 unless it failed or was stopped."""
    return int(found["state"] in ("FAILED", "STOPPED"))


def wait_planned(session: Session, found: dict[str, Any], *, quiet: bool) -> dict[str, Any]:
    """Return the job when it is known what there is to do, or that it failed; as `follow` until then."""
    return follow(session, found, quiet=quiet, is_enough=lambda state: state != "CREATED", is_shown_at_once=False)


def follow(
    session: Session,
    found: dict[str, Any],
    *,
    quiet: bool,
    is_enough: Callable[[str], bool] = lambda state: state in _OVER,
    is_shown_at_once: bool = True,
) -> dict[str, Any]:
    """Return the job when its state is enough (it is over), with progress on standard error meanwhile. Ctrl-C leaves
    the job running."""
    is_terminal = sys.stderr.isatty()
    rounds = drawn = 0
    try:
        while not is_enough(found["state"]):
            if not quiet and (rounds or is_shown_at_once) and (is_terminal or rounds % _PLAIN_ROUNDS == 0):
                _draw(progress_line(found), is_terminal)
                drawn += 1
            rounds += 1
            found = _ask(session, found["id"], wait_s=_TERMINAL_INTERVAL_S)
    except KeyboardInterrupt:
        click.echo(f"\njob {found['id']} goes on; stop it with: orchestra job stop {found['id']}", err=True)
        raise
    if drawn and is_terminal:
        _draw(progress_line(found), is_terminal)
        click.echo("", err=True)
    return found


def progress_line(found: dict[str, Any]) -> str:
    """Return how far a job is, in one line."""
    if found["state"] == "CREATED":
        return f"looking at {printable(found['path'])}: {found['files_total']} files"
    if found["state"] == "VERIFYING":
        return f"verifying {printable(found['path'])}: {found['blocks_damaged']} damaged blocks"
    parts = [
        f"{format_percent(found['bytes_done'], found['bytes_total'])}",
        f"{found['files_done']}/{found['files_total']} files",
        f"{format_size(found['bytes_done'])} of {format_size(found['bytes_total'])}",
        f"{format_size(found['rate_bytes_per_s'])}/s",
    ]
    if found["eta_s"] is not None:
        parts.append(f"{format_duration(found['eta_s'])} left")
    if found["files_failed"]:
        parts.append(f"{found['files_failed']} failed")
    return f"{printable(found['path'])}: {', '.join(parts)}"


def print_job(found: dict[str, Any]) -> None:
    """Write all about a job to standard output."""
    fields = [
        ("job", found["id"]),
        ("path", found["path"]),
        ("state", found["state"]),
        ("files", f"{found['files_done']} of {found['files_total']}"),
        ("bytes", f"{format_size(found['bytes_done'])} of {format_size(found['bytes_total'])}"),
    ]
    if found["state"] not in _OVER:
        left = "" if found["eta_s"] is None else f", {format_duration(found['eta_s'])} left"
        fields.append(("rate", f"{format_size(found['rate_bytes_per_s'])}/s{left}"))
    if found["verify"]:
        fields.append(("damaged", f"{found['blocks_damaged']} blocks, fetched again"))
    if found["message"]:
        fields.append(("message", found["message"]))
    if found["files_failed"]:
        fields.append(("failed", f"{found['files_failed']} files"))
    print_fields(fields)
    print_lines(f"  {printable(one['path'])}: {printable(one['message'])}" for one in found["failures"])
    if found["files_failed"] > len(found["failures"]):
        print_lines([f"  ... and {found['files_failed'] - len(found['failures'])} more"])


def _draw(line: str, is_terminal: bool) -> None:
    # The line before is overwritten: carriage return, the new one, and what is left of the old one erased.
    click.echo(f"\r{line}\x1b[K" if is_terminal else line, err=True, nl=not is_terminal)


def _ask(session: Session, job_id: str, *, wait_s: float = 0) -> dict[str, Any]:
    query = f"?wait_s={wait_s}" if wait_s else ""
    return session.daemon_request("GET", f"/v1/jobs/{quote(job_id, safe='')}{query}")
