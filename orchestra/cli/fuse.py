"""`orchestra fuse`: the namespace as a folder.

Owns: options and what is printed. Leaves to others: mounting and serving (orchestra.fuse), the client (session).
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Mapping
from typing import Any

import click

from orchestra.cli.fuse_unit import unit_text, words_of_mount_options
from orchestra.cli.fuse_uri import attach_uri
from orchestra.cli.output import print_json, printable
from orchestra.cli.session import Session, pass_session
from orchestra.client.process import foreign_owner
from orchestra.config_mounts import uri_without_password
from orchestra.errors import MountError, OrchestraError, UsageError
from orchestra.fuse import background, mount, registry
from orchestra.fuse.options import DRAIN_S, READ_AHEAD_KIB, READ_AHEAD_KIB_MAX, WORKERS_MAX, Mode, MountOptions
from orchestra.units import KIB, parse_duration_s, parse_size_bytes

# After unmounting the process has a moment's work; beyond this something holds it, and the user may as well know.
_ENDED_WITHIN_S = DRAIN_S + 5.0
# Sixteen workers, each started anew on a busy machine.
_UPGRADED_WITHIN_S = 60.0


class _Duration(click.ParamType[float]):
    name = "duration"

    def convert(self, value: str | float, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            return parse_duration_s(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class _ReadAhead(click.ParamType[int]):
    name = "size"

    def convert(self, value: str | int, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            size_bytes = parse_size_bytes(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)
        if size_bytes > READ_AHEAD_KIB_MAX * KIB:
            self.fail(f"{value!r} is more than 1GiB, which each reader would have in memory", param, ctx)
        return size_bytes


class _Octal(click.ParamType[int]):
    name = "octal"

    def convert(self, value: str | int, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        try:
            number = int(value, 8)
        except ValueError:
            number = -1
        if not 0 <= number <= 0o777:
            self.fail(f"{value!r} is not three octal digits such as 022", param, ctx)
        return number


@click.group("fuse")
def fuse_group() -> None:
    """Mount the namespace as a folder."""


@fuse_group.command("mount")
@click.argument("what", metavar="[PATH or URI] FOLDER", nargs=-1, required=True)
@click.option("--foreground", "-f", is_flag=True, help="Serve in this process until it is ended.")
@click.option("--mode", type=click.Choice([mode.value for mode in Mode]), default=Mode.AUTO.value, show_default=True)
@click.option(
    "--workers", type=click.IntRange(1, WORKERS_MAX), default=1, show_default=True, help="Processes that serve."
)
@click.option("--allow-other", is_flag=True, help="Let other users in (permissions are still checked).")
@click.option("--uid", type=click.IntRange(0, 2**32 - 2), default=None, help="Owner of all files.  [default: you]")
@click.option("--gid", type=click.IntRange(0, 2**32 - 2), default=None, help="Group of all files.  [default: yours]")
@click.option("--umask", type=_Octal(), default=0, help="Permissions to take away from 0555 and 0444.")
@click.option("--attr-timeout", type=_Duration(), help="How long the kernel may keep names; default: freshness.")
@click.option("--entry-timeout", type=_Duration(), help="The same (a file's attributes belong to its version).")
@click.option("--read-ahead", type=_ReadAhead(), help="How far the kernel reads ahead (root only).  [default: 2MiB]")
@click.option(
    "--option",
    "store_options",
    metavar="KEY=VALUE",
    multiple=True,
    help="With a URI: an option of its store, e.g. endpoint_url=http://127.0.0.1:9000.",
)
@click.option("--freshness", metavar="AGE", help='With a URI: "60s", "immutable", "strict".')
@click.option("--systemd", is_flag=True, help="Mount nothing; print a systemd unit that does.")
@click.option("--source", hidden=True, help="What the mount is called in `df`.")
@click.option("--ready-fd", type=int, hidden=True)
@click.option("--worker-fd", type=int, hidden=True)
@pass_session
def mount_command(
    session: Session, /, what: tuple[str, ...], store_options: tuple[str, ...], freshness: str | None, **given: Any
) -> None:
    """Show the namespace, PATH of it, or the store at URI, as FOLDER.

    Returns when the folder answers; the processes that serve it go on in the background, and write their log to
    ~/.local/state/orchestra/fuse/. End them with `orchestra fuse umount FOLDER`.
    """
    root, folder = _split(what)
    is_uri = "://" in root
    if (store_options or freshness) and not is_uri:
        raise click.UsageError("--option and --freshness go with a URI; a path has those of its mount")
    if given["systemd"]:
        _print_unit(session, root, folder, _words(given) + _store_words(store_options, freshness))
        return
    if given["source"] is None:
        given["source"] = uri_without_password(root) if len(what) == 2 else "orchestra"
    if is_uri:
        root = attach_uri(session, root, store_options, freshness)
    options = _options(session, root, given)
    target = mount.resolve_folder(folder)
    if given["worker_fd"] is not None:
        _work(session, options, given["worker_fd"])
    elif given["foreground"] or given["ready_fd"] is not None:
        _serve(session, target, options, given)
    else:
        log_file = registry.log_file_of(target)
        pid = background.start_in_background(
            lambda ready_fd: _command(session, target, options, given, "--ready-fd", str(ready_fd)),
            log_file,
            _print_note,
        )
        click.echo(f"mounted {printable(root)} on {printable(target)} (pid {pid}, log {printable(str(log_file))})")


def _split(what: tuple[str, ...]) -> tuple[str, str]:
    """Return (path in the namespace or URI, folder)."""
    if len(what) > 2:
        raise click.UsageError("expected [PATH or URI] FOLDER")
    root, folder = what if len(what) == 2 else ("/", what[0])
    if not folder:  # the folder we are in would be taken
        raise UsageError("FOLDER is empty: say where to mount")
    if not root.startswith("/") and "://" not in root:
        raise UsageError(f"{root!r} is not a path of the namespace: it must begin with a slash")
    return root, folder


def _options(session: Session, root: str, given: Mapping[str, Any]) -> MountOptions:
    is_guest = foreign_owner(session.config.cache.dir) is not None
    timeouts = [given[name] for name in ("attr_timeout", "entry_timeout") if given[name] is not None]
    return MountOptions(
        root=root,
        source=given["source"],
        mode=Mode(given["mode"]),
        uid=os.getuid() if given["uid"] is None else given["uid"],
        gid=os.getgid() if given["gid"] is None else given["gid"],
        umask=given["umask"],
        allow_other=given["allow_other"],
        attr_timeout_s=min(timeouts) if timeouts else None,
        read_ahead_kib=READ_AHEAD_KIB if given["read_ahead"] is None else given["read_ahead"] // KIB,
        cache_dir=session.config.cache.dir,
        # With autostart a miss starts the daemon itself, and what keeps it from starting will not go by itself. Another
        # user's daemon is not ours to start.
        daemon_wait_s=0.0 if session.config.daemon.autostart and not is_guest else session.config.daemon.wait_s,
    )


def _program(session: Session) -> list[str]:
    """Return the beginning of every command line of ours, wherever it is run."""
    program = [sys.executable, "-m", "orchestra", *(["--debug"] if session.debug else [])]
    if session.config.source is not None:
        program += ["--config", str(session.config.source.absolute())]
    return program


def _command(session: Session, target: str, options: MountOptions, given: Mapping[str, Any], *how: str) -> list[str]:
    """Return the command line that serves such a mount; `how` says as what."""
    words = _words({**given, "uid": options.uid, "gid": options.gid})
    return [*_program(session), "fuse", "mount", *how, *words, "--source", options.source, "--", options.root, target]


def _words(given: Mapping[str, Any]) -> list[str]:
    """Return the options of the mount as they were given."""
    words = ["--mode", str(given["mode"])]
    if given["workers"] != 1:
        words += ["--workers", str(given["workers"])]
    for name in ("uid", "gid"):
        if given[name] is not None:
            words += [f"--{name}", str(given[name])]
    if given["umask"]:
        words += ["--umask", f"{given['umask']:o}"]
    if given["allow_other"]:
        words.append("--allow-other")
    for name in ("attr_timeout", "entry_timeout"):
        if given[name] is not None:
            words += [f"--{name.replace('_', '-')}", repr(given[name])]
    if given["read_ahead"] is not None:
        words += ["--read-ahead", str(given["read_ahead"])]
    return words


def _store_words(options: tuple[str, ...], freshness: str | None) -> list[str]:
    words = [word for option in options for word in ("--option", option)]
    return words + (["--freshness", freshness] if freshness else [])


def _print_unit(session: Session, root: str, folder: str, words: list[str]) -> None:
    target = mount.resolve_folder(folder)
    command = [*_program(session), "fuse", "mount", "--foreground", *words, "--", root, target]
    click.echo(unit_text(command, target, root, os.environ), nl=False)


def _print_note(note: str) -> None:
    click.echo(f"orchestra: {printable(note)}", err=True)


def _serve(session: Session, target: str, options: MountOptions, given: Mapping[str, Any]) -> None:
    """Become the supervisor of the mount."""
    _log_to_stderr()
    ready_fd = given["ready_fd"]
    pipe = None if ready_fd is None else background.ReadyPipe(ready_fd)
    if pipe is not None:
        os.chdir("/")  # a background process must not keep a folder busy
        logging.getLogger().addHandler(pipe)
    greeting = f"mounted {printable(options.root)} on {printable(target)} (pid {os.getpid()}); Ctrl-C unmounts it"

    from orchestra.fuse.children import CONTROL
    from orchestra.fuse.launch import launch

    try:
        launch(
            session.client,
            target,
            options,
            _command(session, target, options, given, "--worker-fd", CONTROL),
            workers=given["workers"],
            ready_fd=ready_fd,
            greeting=greeting if pipe is None else None,
            log_file=None if pipe is None else str(registry.log_file_of(target)),
        )
    except OrchestraError as error:
        if pipe is not None:
            pipe.fail(error.message)
        raise


def _work(session: Session, options: MountOptions, control_fd: int) -> None:
    """Be one of the mount's workers."""
    _log_to_stderr()
    from orchestra.fuse.worker import serve_slot

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the supervisor, which then ends us
    serve_slot(session.client, options, control_fd)


def _log_to_stderr() -> None:
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s")


@fuse_group.command("helper", hidden=True)
@click.argument("source")
@click.argument("folder")
@click.option("-o", "options", default="", help="Options as in /etc/fstab, with commas between.")
@click.option("-s", "_sloppy", is_flag=True)
@click.option("-n", "_no_mtab", is_flag=True)
@click.option("-v", "_verbose", is_flag=True)
@click.option("-f", "fake", is_flag=True)
@click.pass_context
def helper_command(ctx: click.Context, /, source: str, folder: str, options: str, fake: bool, **_ignored: bool) -> None:
    """Mount as mount(8) asks: what /sbin/mount.orchestra runs, see docs/fuse.md."""
    session = ctx.find_object(Session)
    assert session is not None, "the outermost frame makes one"
    config, words = words_of_mount_options(options)
    if config is not None:
        session.config_path = config
    if fake:
        return
    root = "/" if source in ("orchestra", "none") else source
    words += ["--source", uri_without_password(source), "--", root, folder]
    ctx.invoke(mount_command, **mount_command.make_context("mount", words, parent=ctx).params)


@fuse_group.command("upgrade")
@click.argument("folder")
def upgrade_command(folder: str) -> None:
    """Exchange the processes that serve FOLDER for those of the program installed now; open files go on."""
    target = mount.resolve_folder(folder)
    record = registry.record_of(target)
    if record is None or not record.workers:
        raise MountError(f"no supervisor of a mount on {target} is known: mount it anew")
    with registry.opened_pids(record.workers) as pidfds:
        try:
            os.kill(record.pid, signal.SIGHUP)
        except PermissionError:
            raise MountError(f"{target} is held by a process of another user, who alone can upgrade it") from None
        if not registry.wait_all_ended(pidfds, _UPGRADED_WITHIN_S):
            raise MountError(f"the workers of {target} were not exchanged; its log says why: {record.log}")
    click.echo(f"upgraded {printable(target)}")


@fuse_group.command("umount")
@click.argument("folder")
@click.option("--lazy", is_flag=True, help="Detach it even while files are open on it.")
def umount_command(folder: str, lazy: bool) -> None:
    """Unmount FOLDER and end its process."""
    target = mount.resolve_folder(folder)
    mounted = mount.mount_at(target)
    if mounted is None:
        raise MountError(f"nothing is mounted on {target}")
    if mounted.fstype != mount.FSTYPE:
        raise MountError(f"{target} is a mount of type {mounted.fstype}, not one of orchestra's: use umount {target}")
    record = registry.record_of(target)
    mount.unmount(target, lazy=lazy)
    if record is not None and not lazy and not registry.wait_ended(record, _ENDED_WITHIN_S):
        click.echo(f"orchestra: unmounted, but its process {record.pid} has not ended yet", err=True)
    click.echo(f"unmounted {printable(target)}")


@fuse_group.command("ls")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list.")
def ls_command(as_json: bool) -> None:
    """List the mounts of orchestra on this machine."""
    rows = [_row_of(known) for known in registry.known_mounts()]
    if as_json:
        print_json(rows)
        return
    for row in rows:
        served = f"{row['path']} ({row['mode']}, pid {row['pid']})" if row["pid"] else str(row["state"])
        click.echo(f"{printable(str(row['folder']))}  {printable(served)}")


def _row_of(known: registry.KnownMount) -> dict[str, object]:
    record = known.record
    if record is None:
        # Only a mount without a known process is asked, since a living one that hangs would hang us too.
        state = "dead" if mount.is_dead(known.folder) else f"served, but {_why_unknown(known.user_id)}"
        return {
            "folder": known.folder,
            "state": state,
            "path": None,
            "mode": None,
            "pid": None,
            "workers": None,
            "log": None,
        }
    return {
        "folder": known.folder,
        "state": "served",
        "path": record.path,
        "mode": record.mode,
        "pid": record.pid,
        "workers": record.workers,
        "log": record.log,
    }


def _why_unknown(user_id: int | None) -> str:
    """Why there is no record of a living mount."""
    if user_id is not None and user_id != os.getuid():
        return f"by a process of user id {user_id}, who has its record"
    return f"its process left no record in {registry.state_folder()}: it was started with another state folder"
