"""What importing costs and gives: no heavy module where none is needed, few modules at all, and an honest `__all__`.

Counts, not times: a count is the same on a busy machine. `benchmarks/idle.py` has the times.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import subprocess
import sys

import pytest

import orchestra

HEAVY = {"aiohttp", "fsspec", "moto", "numpy", "obstore", "pandas", "pyarrow", "s3fs", "tensorflow", "torch"}
# Beyond what Python itself loads at its start; 28 when this was written, all of them parts of `typing` and `re`.
BARE_MODULES_MAX = 40
# Everything that a training process gets from a face: 180 when this was written.
CLIENT_MODULES_MAX = 250


def modules_loaded_by(statement: str) -> set[str]:
    """Return the modules that a fresh interpreter loads to run `statement`."""
    program = (
        f"import sys, json; before = set(sys.modules); {statement}; print(json.dumps([*set(sys.modules) - before]))"
    )
    ended = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True, check=True)
    return set(json.loads(ended.stdout.splitlines()[-1]))


def test_importing_orchestra_loads_few_modules_and_no_heavy_one() -> None:
    """`import orchestra` loads neither a store's library nor a framework, and hardly anything else."""
    loaded = modules_loaded_by("import orchestra")
    assert not loaded & HEAVY
    assert len(loaded) <= BARE_MODULES_MAX


def test_a_client_loads_few_modules_and_no_heavy_one() -> None:
    """Connecting loads none of the libraries that only the daemon needs: a training process pays for none of them."""
    loaded = modules_loaded_by("import orchestra.client.connect")
    assert not loaded & HEAVY
    assert len(loaded) <= CLIENT_MODULES_MAX


@pytest.mark.parametrize(
    ("module", "allowed"),
    [
        ("orchestra.cli.main", set()),
        ("orchestra.cli.files", set()),
        ("orchestra.cli.daemon", set()),
        ("orchestra.cli.fuse", set()),
        ("orchestra.cli.demo", set()),
        ("orchestra.fuse.worker", set()),
        ("orchestra.filesystem", {"fsspec"}),
    ],
)
def test_a_process_that_serves_or_loads_data_does_not_load_the_stores(module: str, allowed: set[str]) -> None:
    """Faces and commands load no store client, web framework or training library but their own."""
    assert not (modules_loaded_by(f"import {module}") & HEAVY) - allowed


def public_modules() -> list[str]:
    """Return every module of the package that can be imported without running."""
    found = [module.name for module in pkgutil.walk_packages(orchestra.__path__, "orchestra.")]
    return ["orchestra", *(name for name in found if not name.endswith("__main__"))]


@pytest.mark.parametrize("name", public_modules())
def test_every_module_can_be_imported_and_its_all_is_true(name: str) -> None:
    """A module's `__all__`, where it has one, names things it has, each once, and no private one."""
    module = importlib.import_module(name)
    exported = getattr(module, "__all__", [])
    assert len(set(exported)) == len(exported)
    assert [item for item in exported if not hasattr(module, item)] == []
    assert [item for item in exported if item.startswith("_") and not item.startswith("__")] == []


def test_the_front_door_is_small() -> None:
    """`orchestra` itself offers the version and `connect`, and what it offers is in `__all__`."""
    public = {name for name in names_of_the_front_door() if not name.startswith("_")}
    assert public == {"connect"}
    assert set(orchestra.__all__) == public | {"__version__"}


def names_of_the_front_door() -> set[str]:
    """Return the names that orchestra/__init__.py itself defines, in an interpreter where nothing else was imported."""
    program = (
        "import orchestra, json;"
        "print(json.dumps([n for n, v in vars(orchestra).items() if getattr(v, '__module__', '') == 'orchestra']))"
    )
    ended = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True, check=True)
    return set(json.loads(ended.stdout))
