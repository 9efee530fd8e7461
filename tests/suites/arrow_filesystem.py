"""pyarrow's own tests of file systems, over orchestra's fsspec file system. Run in a child by test_arrow.py.

Those that only write (delete, move, copy) are not taken: fsspec's folder behind the mount would be all they test.
"""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import pytest
from pyarrow.fs import FSSpecHandler, PyFileSystem
from pyarrow.tests.conftest import builtin_pickle, cloudpickle, pickle_module  # noqa: F401 - fixtures
from pyarrow.tests.test_fs import (  # noqa: F401 - collected here
    allow_append_to_file,
    allow_move_dir,
    fs,
    pathfn,
    pickle_with_and_without_subtree_filesystem,
    test_filesystem_equals_none,
    test_filesystem_pickling,
    test_get_file_info,
    test_get_file_info_with_selector,
    test_non_path_like_input_raises,
    test_normalize_path,
    test_open_input_file,
    test_open_input_stream,
    test_open_input_stream_not_found,
)

from tests.suites.running import Site
from tests.suites.seeded import SeededFileSystem

_numbers = itertools.count()


@pytest.fixture
def filesystem_config() -> dict[str, Any]:
    """What the suite asks for: the file system, and where in it a test may write."""
    site = Site(Path(os.environ["SUITE_ROOT"]))
    folder = f"/data/arrow-{next(_numbers)}"
    file_system = SeededFileSystem(config=str(site.config), store=str(site.store))
    return {
        "fs": PyFileSystem(FSSpecHandler(file_system)),
        "pathfn": lambda name: f"{folder}/{name}",
        "allow_move_dir": False,
        "allow_append_to_file": False,
    }
