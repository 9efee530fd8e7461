"""What every benchmark does alike: the origin's process, the state of the machine, fair turns, checks, the table.

Turns are interleaved, forwards and backwards (A B C, C B A, ...), so that a machine that slowly gets busier or warmer
treats all alike; a row shows the median of its turns. Every timed run must have read the right number of bytes, and
before any is timed the bytes themselves are checked. Owns: method and form. Leaves to others: who, and what.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import urllib.request
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from contestants import Contestant
from reader import Work
from synthetic import expected_bytes

from orchestra.units import GIB

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "RESULTS.md"
# Two cores: above this another process has half of one, and ratios move by more than what is claimed.
LOAD_MAX = 0.5


class OriginProcess:
    """The running origin and its knobs."""

    def __init__(self, process: subprocess.Popen[str], url: str) -> None:
        self.process = process
        self.url = url

    def call(self, target: str, method: str = "POST") -> dict[str, Any]:
        """Ask the origin's control interface."""
        request = urllib.request.Request(f"{self.url}{target}", method=method)
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30) as answer:
            return dict(json.load(answer))

    def set(self, **knobs: float | str) -> None:
        """Turn knobs."""
        self.call("/__set?" + "&".join(f"{name}={value}" for name, value in knobs.items()))


@contextmanager
def running_origin(*arguments: str, prefix: Sequence[str] = ()) -> Iterator[OriginProcess]:
    """Run the origin for as long as the block runs, where the command `prefix` puts it."""
    command = [*prefix, sys.executable, str(HERE / "origin.py"), *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield OriginProcess(process, process.stdout.readline().strip())
        finally:
            process.terminate()


@contextmanager
def workspace() -> Iterator[Path]:
    """Give a folder on the disk where caches usually lie, and remove it afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="orchestra-bench-", dir=os.environ.get("BENCH_DIR")))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def load_average() -> float:
    """Return the load of the last minute."""
    return os.getloadavg()[0]


def refuse_a_busy_machine(force: bool) -> None:
    """End with a sentence if something else is running, unless forced."""
    load = load_average()
    print(f"load average {load:.2f}", file=sys.stderr)
    if load > LOAD_MAX and not force:
        raise SystemExit(
            f"the load average is {load:.2f}, above {LOAD_MAX}: wait, or say --force and distrust the result"
        )


def drop_page_cache() -> None:
    """Empty the kernel's page cache; needs root, and says so when it cannot."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3\n")
    except PermissionError:
        print("the page cache could not be dropped: run as root", file=sys.stderr)


def version_of(*command: str) -> str:
    """Return the first version-like word that a command prints."""
    try:
        printed = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout
    except FileNotFoundError:
        return "not installed"
    words = [word.strip(",") for word in printed.split() if any(c.isdigit() for c in word)]
    return words[0] if words else "unknown"


def machine_state() -> str:
    """Return cores, memory, kernel and versions in one line."""
    packages = ("obstore", "s3fs", "fsspec", "aiohttp")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    peers = f"rclone {version_of('rclone', 'version')}, s3fs-fuse {version_of('s3fs', '--version')}"
    return (
        f"{os.cpu_count()} cores, {memory:.0f} GiB, Linux {platform.release()}, Python {platform.python_version()}, "
        f"{versions}, {peers}; load {load_average():.2f}"
    )


@dataclass(slots=True)
class Timings:
    """All turns of one contestant."""

    seconds: list[float] = field(default_factory=list)
    reader_cpu_s: list[float] = field(default_factory=list)
    serving_cpu_s: list[float] = field(default_factory=list)

    @property
    def median_s(self) -> float:
        """The median of the turns."""
        return statistics.median(self.seconds)


def check(contestant: Contestant, work: Work, answer: Mapping[str, Any]) -> None:
    """End with a sentence unless every object was read whole and, when `work.check`, byte for byte."""
    wanted = work.size * len(work.names)
    if answer["byte_count"] != wanted:
        raise SystemExit(f"{contestant.name} read {answer['byte_count']} bytes instead of {wanted}")
    if work.check:
        for name in work.names:
            if answer["crcs"][name] != crc_of(name, work.size):
                raise SystemExit(f"{contestant.name} read wrong bytes of {name}")


def crc_of(name: str, size: int) -> int:
    """Return the CRC-32 of a made-up object."""
    crc = 0
    for start in range(0, size, 1 << 22):
        crc = zlib.crc32(expected_bytes(name, start, min(size, start + (1 << 22))), crc)
    return crc


def take_turns(contestants: Sequence[Contestant], works: Sequence[Work], *, cold: bool) -> dict[str, Timings]:
    """Let every contestant do every work, one turn after the other, forwards and then backwards.

    With `cold` the page cache is emptied before each turn; `works` then name objects that nobody has read.
    """
    timings = {contestant.name: Timings() for contestant in contestants}
    for turn, work in enumerate(works):
        for contestant in contestants if turn % 2 == 0 else reversed(contestants):
            if cold:
                drop_page_cache()
            answer = contestant.read(work)
            check(contestant, work, answer)
            row = timings[contestant.name]
            row.seconds.append(answer["seconds"])
            row.reader_cpu_s.append(answer["cpu_s"])
            row.serving_cpu_s.append(answer["serving_cpu_s"])
            print(f"  {contestant.name}: {answer['seconds']:.3f} s", file=sys.stderr)
    return timings


def started(stack: ExitStack, contestants: Sequence[Contestant]) -> None:
    """Start every contestant; the stack closes it."""
    for contestant in contestants:
        contestant.start()
        stack.callback(contestant.close)


def rate_table(
    timings: Mapping[str, Timings],
    contestants: Sequence[Contestant],
    *,
    amount: float,
    unit: str,
    cpu_per: str,
    base: str,
    cold: bool = False,
) -> list[str]:
    """Return a Markdown table: rate, ratio to `base`, every turn, and CPU of reader and servers per `cpu_per`.

    `amount` is what one turn read, in the unit of the rate; CPU is per file in microseconds or per GiB in seconds.
    """
    base_rate = amount / timings[base].median_s
    factor, digits, per = (1e6, 0, amount) if cpu_per == "us/file" else (1.0, 2, amount / 1024)
    rows = [
        f"| | {unit} | of {base} | turns | CPU {cpu_per}: reader | serving | page cache |",
        "|---|---:|---:|---|---:|---:|---|",
    ]
    for contestant in contestants:
        row = timings[contestant.name]
        rate = amount / row.median_s
        turns = " ".join(f"{amount / seconds:.0f}" for seconds in row.seconds)
        reader_cpu, serving_cpu = (
            f"{statistics.median(cpu_s) * factor / per:.{digits}f}" for cpu_s in (row.reader_cpu_s, row.serving_cpu_s)
        )
        page_cache = "cold" if cold else contestant.page_cache
        cells = [contestant.name, f"{rate:.0f}", f"{rate / base_rate:.2f}", turns, reader_cpu, serving_cpu, page_cache]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def verdict(name: str, reached: float, target: float) -> str:
    """Return a line that says whether a figure was reached."""
    return f"- {name}: **{reached:.2f}** (wanted {target:g}) {'reached' if reached >= target else 'NOT REACHED'}"


def common_arguments(description: str) -> argparse.ArgumentParser:
    """Return a parser with the options that all benchmarks share."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="small, for seeing that it runs; never for figures")
    parser.add_argument("--force", action="store_true", help="run although the machine is busy")
    parser.add_argument("--record", action="store_true", help=f"append the result to {RESULTS.name}")
    parser.add_argument("--turns", type=int, default=4, help="per contestant (default: 4)")
    parser.add_argument(
        "--only", default="", metavar="WORDS", help="contestants whose names hold one of these, and the floor"
    )
    return parser


def chosen(contestants: Sequence[Contestant], only: str, always: Sequence[str]) -> list[Contestant]:
    """Return the contestants that --only names, and those that ratios need."""
    words = [word.strip() for word in only.split(",") if word.strip()]
    if not words:
        return list(contestants)
    return [c for c in contestants if c.name in always or any(word in c.name for word in words)]


def publish(title: str, lines: Sequence[str], options: argparse.Namespace, state: str) -> None:
    """Print a result, and append it to RESULTS.md when asked to."""
    when = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M")
    text = "\n".join([f"## {title}", "", f"{when}; {state}{'; --quick' if options.quick else ''}", "", *lines, ""])
    print(text)
    if options.record:
        before = RESULTS.read_text() if RESULTS.exists() else "# Results\n\nHow they were taken: README.md.\n"
        RESULTS.write_text(f"{before.rstrip()}\n\n{text}")
