"""`orchestra load`: bring files into the cache before they are read.

Owns: the options, the question when it does not fit, the exit status. Leaves to others: doing it (daemon.jobs), telling
of jobs (cli.job).
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import click

from orchestra.cli.job import follow, print_job, status_of, wait_planned
from orchestra.cli.output import print_json
from orchestra.cli.session import Session, pass_session
from orchestra.config_cluster import REPLICAS_MAX
from orchestra.errors import OrchestraError
from orchestra.units import format_size, parse_size_bytes


@click.command()
@click.argument("path")
@click.option("--wait", is_flag=True, help="Wait for the end; exit status 0 only if everything is there.")
@click.option("--verify", is_flag=True, help="Compare what is cached with its checksums; fetch again what differs.")
@click.option("--bandwidth", metavar="RATE", help='Take at most so much of the link, e.g. "200MiB/s".')
@click.option("--list", "list_file", metavar="FILE", help="Load only these: a path a line, below PATH; - for stdin.")
@click.option("--partial", is_flag=True, help="If not everything fits, load as much as does.")
@click.option("--retry", is_flag=True, help="Load only what failed in the last load of PATH.")
@click.option("--replicas", type=click.IntRange(1, REPLICAS_MAX), help="Nodes that hold each extent, in a cluster.")
@click.option("--json", "as_json", is_flag=True, help="Print the job as JSON.")
@pass_session
def load(session: Session, /, path: str, wait: bool, as_json: bool, list_file: str | None, **options: Any) -> None:
    """Bring the files at and below PATH into the cache.

    A job of the daemon does it. Without --wait this returns as soon as it is known that everything fits; with it,
    Ctrl-C leaves the job running. A load that was interrupted, or is started twice, fetches nothing twice.
    """
    if options["retry"] and list_file is not None:
        raise click.UsageError("--retry loads what failed the last time, --list what the list names: give one of them")
    body = {
        "path": path,
        "verify": options["verify"],
        "partial": options["partial"],
        "retry": options["retry"],
        "bandwidth_bytes_per_s": _rate(options["bandwidth"]),
        "replicas": options["replicas"] or 0,
    }
    with _listed(list_file) as listed:
        job = _submit(session, body | listed, quiet=as_json)
        if _does_not_fit(job) and not as_json and _says_yes(job):
            job = _submit(session, {**body, **listed, "partial": True}, quiet=as_json)
    if wait:
        job = follow(session, job, quiet=as_json)
    if as_json:
        print_json(job)
    elif not wait and job["state"] in ("CREATED", "RUNNING", "VERIFYING"):
        files, size = job["files_total"], format_size(job["bytes_total"])
        click.echo(f"job {job['id']}: loading {files} files, {size}; see: orchestra job status {job['id']}")
    elif job["state"] != "FAILED":
        print_job(job)
    if status_of(job):
        raise OrchestraError(f"load of {path}: {job['message']}{_advice(job)}")


def _submit(session: Session, body: dict[str, Any], *, quiet: bool) -> dict[str, Any]:
    return wait_planned(session, session.daemon_request("POST", "/v1/jobs", body), quiet=quiet)


@contextmanager
def _listed(list_file: str | None) -> Iterator[dict[str, str]]:
    """Give what names the list to the daemon, which copies it. What only this process can read goes through a file:
    standard input, pipes, and whatever /dev/fd/63 is here."""
    if list_file is None:
        yield {}
    elif list_file != "-" and not _is_own(Path(list_file)):
        yield {"list_file": str(Path(list_file).absolute())}
    else:
        with tempfile.NamedTemporaryFile("wb", prefix="orchestra-load-") as copy, ExitStack() as opened:
            try:
                lines = sys.stdin.buffer if list_file == "-" else opened.enter_context(Path(list_file).open("rb"))
                shutil.copyfileobj(lines, copy)
            except OSError as error:
                raise OrchestraError(f"the list {list_file} cannot be read: {error.strerror}") from error
            copy.flush()
            yield {"list_file": copy.name}


def _is_own(list_file: Path) -> bool:
    """Whether a file of that name is another one, or none, in another process."""
    is_special = list_file.exists() and not list_file.is_file() and not list_file.is_dir()
    return is_special or Path(os.path.realpath(list_file.parent)).parts[:2] in (("/", "proc"), ("/", "dev"))


def _does_not_fit(job: dict[str, Any]) -> bool:
    return job["state"] == "FAILED" and job["reason"] == "space" and not job["files_done"]


def _says_yes(job: dict[str, Any]) -> bool:
    """Ask whoever sits there; nobody does in a script."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    return click.confirm(f"{job['message']}. Load as much as fits?", err=True)


def _advice(job: dict[str, Any]) -> str:
    if _does_not_fit(job):
        return " (--partial loads as much as fits)"
    if job["reason"] == "files":
        return f" (all: orchestra job status {job['id']}; again: orchestra load --retry {job['path']})"
    return ""


def _rate(text: str | None) -> int:
    """Return the bytes per second of "200MiB/s" (or "200MiB"), 0 for none given."""
    if text is None:
        return 0
    try:
        rate = parse_size_bytes(text.strip().removesuffix("/s"))
    except ValueError as error:
        raise click.BadParameter(f"{error}, per second: 200MiB/s", param_hint="'--bandwidth'") from error
    if not rate:
        raise click.BadParameter("a rate of nothing would load nothing", param_hint="'--bandwidth'")
    return rate
