"""Runs somebody else's tests in this process and writes down what came of each: the child of `running.run_suite`.

    python child.py unittest|pytest REPORT.json LEFT_OUT NAME...

`LEFT_OUT` is a regular expression of test ids that are not run ("" for none). The report maps each test's id to
[outcome, opens, detail]: "passed", "failed" or "skipped", how many files and directories it opened on the mount
(write_behind.c counts them), and the last line of its error. Owns nothing but that; what is expected of whom is
running.py's business.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import re
import shutil
import sys
import unittest
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Of a failure's text, what helps to say why it is known.
DETAIL_CHARACTERS_MAX = 300

Report = dict[str, tuple[str, int, str]]


def opens_so_far() -> int:
    """How many files and directories this process has opened on the mount."""
    count = ctypes.CDLL(None).write_behind_reads
    count.restype = ctypes.c_long
    return int(count())


class Recorder(unittest.TestResult):
    """Writes down every test; one that is repeated under one id failed if it failed once."""

    def __init__(self, report: Report) -> None:
        super().__init__()
        self._report = report
        self._before = 0
        self._kind: type | None = None
        self._kept: set[str] = set()

    def startTest(self, test: unittest.TestCase) -> None:
        super().startTest(test)
        if type(test) is not self._kind:  # what is there now was made for all tests of the class
            self._kind, self._kept = type(test), set(os.listdir(work_folder()))
        self._before = opens_so_far()

    def stopTest(self, test: unittest.TestCase) -> None:
        super().stopTest(test)
        self._note(test, "passed", "")
        remove_all_but(self._kept)

    def addError(self, test: Any, err: Any) -> None:
        super().addError(test, err)
        self._note(test, "failed", self.errors[-1][1])

    def addFailure(self, test: Any, err: Any) -> None:
        super().addFailure(test, err)
        self._note(test, "failed", self.failures[-1][1])

    def addSubTest(self, test: Any, subtest: Any, err: Any) -> None:
        super().addSubTest(test, subtest, err)
        if err is not None:
            self._note(test, "failed", (self.errors + self.failures)[-1][1])

    def addSkip(self, test: Any, reason: str) -> None:
        super().addSkip(test, reason)
        self._note(test, "skipped", reason)

    def _note(self, test: Any, outcome: str, text: str) -> None:
        name = test.id()
        old = self._report.get(name, ("", 0, ""))
        opens = max(old[1], opens_so_far() - self._before)
        if old[0] in ("", outcome) or outcome == "failed":
            self._report[name] = (outcome, opens, last_line(text))
        else:
            self._report[name] = (old[0], opens, old[2])


class Plugin:
    """The same for pytest."""

    def __init__(self, report: Report, left_out: str) -> None:
        self._report = report
        self._left_out = left_out
        self._before = 0

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        if self._left_out:
            items[:] = [item for item in items if not re.search(self._left_out, item.nodeid)]

    def pytest_runtest_logstart(self) -> None:
        self._before = opens_so_far()

    def pytest_runtest_logreport(self, report: Any) -> None:
        name = report.nodeid.partition("::")[2]  # what comes before depends on where the package lies
        old = self._report.get(name, ("passed", 0, ""))
        outcome = report.outcome if old[0] == "passed" else old[0]
        detail = last_line(report.longreprtext) if report.failed and not old[2] else old[2]
        self._report[name] = (outcome, opens_so_far() - self._before, detail)


def last_line(text: str) -> str:
    """Return what an error's text ends with."""
    lines = [line for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("E  ")]
    return (errors or lines or [""])[-1].strip()[:DETAIL_CHARACTERS_MAX]


def work_folder() -> Path:
    """Where this run's folder of the mount lies in the store."""
    return Path(os.environ["WRITE_BEHIND_STORE"]) / Path(os.environ["TMPDIR"]).name


def remove_all_but(kept: set[str]) -> None:
    """Remove what a test left behind: if it failed, it must not take the next ones with it."""
    for path in work_folder().iterdir():
        if path.name in kept:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def tests_in(suite: Any) -> Iterator[unittest.TestCase]:
    """Yield the tests of nested suites."""
    if isinstance(suite, unittest.TestCase):
        yield suite
    else:
        for part in suite:
            yield from tests_in(part)


def lay_out_pytables() -> None:
    """Have PyTables find the files that come with its tests on the mount; they are copied when they are asked for."""
    common = importlib.import_module("tables.tests.common")
    packaged = common.test_filename

    def on_the_mount(name: str) -> str:
        return str(shutil.copy(packaged(name), Path.cwd() / "keep"))

    vars(common)["test_filename"] = on_the_mount


def run_unittests(report: Report, left_out: str, names: list[str]) -> None:
    """Run modules, classes or methods, each module by its own `suite` or `load_tests` where it has one."""
    # Gigabytes of disk, processor or network are not what is tested here.
    vars(importlib.import_module("test.support"))["use_resources"] = []
    loader = unittest.TestLoader()
    for name in names:
        if name.startswith("tables."):
            lay_out_pytables()
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError:
            suite = loader.loadTestsFromName(name)
        else:
            suite = module.suite() if hasattr(module, "suite") else loader.loadTestsFromModule(module)
        kept = [test for test in tests_in(suite) if not left_out or not re.search(left_out, test.id())]
        unittest.TestSuite(kept).run(Recorder(report))


def run_pytest(report: Report, left_out: str, names: list[str]) -> None:
    """Run modules of installed packages, as `--pyargs` names them, without this project's settings."""
    import pytest

    arguments = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-c", "/dev/null", "--basetemp", "pytest"]
    pytest.main([*arguments, "-o", "asyncio_mode=auto", "--pyargs", *names], plugins=[Plugin(report, left_out)])


def main() -> None:
    """Run as the module's docstring says. The status is 0 however the tests ended; the report says how."""
    kind, path, left_out, *names = sys.argv[1:]
    report: Report = {}
    {"unittest": run_unittests, "pytest": run_pytest}[kind](report, left_out, names)
    Path(path).write_text(json.dumps(report))


if __name__ == "__main__":
    main()
