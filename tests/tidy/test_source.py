"""The house's rules that a linter does not know, read off the source itself: see STYLE.

A rule is a function from a parsed file to what is wrong in it; the tests below say over which files it holds. Import
directions are lint-imports' (pyproject.toml), prints and blanket ignores are ruff's.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FUNCTION_LINES_MAX = 60
MODULE_LINES_MAX = 500
LONG_MODULE_MARKER = "# Over 500 lines: "
# "BLE001 - why" with a why worth reading.
REASON_CHARACTERS_MIN = 20

# Where an exception of any kind may be caught and not raised again. Each is an outermost frame: it logs or answers.
BROAD_EXCEPTS = {
    "orchestra/cli/main.py": "the command line's outermost frame",
    "orchestra/fuse/channel.py": "the outermost frame of a FUSE request: an unanswered one hangs its caller for good",
    "orchestra/fuse/session.py": "the outermost frame of a FUSE request: an unanswered one hangs its caller for good",
    "orchestra/daemon/api/peer.py": "the outermost frame of a request of another node: it breaks the connection off",
    "orchestra/engine/courier_process.py": "the outermost frame of an errand: an unanswered one is waited for",
    "orchestra/daemon/api/app.py": "the outermost frame of an HTTP request: it answers 500",
    "tests/support/node.py": "the outermost frame of a node's thread: whoever waits for the node raises it again",
    "orchestra/testing/s3_server.py": "the outermost frame of the server's process: its parent raises it",
}
SERIALIZERS = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
WALL_CLOCKS = {"datetime.now", "datetime.utcnow", "datetime.today", "date.today"}


@dataclass(frozen=True, slots=True)
class Source:
    """One parsed file."""

    path: str
    text: str
    tree: ast.Module


@lru_cache
def sources(*folders: str) -> tuple[Source, ...]:
    """Return every Python file below `folders`."""
    found = []
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            text = path.read_text()
            found.append(Source(path.relative_to(ROOT).as_posix(), text, ast.parse(text)))
    assert found, f"no Python file below {folders}"
    return tuple(found)


def faults(rule: Callable[[Source], Iterator[str]], *folders: str) -> list[str]:
    """Return what `rule` finds below `folders`, each with its file."""
    return [f"{source.path}: {fault}" for source in sources(*folders) for fault in rule(source)]


def functions(source: Source) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(source.tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


def imported_modules(source: Source) -> Iterator[tuple[int, str]]:
    """Yield line and dotted name of everything imported; `from a import b` gives a.b."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def long_functions(source: Source) -> Iterator[str]:
    for function in functions(source):
        assert function.end_lineno is not None
        length = function.end_lineno - function.lineno + 1
        if length > FUNCTION_LINES_MAX:
            yield f"{function.name} has {length} lines; at most {FUNCTION_LINES_MAX}"


def long_modules(source: Source) -> Iterator[str]:
    length = source.text.count("\n")
    if length > MODULE_LINES_MAX and LONG_MODULE_MARKER not in source.text:
        yield f"{length} lines; split it, or say why in a line that begins with {LONG_MODULE_MARKER!r}"


def silent_modules(source: Source) -> Iterator[str]:
    if ast.get_docstring(source.tree) is None:
        yield "no docstring that says what the module owns and what it leaves to others"


def broad_excepts(source: Source) -> Iterator[str]:
    lines = source.text.splitlines()
    for node in ast.walk(source.tree):
        if not isinstance(node, ast.ExceptHandler) or not _is_broad(node.type) or _raises_at_the_end(node):
            continue
        if source.path not in BROAD_EXCEPTS:
            yield f"line {node.lineno}: catches everything; catch what can happen, or list the module in BROAD_EXCEPTS"
        reason = lines[node.lineno - 1].partition("BLE001")[2].strip(" -")
        if "noqa" in lines[node.lineno - 1] and len(reason) < REASON_CHARACTERS_MIN:
            yield f"line {node.lineno}: say why it catches everything, after noqa: BLE001"


def _is_broad(kind: ast.expr | None) -> bool:
    if kind is None:
        return True
    kinds = kind.elts if isinstance(kind, ast.Tuple) else [kind]
    return any(isinstance(one, ast.Name) and one.id in ("Exception", "BaseException") for one in kinds)


def _raises_at_the_end(handler: ast.ExceptHandler) -> bool:
    return isinstance(handler.body[-1], ast.Raise)


def sleeps(source: Source) -> Iterator[str]:
    in_tests = not source.path.startswith("orchestra/")  # a daemon's periodic work is due at a time, a test's is not
    for node in ast.walk(source.tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        yields_only = len(node.args) == 1 and isinstance(node.args[0], ast.Constant) and node.args[0].value == 0
        if called in ("time.sleep", "sleep") or (called == "asyncio.sleep" and in_tests and not yields_only):
            yield f"line {node.lineno}: {ast.unparse(node)}; wait for what is to happen instead"


def serializers(source: Source) -> Iterator[str]:
    for line, name in imported_modules(source):
        if name.split(".")[0] in SERIALIZERS:
            yield f"line {line}: imports {name}; nothing that runs code when read goes to disk or wire"


def clocks(source: Source) -> Iterator[str]:
    if source.path == "orchestra/clock.py":
        return
    for line, name in imported_modules(source):
        if name.split(".")[0] == "time":
            yield f"line {line}: imports {name}; take a Clock"
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func).replace("datetime.date", "date") in WALL_CLOCKS:
            yield f"line {node.lineno}: {ast.unparse(node.func)}; take a Clock"


def prints(source: Source) -> Iterator[str]:
    if source.path.startswith("orchestra/cli/"):
        return
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            yield f"line {node.lineno}: prints; only the command line does"


def web_frameworks(source: Source) -> Iterator[str]:
    if source.path.startswith(("orchestra/daemon/", "orchestra/s3/", "orchestra/testing/")):
        return
    for line, name in imported_modules(source):
        if name == "aiohttp.web" or name.startswith("aiohttp.web."):
            yield f"line {line}: imports {name}; only daemon and s3 serve"


def claimless_tests(source: Source) -> Iterator[str]:
    for function in functions(source):
        if function.name.startswith("test_") and not (ast.get_docstring(function) or "").strip():
            yield f"{function.name} does not say in one sentence what it proves"


EVERYWHERE = ("orchestra", "tests", "benchmarks", "examples")
RULES: dict[str, tuple[Callable[[Source], Iterator[str]], tuple[str, ...]]] = {
    "functions fit a screen": (long_functions, EVERYWHERE),
    "long modules say why": (long_modules, EVERYWHERE),
    "modules say what they own": (silent_modules, EVERYWHERE),
    "broad excepts are listed outermost frames": (broad_excepts, EVERYWHERE),
    "nothing sleeps": (sleeps, ("orchestra", "tests")),
    "no pickle": (serializers, ("orchestra",)),
    "only clock.py asks the time": (clocks, ("orchestra",)),
    "only the command line prints": (prints, ("orchestra",)),
    "the web framework stays in daemon and s3": (web_frameworks, ("orchestra",)),
    "tests are claims": (claimless_tests, ("tests",)),
}


@pytest.mark.parametrize("name", RULES)
def test_the_source_keeps_the_rule(name: str) -> None:
    """No file breaks a rule of the house."""
    rule, folders = RULES[name]
    assert faults(rule, *folders) == []


BROKEN = {
    "functions fit a screen": "def f():\n" + "    x = 1\n" * FUNCTION_LINES_MAX,
    "long modules say why": "x = 1\n" * (MODULE_LINES_MAX + 1),
    "modules say what they own": "x = 1\n",
    "broad excepts are listed outermost frames": "try:\n    f()\nexcept (OSError, Exception):\n    pass\n",
    "nothing sleeps": "import time\ntime.sleep(0.1)\n",
    "no pickle": "from pickle import loads\n",
    "only clock.py asks the time": "from time import monotonic\n",
    "only the command line prints": "print(1)\n",
    "the web framework stays in daemon and s3": "from aiohttp import web\n",
    "tests are claims": "def test_x():\n    assert True\n",
}


@pytest.mark.parametrize("name", RULES)
def test_the_rule_sees_what_breaks_it(name: str) -> None:
    """Every rule finds its fault in a file that has it."""
    rule, _ = RULES[name]
    text = BROKEN[name]
    assert list(rule(Source("orchestra/stores/made_up.py", text, ast.parse(text))))


def test_the_list_of_broad_excepts_is_not_longer_than_needed() -> None:
    """Every module that may catch everything does so."""
    needed = set()
    for source in sources("orchestra", "tests"):
        for node in ast.walk(source.tree):
            if isinstance(node, ast.ExceptHandler) and _is_broad(node.type) and not _raises_at_the_end(node):
                needed.add(source.path)
    assert set(BROAD_EXCEPTS) - needed == set()
