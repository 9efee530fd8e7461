"""fsspec's own abstract suites over a real node: what reads must pass them, what writes must refuse by name.

The suites make their files through the file system under test; here those few calls go to the folder behind the mount,
and everything that is tested is read through `OrchestraFileSystem`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fsspec.tests.abstract import AbstractFixtures, AbstractGetTests

from orchestra.errors import ReadOnlyError
from orchestra.filesystem import OrchestraFileSystem
from tests.support.folder_node import FolderNode, folder_node

pytestmark = pytest.mark.system


class SeededFileSystem(OrchestraFileSystem):
    """Reads through orchestra; what a suite's fixtures make and remove goes to the folder behind /data."""

    cachable = False
    store: Path

    def _behind(self, path: str) -> Path:
        below: str = self._strip_protocol(path).removeprefix("/data").lstrip("/")
        return self.store / below

    def touch(self, path: str, truncate: bool = True, **kwargs: Any) -> None:  # type: ignore[override]
        self._behind(path).parent.mkdir(parents=True, exist_ok=True)
        self._behind(path).touch()

    def mkdir(self, path: str, create_parents: bool = True, **kwargs: Any) -> None:  # type: ignore[override]
        self._behind(path).mkdir(parents=True, exist_ok=True)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:  # type: ignore[override]
        self._behind(path).mkdir(parents=True, exist_ok=True)

    def pipe(self, path: str, value: bytes = b"", **kwargs: Any) -> None:  # type: ignore[override]
        self._behind(path).parent.mkdir(parents=True, exist_ok=True)
        self._behind(path).write_bytes(value)

    def rm(self, path: str, recursive: bool = False, maxdepth: int | None = None) -> None:  # type: ignore[override]
        shutil.rmtree(self._behind(path))


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FolderNode]:
    """One node for all tests of this module."""
    with folder_node(tmp_path_factory.mktemp("node")) as running:
        yield running
    OrchestraFileSystem.clear_instance_cache()


class NodeFixtures(AbstractFixtures):  # type: ignore[misc]
    """What fsspec's suites ask for."""

    @pytest.fixture
    def fs(self, node: FolderNode) -> SeededFileSystem:
        fs = SeededFileSystem(config=node.config)
        fs.store = node.store
        return fs

    @pytest.fixture
    def fs_path(self, request: pytest.FixtureRequest, node: FolderNode) -> Iterator[str]:
        folder = node.store / f"test-{abs(hash(request.node.name)):x}"
        folder.mkdir()
        yield f"/data/{folder.name}"
        shutil.rmtree(folder)

    @pytest.fixture
    def fs_join(self) -> Callable[..., str]:
        return lambda *parts: "/".join(parts)


class TestGet(AbstractGetTests, NodeFixtures):  # type: ignore[misc]
    """All of fsspec's tests of `get` and `get_file`."""


# Every way to write that fsspec knows: name and arguments after the path.
WRITES: list[tuple[str, tuple[Any, ...]]] = [
    ("mkdir", ()),
    ("makedir", ()),
    ("makedirs", ()),
    ("mkdirs", ()),
    ("rmdir", ()),
    ("rm", ()),
    ("rm_file", ()),
    ("_rm", ()),
    ("delete", ()),
    ("touch", ()),
    ("pipe", (b"data",)),
    ("pipe_file", (b"data",)),
    ("write_bytes", (b"data",)),
    ("write_text", ("data",)),
    ("copy", ("/data/other",)),
    ("cp", ("/data/other",)),
    ("cp_file", ("/data/other",)),
    ("mv", ("/data/other",)),
    ("move", ("/data/other",)),
    ("rename", ("/data/other",)),
    ("open", ("wb",)),
    ("open", ("ab",)),
    ("open", ("xb",)),
    ("open", ("r+b",)),
    ("open", ("w",)),
]


class TestWritesAreRefused:
    @pytest.mark.parametrize(("name", "arguments"), WRITES, ids=[f"{name}{args}" for name, args in WRITES])
    def test_by_name(self, node: FolderNode, name: str, arguments: tuple[Any, ...]) -> None:
        """Each raises ReadOnlyError, which is a PermissionError, names a path, and changes nothing."""
        (node.store / "keep").write_bytes(b"kept")
        with pytest.raises(ReadOnlyError, match=r"/data/(keep|other)") as caught:
            getattr(OrchestraFileSystem(config=node.config), name)("/data/keep", *arguments)
        assert isinstance(caught.value, PermissionError)
        assert (node.store / "keep").read_bytes() == b"kept"
        assert not (node.store / "other").exists()

    @pytest.mark.parametrize("name", ["put", "put_file", "upload"])
    def test_from_local_files(self, node: FolderNode, tmp_path: Path, name: str) -> None:
        """Copying into the namespace is refused, with the path there."""
        (tmp_path / "mine").write_bytes(b"data")
        with pytest.raises(ReadOnlyError, match="/data/other"):
            getattr(OrchestraFileSystem(config=node.config), name)(str(tmp_path / "mine"), "/data/other")
        assert not (node.store / "other").exists()

    def test_many_paths_at_once(self, node: FolderNode) -> None:
        """A list or a dict of paths is refused as one is."""
        fs = OrchestraFileSystem(config=node.config)
        with pytest.raises(ReadOnlyError, match="/data/a"):
            fs.rm(["/data/a", "/data/b"])
        with pytest.raises(ReadOnlyError, match="/data/a"):
            fs.pipe({"/data/a": b"", "/data/b": b""})

    def test_every_method_that_writes_is_ours(self) -> None:
        """No method of fsspec's base class that changes something is left as it is there."""
        for name in {name for name, _ in WRITES} - {"makedir", "mkdirs", "delete", "write_bytes", "write_text"}:
            if name in ("cp", "move", "rename", "open"):
                continue  # these call copy, mv and _open
            assert name in vars(OrchestraFileSystem), name
