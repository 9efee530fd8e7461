"""The third-party suites: all of them only with `pytest -m suites`; the gate runs those that are not `slow`."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.suites.running import HERE, Site, mounted_site


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the slow suites unless suites were asked for by name: they take minutes."""
    if "suites" in config.getoption("markexpr"):
        return
    left = [item for item in items if {"suites", "slow"} <= {mark.name for mark in item.iter_markers()}]
    config.hook.pytest_deselected(items=left)
    items[:] = [item for item in items if item not in left]


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """One mount for all suites."""
    with mounted_site(tmp_path_factory.mktemp("s")) as running:
        yield running


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """write_behind.c, compiled."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler: what the suites write cannot be sent to the store (apt-get install gcc libc6-dev)")
    library = tmp_path_factory.mktemp("library") / "write_behind.so"
    source = str(HERE / "write_behind.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-Wall", "-o", str(library), source, "-ldl"], check=True)
    return library
