"""A real mount for other people's tests, and the judgement of what came of them.

Owns: `Site` (a folder as under store, a daemon, `orchestra fuse mount`, all through the command line), `run_suite` (a
suite's own tests in a child process whose writes go to the store, see write_behind.c), and the rule of
known_failures.txt: every failure is written there with its reason, and whatever is written there must fail.
Leaves to others: the tests themselves (child.py runs them), and which ones are run (test_*.py).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from orchestra.fuse.mount import mount_at, unmount

HERE = Path(__file__).parent
KNOWN_FAILURES = HERE / "known_failures.txt"
# A suite that takes longer hangs.
SUITE_TIMEOUT_S = 400.0


@dataclass(frozen=True, slots=True)
class Site:
    """What lies in `store` is seen on `mount`, and at `/data` by the clients of `config`."""

    root: Path

    @property
    def store(self) -> Path:
        return self.root / "store"

    @property
    def mount(self) -> Path:
        return self.root / "mount"

    @property
    def config(self) -> Path:
        return self.root / "orchestra.toml"

    @property
    def environment(self) -> dict[str, str]:
        """The environment without the caller's settings of orchestra, and with a state of its own."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("ORCHESTRA_")}
        return kept | {"XDG_STATE_HOME": str(self.root / "state"), "HOME": str(self.root)}

    def run(self, *words: str | Path) -> None:
        """Run an orchestra command, which must succeed."""
        command = [sys.executable, "-m", "orchestra", "--config", str(self.config), *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, env=self.environment, timeout=60)
        assert done.returncode == 0, done.stderr


@contextmanager
def mounted_site(root: Path) -> Iterator[Site]:
    """A site whose mount asks the store at every open, so that what was just written there is what is read."""
    site = Site(root)
    site.store.mkdir()
    site.mount.mkdir()
    site.config.write_text(
        f'[cache]\ndir = "{root}/cache"\nsize = "2GiB"\nfree_space_ratio = 0\n'
        f'[[mount]]\npath = "/data"\nuri = "file://{site.store}"\nfreshness = "strict"\n'
    )
    try:
        site.run("fuse", "mount", "/data", site.mount)
        yield site
    finally:
        if mount_at(str(site.mount)) is not None:
            unmount(str(site.mount), lazy=True)
        site.run("daemon", "stop")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one test: "passed", "failed" or "skipped"; how many opens went through the mount; the error."""

    result: str
    opens: int
    detail: str


def run_suite(site: Site, library: Path, kind: str, names: Sequence[str], *, left_out: str = "") -> dict[str, Outcome]:
    """Run tests (see child.py) in a folder of the mount, with `library` sending their writes to the store."""
    work = f"work-{len(os.listdir(site.store))}"
    # A store has no empty folders: one that holds nothing cannot be entered.
    (site.store / work / "keep").mkdir(parents=True)
    (site.store / work / "keep" / "file").touch()
    report, count = site.root / f"{work}.json", site.root / f"{work}.count"
    count.write_bytes(bytes(8))
    folder = str(site.mount / work)
    environment = site.environment | {
        "LD_PRELOAD": str(library),
        "WRITE_BEHIND_MOUNT": str(site.mount),
        "WRITE_BEHIND_STORE": str(site.store),
        "WRITE_BEHIND_COUNT": str(count),
        "TMPDIR": folder,
        "SUITE_ROOT": str(site.root),
        "PYTHONPATH": str(HERE.parents[1]),
    }
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    done = subprocess.run(
        [sys.executable, str(HERE / "child.py"), kind, str(report), left_out, *names],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environment,
        cwd=folder,
        timeout=SUITE_TIMEOUT_S,
    )
    assert done.returncode == 0 and report.exists(), done.stdout[-4000:]
    return {name: Outcome(*fields) for name, fields in json.loads(report.read_text()).items()}


def known_failures(suite: str) -> dict[str, str]:
    """Return {test id: reason} of one suite."""
    known: dict[str, str] = {}
    for line in KNOWN_FAILURES.read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        name, separator, reason = line.partition(" # ")
        owner, _, test = name.partition(" ")
        assert separator and reason.strip(), f"{KNOWN_FAILURES.name}: no reason: {line}"
        assert test not in known or owner != suite, f"{KNOWN_FAILURES.name}: twice: {line}"
        if owner == suite:
            known[test] = reason
    return known


def judge(suite: str, outcomes: dict[str, Outcome], *, proofs_min: int = 0, passed_min: int = 0) -> None:
    """Fail unless exactly the known failures failed, at least `passed_min` tests passed, and `proofs_min` of those
    that passed opened files on the mount."""
    counts = Counter(outcome.result for outcome in outcomes.values())
    proofs = sum(outcome.result == "passed" and outcome.opens > 0 for outcome in outcomes.values())
    print(f"{suite}: {dict(counts)}, {proofs} of those passed opened files on the mount")
    known = known_failures(suite)
    failed = {name: outcome.detail for name, outcome in outcomes.items() if outcome.result == "failed"}
    surprises = [f"{suite} {name} # {detail}" for name, detail in failed.items() if name not in known]
    assert not surprises, "failed, and not known:\n" + "\n".join(surprises)
    stale = [name for name in known if name not in failed]
    assert not stale, f"in {KNOWN_FAILURES.name}, and did not fail:\n" + "\n".join(stale)
    assert counts["passed"] >= passed_min, f"only {counts['passed']} tests passed"
    assert proofs >= proofs_min, f"only {proofs} tests that passed read anything through the mount"
