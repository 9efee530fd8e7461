"""The daemon as a process: started in the background, asked, stopped."""

from __future__ import annotations

import fcntl
import json
import os
import select
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from orchestra.blocks.layout import CacheLayout
from orchestra.client.wire import ConnectionLostError, DaemonConnection
from orchestra.config import Config
from orchestra.errors import AccessDeniedError, CacheDirectoryError, DaemonUnavailableError, from_wire

# Opening a cache of millions of extents after a crash takes some seconds; a daemon that needs longer is stuck.
START_TIMEOUT_S = 60.0
# A daemon that is killed while it starts is started again. One that cannot live says why, and is not.
_STARTS_MAX = 6
# What is asked for here is answered in a millisecond; a daemon that lets somebody wait so long is stopped or stuck.
_STATUS_TIMEOUT_S = 5.0
# glibc gives buffers of blocks back to the kernel as soon as they are freed, and the next block faults its pages in
# again: a tenth of the daemon's CPU on cold small files. It may keep 64 MiB instead.
_ALLOCATOR = {"MALLOC_TRIM_THRESHOLD_": "67108864", "MALLOC_MMAP_THRESHOLD_": "16777216"}


def foreign_owner(root: Path) -> int | None:
    """Return the uid of another user whose cache directory `root` is, None if it is ours or not there. Root is at home
    in every one."""
    if os.geteuid() == 0:
        return None
    try:
        uid = root.stat().st_uid
    except OSError:
        return None
    return None if uid == os.geteuid() else uid


def _refuse_guest(config: Config) -> None:
    """Raise AccessDeniedError where the daemon is another user's."""
    uid = foreign_owner(config.cache.dir)
    if uid is not None:
        raise AccessDeniedError(
            f"cache.dir {config.cache.dir} belongs to uid {uid}, who alone may ask, start and stop its daemon; other "
            "users may read if daemon.readers names them"
        )


def daemon_status(config: Config) -> dict[str, Any] | None:
    """Return the daemon's status, None if none runs. Raises DaemonUnavailableError for one that does not answer."""
    try:
        return _ask(config, "GET", "/v1/status")
    except ConnectionLostError:
        return None


def start_daemon(config: Config, *, autostarted: bool = False) -> dict[str, Any]:
    """Start the daemon in the background unless one runs; return its status once it answers.

    Many processes may call this at one moment: one starts it, the others wait. Raises what kept it from starting.
    """
    _refuse_guest(config)
    with _one_starter(config):
        for _ in range(_STARTS_MAX):
            status = daemon_status(config)
            if status is not None:
                return status
            _wait_until_free(config)
            _spawn(config, autostarted=autostarted)
        status = daemon_status(config)
    if status is None:
        raise DaemonUnavailableError(
            f"the daemon was started {_STARTS_MAX} times and ended each time before it could say anything: unless "
            f"somebody killed it, `orchestra daemon run` shows why; see also {_layout(config).log}"
        )
    return status


def stop_daemon(config: Config) -> bool:
    """Stop the daemon and wait until its cache directory is free; False if none ran."""
    try:
        _ask(config, "POST", "/v1/stop", {})
    except ConnectionLostError:
        return False
    _wait_until_free(config)
    return True


def _layout(config: Config) -> CacheLayout:
    return CacheLayout(config.cache.dir)


def _ask(config: Config, method: str, route: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    _refuse_guest(config)
    connection = DaemonConnection(str(_layout(config).socket), timeout_s=_STATUS_TIMEOUT_S)
    try:
        return connection.request(method, route, body)
    except DaemonUnavailableError as error:
        if isinstance(error.__cause__, TimeoutError):
            raise DaemonUnavailableError(_why_silent(config)) from error
        raise
    finally:
        connection.close()


def _why_silent(config: Config) -> str:
    """Return the sentence about a daemon that took a connection and does not answer."""
    pid = _owner_pid(config)
    who = f"the daemon of cache.dir {config.cache.dir}" + (f" (pid {pid})" if pid else "")
    said = f"{who} runs, but did not answer within {_STATUS_TIMEOUT_S:.0f} s"
    if not pid:
        return f"{said}; see {_layout(config).log}"
    end = f"kill -9 {pid} ends it (what is cached stays, and the next command starts another)"
    if _is_stopped(pid):
        return f"{said}: it was stopped by a signal; kill -CONT {pid} lets it go on, {end}"
    return f"{said}: it is stuck, or the machine is overloaded; see {_layout(config).log}; {end}"


def _owner_pid(config: Config) -> int | None:
    """Return the pid that the holder of the owner lock wrote, None if it cannot be read."""
    try:
        return int(json.loads(_layout(config).lock.read_bytes())["pid"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def daemon_environment(config: Config) -> dict[str, str]:
    """Return the variables that the running daemon was started with; none where there is none, or not ours."""
    try:
        text = Path(f"/proc/{_owner_pid(config) or 0}/environ").read_bytes()
    except OSError:
        return {}
    pairs = (item.partition("=") for item in os.fsdecode(text).split("\0"))
    return {name: value for name, equals, value in pairs if equals}


def _is_stopped(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0]
    except (OSError, IndexError):
        return False
    return state in (b"T", b"t")


@contextmanager
def _one_starter(config: Config) -> Iterator[None]:
    """Hold a lock on the cache directory itself: it needs no file, and nothing else locks it."""
    root = config.cache.dir
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileExistsError as error:
        raise CacheDirectoryError(f"cache.dir {root} is a file, not a directory") from error
    except OSError as error:
        raise CacheDirectoryError(f"cache.dir {root} cannot be used: {error.strerror}") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _wait_until_free(config: Config) -> None:
    """Return when no daemon owns the cache directory: one that answers no more may still be writing its books."""
    lock = _layout(config).lock
    if lock.exists():
        with lock.open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)


def _spawn(config: Config, *, autostarted: bool) -> None:
    """Start `orchestra daemon run` without a parent, and wait until it says that it is ready, or is gone.

    Raises what it says keeps it from starting.
    """
    ready, their_end = os.pipe()
    command = [sys.executable, "-m", "orchestra"]
    if config.source is not None:
        command += ["--config", str(Path(config.source).resolve())]
    command += ["daemon", "run", "--ready-fd", str(their_end)]
    if autostarted:
        command.append("--autostarted")
    try:
        # Through a shell that exits at once: the daemon is nobody's child, so nobody must wait for it.
        subprocess.run(
            ["/bin/sh", "-c", '"$@" </dev/null >/dev/null 2>&1 &', "sh", *command],
            check=True,
            pass_fds=(their_end,),
            start_new_session=True,
            cwd="/",
            env={**_ALLOCATOR, **os.environ},
        )
    finally:
        os.close(their_end)
    with os.fdopen(ready, "rb") as pipe:
        if not select.select([pipe], [], [], START_TIMEOUT_S)[0]:
            raise DaemonUnavailableError(
                f"the daemon did not get ready within {START_TIMEOUT_S:.0f} s; see {_layout(config).log}"
            )
        message = pipe.read()
    if not message:  # killed before it could say anything: whoever needs one tries again
        return
    answer = json.loads(message)
    if "code" in answer:
        raise from_wire(answer)
