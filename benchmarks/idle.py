"""What does orchestra cost while it does nothing? The daemon's memory with many known files; what importing takes.

    python benchmarks/idle.py [--quick] [--record]

Known means listed: the names, sizes and versions of 100,000 objects in a thousand folders. Each figure is the least of
several (of times, noise only adds; of memory, the state after the listing is what stays).
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import psutil
from common import common_arguments, machine_state, publish, refuse_a_busy_machine, running_origin, started, workspace
from contestants import OrchestraMount, OrchestraNode

from orchestra.units import MIB

FILE_COUNT = 100_000
FILE_SIZE = 1000
IMPORT_TRIES = 10


def import_seconds(module: str) -> float:
    """Return the least time that `import module` took in a fresh interpreter, without the interpreter's own start."""
    program = f"import time; began = time.perf_counter(); import {module}; print(time.perf_counter() - began)"
    tries = [
        float(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout)
        for _ in range(IMPORT_TRIES)
    ]
    return min(tries)


def process_mib(pid: int) -> tuple[float, float]:
    """Return resident and unshared memory of a process in MiB."""
    memory = psutil.Process(pid).memory_full_info()
    return memory.rss / MIB, memory.uss / MIB


def memory_lines(folder: Path, url: str, count: int) -> list[str]:
    """List everything through daemon and mount, and say what each then holds."""
    node: OrchestraNode = OrchestraMount(folder, url)
    with ExitStack() as stack:
        started(stack, [node])
        assert isinstance(node, OrchestraMount)
        fresh = process_mib(node.daemon_pid)[0]
        began = time.perf_counter()
        found = subprocess.run(
            ["find", str(node.mountpoint), "-type", "f", "-size", f"{FILE_SIZE}c"], capture_output=True, check=True
        ).stdout.count(b"\n")
        seconds = time.perf_counter() - began
        if found != count:
            raise SystemExit(f"found {found} files instead of {count}")
        status = json.loads(node.orchestra("daemon", "status", "--json"))
        daemon_rss, daemon_uss = process_mib(node.daemon_pid)
        mount_rss, mount_uss = process_mib(node.mount_pid)
    return [
        f"- daemon: {daemon_rss:.0f} MiB resident, {daemon_uss:.0f} unshared, with {count} known files "
        f"(right after its start: {fresh:.0f}; wanted: under 150)",
        f"- mount: {mount_rss:.0f} MiB resident, {mount_uss:.0f} unshared",
        f"- find over all of them, cold: {seconds:.2f} s; reads counted by the daemon: {status['reads']['hits']} hits",
    ]


def main() -> None:
    """Measure, and publish."""
    options = common_arguments("Memory and import time.").parse_args()
    refuse_a_busy_machine(options.force or options.quick)
    state = machine_state()
    count = 2000 if options.quick else FILE_COUNT
    with workspace() as folder, running_origin("--dataset", f"known:{count}x{FILE_SIZE}") as origin:
        lines = memory_lines(folder, origin.url, count)
        stats = origin.call("/__stats", "GET")
    lines.append(f"- requests to the store for it: {stats['requests']}")
    for module in ("orchestra", "orchestra.client.connect", "orchestra.filesystem", "orchestra.cli.main"):
        lines.append(f"- import {module}: {import_seconds(module) * 1000:.0f} ms")
    lines.append("- wanted: import orchestra under 150 ms")
    publish("Idle: memory and import", lines, options, state)


if __name__ == "__main__":
    main()
