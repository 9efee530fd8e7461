"""`orchestra daemon`: the node daemon's life from the command line.

Owns: what is printed. Leaves to others: running it (daemon.main), starting and asking it (client.process).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from orchestra.cli.output import print_fields, print_json
from orchestra.cli.session import Session, pass_session
from orchestra.config import Config
from orchestra.errors import ConfigError, DaemonUnavailableError
from orchestra.units import format_duration, format_size


@click.group()
def daemon() -> None:
    """Run, start, stop and ask the node daemon."""


@daemon.command()
@click.option("--autostarted", is_flag=True, hidden=True, help="Stop again when idle.")
@click.option("--ready-fd", type=int, hidden=True, help="Tell whoever holds the other end of this pipe.")
@pass_session
def run(session: Session, autostarted: bool, ready_fd: int | None) -> None:
    """Run the daemon in the foreground until it is told to stop."""
    config = session.config
    _warn_of_size(config)
    from orchestra.daemon.main import run as run_daemon

    run_daemon(config, autostarted=autostarted, ready_fd=ready_fd)


@daemon.command()
@click.option("--json", "as_json", is_flag=True, help="Print the daemon's status as JSON.")
@pass_session
def start(session: Session, as_json: bool) -> None:
    """Start the daemon in the background and wait until it answers."""
    config = session.config
    from orchestra.client.process import daemon_status, start_daemon

    status = daemon_status(config)
    word = "running already" if status is not None else "started"
    if status is None:
        _warn_of_size(config)
        status = start_daemon(config)
    else:
        _check_settings(config, status)
    if as_json:
        print_json(status)
    else:
        click.echo(f"{word} (pid {status['pid']}, socket {status['socket']})")


@daemon.command()
@pass_session
def stop(session: Session) -> None:
    """Stop the daemon; nothing to do if none runs."""
    from orchestra.client.process import stop_daemon

    click.echo("stopped" if stop_daemon(session.config) else "no daemon was running")


@daemon.command()
@click.option("--json", "as_json", is_flag=True, help="Print exact numbers as JSON.")
@pass_session
def status(session: Session, as_json: bool) -> None:
    """Show the running daemon; exit status 1 if none runs."""
    config = session.config
    from orchestra.client.process import daemon_status

    answer = daemon_status(config)
    if answer is None:
        raise DaemonUnavailableError(
            f"no daemon runs for the cache directory {config.cache.dir}; start it with: orchestra daemon start"
        )
    if as_json:
        print_json(answer)
    else:
        print_fields(status_fields(answer))


def _check_settings(config: Config, status: Mapping[str, Any]) -> None:
    """Raise ConfigError if the daemon that runs was started with other settings than these."""
    from orchestra.config_file import settings_of
    from orchestra.namespace.published import fingerprint

    source = str(config.source) if config.source is not None else None
    theirs = status.get("settings")
    if theirs is None:  # a daemon of an earlier version, which does not say
        return
    # It is one cache directory, whatever the two call it.
    names = [name for name, value in settings_of(config).items() if theirs.get(name) != value and name != "cache.dir"]
    if status["config"] != source and status["mounts_fingerprint"] != fingerprint(config.mounts):
        names.append("mount")
    if not names:
        return
    running = f"a daemon (pid {status['pid']}) runs already for the cache directory {status['cache_dir']}"
    if status["config"] == source:
        raise ConfigError(
            f"{running}, started before {', '.join(names)} changed (in {source or 'the defaults'} or an ORCHESTRA_ "
            "variable); to use what is said now: orchestra daemon stop, then orchestra daemon start"
        )
    ours, its = (path or "no configuration file" for path in (source, status["config"]))
    raise ConfigError(
        f"{running} with {its}, which differs from {ours} in {', '.join(names)}; run orchestra daemon stop first, or "
        "give one of the two another cache.dir"
    )


def status_fields(answer: dict[str, Any]) -> list[tuple[str, str]]:
    """Return what `daemon status` prints, line by line."""
    used, capacity = answer["used_bytes"], answer["capacity_bytes"]
    return [
        ("pid", str(answer["pid"])),
        ("version", str(answer["version"])),
        ("socket", str(answer["socket"])),
        ("cache directory", str(answer["cache_dir"])),
        ("configuration", str(answer.get("config") or "none: defaults and variables")),
        ("cached", f"{format_size(used)} of {format_size(capacity)}"),
        ("up for", format_duration(answer["uptime_s"])),
        *(
            ("hidden keys", f"{row['count']} in {row['mount']}, such as {row['example']}")
            for row in answer.get("hidden", ())
        ),
    ]


def _warn_of_size(config: Config) -> None:
    from orchestra.config_file import size_warning

    warning = size_warning(config)
    if warning is not None:
        click.echo(f"orchestra: warning: {warning}", err=True)
