"""`orchestra fuse`: the namespace as a folder.

Owns: options and what is printed. Leaves to others: mounting and serving (orchestra.fuse), the client (session).
"""

from __future__ import annotations

import logging
import os
import sys
from functools import partial

import click

from orchestra.cli.output import print_json, printable
from orchestra.cli.session import Session, pass_session
from orchestra.errors import MountError, OrchestraError, UsageError
from orchestra.fuse import background, mount, registry
from orchestra.fuse.options import DRAIN_S, READ_AHEAD_KIB, Mode, MountOptions
from orchestra.units import KIB, parse_duration_s, parse_size_bytes

# After unmounting the process has a moment's work; beyond this something holds it, and the user may as well know.
_ENDED_WITHIN_S = DRAIN_S + 5.0


class _Duration(click.ParamType[float]):
    name = "duration"

    def convert(self, value: str | float, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            return parse_duration_s(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class _Size(click.ParamType[int]):
    name = "size"

    def convert(self, value: str | int, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return parse_size_bytes(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


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
@click.option("--allow-other", is_flag=True, help="Let other users in (permissions are still checked).")
@click.option("--uid", type=click.IntRange(0, 2**32 - 2), default=None, help="Owner of all files.  [default: you]")
@click.option("--gid", type=click.IntRange(0, 2**32 - 2), default=None, help="Group of all files.  [default: yours]")
@click.option("--umask", type=_Octal(), default=0, help="Permissions to take away from 0555 and 0444.")
@click.option("--attr-timeout", type=_Duration(), help="How long the kernel may keep names; default: freshness.")
@click.option("--read-ahead", type=_Size(), help="How far the kernel reads ahead (root only).  [default: 2MiB]")
@click.option("--ready-fd", type=int, hidden=True)
@pass_session
def mount_command(
    session: Session,
    *,
    what: tuple[str, ...],
    foreground: bool,
    mode: str,
    allow_other: bool,
    uid: int | None,
    gid: int | None,
    umask: int,
    attr_timeout: float | None,
    read_ahead: int | None,
    ready_fd: int | None,
) -> None:
    """Show the namespace, or PATH of it, as FOLDER.

    Returns when the folder answers; the process that serves it goes on in the background, and writes its log to
    ~/.local/state/orchestra/fuse/. End it with `orchestra fuse umount FOLDER`.
    """
    root, folder = _split(what)
    options = MountOptions(
        root=root,
        mode=Mode(mode),
        uid=os.getuid() if uid is None else uid,
        gid=os.getgid() if gid is None else gid,
        umask=umask,
        allow_other=allow_other,
        attr_timeout_s=attr_timeout,
        read_ahead_kib=READ_AHEAD_KIB if read_ahead is None else read_ahead // KIB,
        cache_dir=session.config.cache.dir,
        # With autostart a miss starts the daemon itself, and what keeps it from starting will not go by itself.
        daemon_wait_s=0.0 if session.config.daemon.autostart else session.config.daemon.wait_s,
    )
    if foreground or ready_fd is not None:
        _serve(session, folder, options, ready_fd)
        return
    target = mount.resolve_folder(folder)
    log_file = registry.log_file_of(target)
    command = partial(_foreground_command, session, target, options)
    pid = background.start_in_background(command, log_file, _print_note)
    click.echo(f"mounted {printable(root)} on {printable(target)} (pid {pid}, log {printable(str(log_file))})")


def _split(what: tuple[str, ...]) -> tuple[str, str]:
    """Return (path in the namespace, folder)."""
    if len(what) > 2:
        raise click.UsageError("expected [PATH or URI] FOLDER")
    root, folder = what if len(what) == 2 else ("/", what[0])
    if "://" in root:
        # The hook for mounts without a configuration: attach the URI to the namespace of this process, then go on.
        raise UsageError(f"not yet: {root} must be attached first: orchestra mount add /NAME {root}")
    if not root.startswith("/"):
        raise UsageError(f"{root!r} is not a path of the namespace: it must begin with a slash")
    return root, folder


def _foreground_command(session: Session, target: str, options: MountOptions, ready_fd: int) -> list[str]:
    """Return the command line that serves such a mount in the foreground, wherever it is run."""
    command = [sys.executable, "-m", "orchestra", *(["--debug"] if session.debug else [])]
    if session.config.source is not None:
        command += ["--config", str(session.config.source.absolute())]
    command += ["fuse", "mount", "--ready-fd", str(ready_fd), "--mode", options.mode.value]
    command += ["--uid", str(options.uid), "--gid", str(options.gid), "--umask", f"{options.umask:o}"]
    if options.allow_other:
        command.append("--allow-other")
    if options.attr_timeout_s is not None:
        command += ["--attr-timeout", repr(options.attr_timeout_s)]
    command += ["--read-ahead", f"{options.read_ahead_kib}KiB"]
    return [*command, "--", options.root, target]


def _print_note(note: str) -> None:
    click.echo(f"orchestra: {printable(note)}", err=True)


def _serve(session: Session, folder: str, options: MountOptions, ready_fd: int | None) -> None:
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s")
    pipe = None if ready_fd is None else background.ReadyPipe(ready_fd)
    if pipe is not None:
        os.chdir("/")  # a background process must not keep a folder busy
        logging.getLogger().addHandler(pipe)
    target = mount.resolve_folder(folder)
    pid = os.getpid()
    log = None if pipe is None else str(registry.log_file_of(target))
    record = registry.MountRecord(target, options.root, options.mode.value, pid, registry.start_of_process(pid), log)

    def ready() -> None:
        registry.write_record(record)
        if pipe is not None:
            pipe.ready()
        else:
            click.echo(f"mounted {printable(options.root)} on {printable(target)} (pid {pid}); Ctrl-C unmounts it")

    from orchestra.fuse.serve import serve

    try:
        serve(session.client, target, options, ready)
    except OrchestraError as error:
        if pipe is not None:
            pipe.fail(error.message)
        raise
    finally:
        registry.remove_record(record)


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
        state = "dead" if mount.is_dead(known.folder) else "served by another user's process"
        return {"folder": known.folder, "state": state, "path": None, "mode": None, "pid": None, "log": None}
    return {
        "folder": known.folder,
        "state": "served",
        "path": record.path,
        "mode": record.mode,
        "pid": record.pid,
        "log": record.log,
    }
