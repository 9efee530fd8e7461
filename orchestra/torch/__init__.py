"""What a PyTorch script takes from orchestra: batches, cubes, files, plans; each as short and as fast as it can be.

Owns: the names. Leaves to others: everything else; a name's module is imported when the name is first used, so that a
worker that reads files pays for no table reader, and a script that only plans pays for neither.
"""

from __future__ import annotations

import importlib
from typing import Any

# Name -> the module of this package that has it.
_MODULES = {
    "ColumnCubes": "cubes",
    "FileDataset": "files",
    "load_tensor": "files",
    "PlannedSampler": "planned",
    "TensorBatches": "batches",
    "prefetch_to_device": "device",
    "watch": "watching",
}


def __getattr__(name: str) -> Any:
    """Return a public name, importing its module."""
    module = _MODULES.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
