"""Making a mount and handing it to a supervisor, which this process becomes.

Owns: the checks that come before a mount, and the order of them. Leaves to others: everything after.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from orchestra.client.contract import Client
from orchestra.errors import MountError
from orchestra.fuse import mount, registry, shared
from orchestra.fuse.names import root_entry
from orchestra.fuse.options import WORKERS_MAX, Mode, MountOptions
from orchestra.fuse.supervisor import Plan, clone_device, command_of

_CAP_SYS_ADMIN = 1 << 21


def launch(
    client: Client,
    folder: str,
    options: MountOptions,
    worker_command: Sequence[str],
    *,
    workers: int = 1,
    ready_fd: int | None = None,
    greeting: str | None = None,
    log_file: str | None = None,
) -> NoReturn:
    """Mount `folder` and become the supervisor of workers that `worker_command` starts.

    `ready_fd` is told how it went (background.py); `greeting` is printed when the folder answers. Raises MountError, or
    what the client says of the root, before anything is mounted.
    """
    root_entry(client, options.root)
    check_privilege(options)
    if not 1 <= workers <= WORKERS_MAX:
        raise MountError(f"a mount has 1 to {WORKERS_MAX} workers, not {workers}")
    target = mount.check_mount_point(folder, options.cache_dir)
    client.close()
    device_fd = mount.attach(target, options)
    try:
        mounted = mount.mount_at(target)
        if mounted is None:
            raise MountError(f"the mount on {target} is gone already")
        device_fds = (device_fd, *(clone_device(device_fd) for _ in range(workers - 1)))
        pid = os.getpid()
        record = {
            "folder": target,
            "path": options.root,
            "mode": options.mode.value,
            "pid": pid,
            "pid_start": registry.start_of_process(pid),
            "log": log_file,
        }
        plan = Plan(
            target=target,
            device=mounted.device,
            device_fds=device_fds,
            memory_fd=shared.create(),
            command=tuple(worker_command),
            record=record,
            read_ahead_kib=options.read_ahead_kib,
            ready_fd=ready_fd,
            greeting=greeting,
        )
        for fd in (*device_fds, plan.memory_fd, *(() if ready_fd is None else (ready_fd,))):
            os.set_inheritable(fd, True)
        os.execv(sys.executable, command_of(plan))
    except BaseException:
        mount.unmount(target, lazy=True)
        raise


def check_privilege(options: MountOptions) -> None:
    """Raise MountError if the mode needs a privilege that this process has not."""
    if options.mode is not Mode.PASSTHROUGH:
        return
    fields = dict(line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":\t" in line)
    if not int(fields["CapEff"], 16) & _CAP_SYS_ADMIN:
        raise MountError("mode passthrough needs CAP_SYS_ADMIN: mount as root, or use mode auto")
