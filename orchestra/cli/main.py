"""The command line's outermost frame: global options, which commands there are, how a run ends.

Owns: exit statuses (0; 1 a failure, in one line; 2 a wrong command line; 130 Ctrl-C; 141 the reader of a pipe left) and
what is printed then. Leaves to others: what each command does, one module per noun, imported when it is used.
"""

from __future__ import annotations

import errno
import importlib
import io
import os
import sys
from collections.abc import Sequence
from types import MappingProxyType

import click

from orchestra import __version__
from orchestra.cli.output import printable
from orchestra.cli.session import Session
from orchestra.config_keys import did_you_mean
from orchestra.errors import AccessDeniedError, OrchestraError, StoreError

STATUS_FAILED = 1
STATUS_USAGE = 2
STATUS_INTERRUPTED = 130
STATUS_BROKEN_PIPE = 141
# What any call says that would need a descriptor beyond the limit, and a limit that every command gets by with.
_USED_UP_ERRNOS = (errno.EMFILE, errno.ENFILE)
DESCRIPTORS_ENOUGH = 1024
# Where stores look for accounts and addresses if a mount's options name none.
_STORE_VARIABLES = ("AWS_", "AZURE_", "GOOGLE_")
# What standard output says when it cannot take more. Other files are written below commands that name them.
_OUTPUT_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)

# Command -> where it is defined, and its line in `orchestra --help`; the line is the first of the command's own help
# (a test compares them). Stated here so that neither --help nor `ls` imports what it does not run.
COMMANDS = MappingProxyType(
    {
        "cat": ("orchestra.cli.files:cat", "Write files to standard output."),
        "cp": ("orchestra.cli.copying:cp", "Copy a file, or a folder with -r, to this machine."),
        "daemon": ("orchestra.cli.daemon:daemon", "Run, start, stop and ask the node daemon."),
        "demo": ("orchestra.cli.demo:demo", "Train from a mounted S3 bucket, cold and warm, on this machine."),
        "du": ("orchestra.cli.files:du", "Show how many bytes a tree has, and how many of them are cached."),
        "free": ("orchestra.cli.cache:free", "Drop what is cached at and below PATH; the store keeps everything."),
        "fuse": ("orchestra.cli.fuse:fuse_group", "Mount the namespace as a folder."),
        "job": ("orchestra.cli.job:job", "List, watch and stop loads."),
        "load": ("orchestra.cli.load:load", "Bring the files at and below PATH into the cache."),
        "ls": ("orchestra.cli.files:ls", "List folders and files."),
        "mkdir": ("orchestra.cli.files:mkdir", "Make a folder (refused: this version only reads)."),
        "mount": ("orchestra.cli.mount:mount", "Attach stores to the namespace."),
        "node": ("orchestra.cli.node:node", "Show the nodes of the cluster; drain one."),
        "pin": (
            "orchestra.cli.cache:pin",
            "Keep what is cached below PATH, now and later; without PATH, list what is pinned.",
        ),
        "rm": ("orchestra.cli.files:rm", "Remove files (refused: this version only reads)."),
        "stalls": ("orchestra.cli.stalls:stalls", "Show what readers of this node waited for."),
        "stat": ("orchestra.cli.files:stat", "Show what is known about a path, and how much of it is cached."),
        "unpin": ("orchestra.cli.cache:unpin", "Let what is cached below PATH leave again when room is needed."),
    }
)


class LazyGroup(click.Group):
    """A group whose commands' modules are imported when they are used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(COMMANDS)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        # click looks for near misses among commands that are loaded already, and here none is.
        name = args[0]
        if name not in COMMANDS and not name.startswith("-"):
            ctx.fail(f"no such command '{name}'{did_you_mean(name, sorted(COMMANDS))}")
        return super().resolve_command(ctx, args)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, attribute = COMMANDS[cmd_name][0].split(":")
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command), f"{module}:{attribute} is not a command"
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, COMMANDS[name][1]) for name in sorted(COMMANDS)])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--config", "config_path", metavar="PATH", help="Read this orchestra.toml instead of looking for one.")
@click.option("--debug", is_flag=True, help="Show tracebacks and log everything to standard error.")
@click.version_option(__version__, message="orchestra %(version)s")
@click.pass_context
def cli(ctx: click.Context, config_path: str | None, debug: bool) -> None:
    """orchestra: object stores under one tree, cached on the training nodes."""
    session = ctx.ensure_object(Session)
    session.config_path = config_path
    session.debug = debug
    if debug:
        import logging

        logging.basicConfig(level=logging.DEBUG, stream=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (None: the process's own) and return its exit status."""
    if argv is None:
        _open_closed_streams()
    if argv is None and isinstance(sys.stdout, io.TextIOWrapper):
        # A name that the terminal's encoding lacks is shown escaped instead of failing.
        sys.stdout.reconfigure(errors="backslashreplace")
    session = Session()
    try:
        status = _run(list(sys.argv[1:] if argv is None else argv), session)
        sys.stdout.flush()
    except OrchestraError as error:
        return _fail(error.message + _unknown_to_daemon(error, session), session)
    except BrokenPipeError:
        return _end_quietly()
    except (KeyboardInterrupt, EOFError, click.Abort):
        return STATUS_INTERRUPTED
    except OSError as error:
        if error.errno in _USED_UP_ERRNOS:
            return _fail(f"{error.strerror}: raise the limit of this shell (ulimit -n {DESCRIPTORS_ENOUGH})", session)
        if error.filename is not None or error.errno not in _OUTPUT_ERRNOS:
            return _fail_unexpectedly(error, session)
        _fail(f"cannot write to standard output: {error.strerror}", session)
        _silence()
        return STATUS_FAILED
    except Exception as error:  # noqa: BLE001 the outermost frame: it reports, and there is nobody above to raise to
        return _fail_unexpectedly(error, session)
    finally:
        session.close()
    return status


def _run(arguments: list[str], session: Session) -> int:
    # Not click's own main(): that one swallows broken pipes and prints its own words for what is handled above.
    if "_ORCHESTRA_COMPLETE" in os.environ:
        cli.main(arguments, prog_name="orchestra")
    try:
        with cli.make_context("orchestra", arguments, obj=session) as ctx:
            cli.invoke(ctx)
            return 0
    except click.exceptions.Exit as end:
        return end.exit_code
    except click.ClickException as error:
        text = io.StringIO()
        error.show(file=text)
        sys.stderr.write(printable(text.getvalue(), keep="\n"))
        return error.exit_code


def _unknown_to_daemon(error: OrchestraError, session: Session) -> str:
    """Where a store refused us: which variables for stores this shell has, and the daemon, which asks them, has not."""
    if not isinstance(error, (AccessDeniedError, StoreError)):
        return ""
    from orchestra.client.process import daemon_environment

    theirs = daemon_environment(session.config)
    names = [name for name in os.environ if name.startswith(_STORE_VARIABLES) and theirs.get(name) != os.environ[name]]
    if not theirs or not names:
        return ""
    return (
        f" (the daemon was started without this shell's {', '.join(sorted(names))}: `orchestra daemon stop` ends it,"
        " and the next command starts it with them)"
    )


def _fail(message: str, session: Session) -> int:
    if session.debug:
        import traceback

        traceback.print_exc()
    try:
        print(f"orchestra: {printable(message)}", file=sys.stderr)
    except BrokenPipeError:
        return _end_quietly()
    return STATUS_FAILED


def _fail_unexpectedly(error: Exception, session: Session) -> int:
    kind = type(error).__name__
    hint = "" if session.debug else "; run it again with --debug and report what it shows"
    return _fail(f"unexpected {kind}: {error}; this is a bug{hint}", session)


def _open_closed_streams() -> None:
    """Open descriptors 0 to 2 on nothing where they came closed (`>&-`): else the next socket or file would get one,
    and what is printed would go there."""
    while (null := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(null, True)
        if null == 1:
            sys.stdout = os.fdopen(null, "w", closefd=False)
        elif null == 2:
            sys.stderr = os.fdopen(null, "w", closefd=False)
    os.close(null)


def _end_quietly() -> int:
    _silence()
    return STATUS_BROKEN_PIPE


def _silence() -> None:
    # The interpreter flushes stdout once more at exit; let that go nowhere instead of failing again.
    null = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            os.dup2(null, stream.fileno())
        except (OSError, ValueError):
            continue
    os.close(null)
