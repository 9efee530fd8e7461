"""orchestra's fsspec file system for suites that write what they read: writes go to the folder behind the mount.

Owns nothing else: everything that reads is `OrchestraFileSystem`'s own.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from orchestra.filesystem import OrchestraFileSystem


class SeededFileSystem(OrchestraFileSystem):
    """Reads /data through the node of `config`; changes are made in `store`, the folder that /data shows."""

    def __init__(self, config: str, store: str, **options: Any) -> None:
        super().__init__(config, store=store, **options)
        self.store = Path(store)

    def _behind(self, path: str) -> Path:
        below: str = self._strip_protocol(path).removeprefix("/data").lstrip("/")
        return self.store / below

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        if mode == "rb":
            return super()._open(path, mode)
        self._behind(path).parent.mkdir(parents=True, exist_ok=True)
        return self._behind(path).open(mode)

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: Any) -> None:  # type: ignore[override]
        with self._open(path, "wb") as file:
            file.write(value)

    def touch(self, path: str, truncate: bool = True, **options: Any) -> None:  # type: ignore[override]
        self.pipe_file(path, b"")

    def mkdir(self, path: str, create_parents: bool = True, **options: Any) -> None:  # type: ignore[override]
        self._behind(path).mkdir(parents=True, exist_ok=True)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:  # type: ignore[override]
        self._behind(path).mkdir(parents=True, exist_ok=exist_ok)

    def rm_file(self, path: str) -> None:  # type: ignore[override]
        self._behind(path).unlink()

    def rm(self, path: Any, recursive: bool = False, maxdepth: int | None = None) -> None:  # type: ignore[override]
        for one in path if isinstance(path, list) else [path]:
            behind = self._behind(one)
            if behind.is_dir():
                shutil.rmtree(behind)
            else:
                behind.unlink()

    def cp_file(self, path1: str, path2: str, **options: Any) -> None:  # type: ignore[override]
        shutil.copyfile(self._behind(path1), self._behind(path2))

    def mv(self, path1: str, path2: str, *args: Any, **options: Any) -> None:  # type: ignore[override]
        self._behind(path1).rename(self._behind(path2))
