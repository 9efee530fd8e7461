"""A path as a script has it, and the path of the namespace that it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestra.client import folders
from orchestra.client.folders import MountedFolder, namespace_paths


@pytest.mark.parametrize(
    ("root", "path", "inside"),
    [
        ("/", "/mnt/o/imagenet/a.jpg", "/imagenet/a.jpg"),
        ("/imagenet", "/mnt/o/train/a.jpg", "/imagenet/train/a.jpg"),
        ("/", "/mnt/o", "/"),
        ("/", "/mnt/other/a.jpg", None),
        ("/", "/elsewhere/mnt/o/a.jpg", None),
    ],
)
def test_a_folder_shows_a_part_of_the_namespace(root: str, path: str, inside: str | None) -> None:
    """What follows the folder follows the mounted root; a folder of a longer name is another one."""
    assert MountedFolder("/mnt/o", root).translate(path) == inside


def test_paths_are_translated_and_strangers_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """URIs, paths in a mounted folder, also by a relative path and through a link; "" for what lies elsewhere."""
    mounted = tmp_path / "mnt"
    mounted.mkdir()
    (tmp_path / "link").symlink_to(mounted)
    monkeypatch.setattr(folders, "mounted_folders", lambda: [MountedFolder(str(mounted), "/data")])
    monkeypatch.chdir(tmp_path)
    paths = ["orchestra:///x/y", f"{mounted}/a", "mnt/b", f"{tmp_path}/link/c", f"{tmp_path}/d", "/e"]
    assert namespace_paths(paths) == (["/x/y", "/data/a", "/data/b", "/data/c", "", ""], f"{tmp_path}/d")


def test_without_a_mount_nothing_is_mounted() -> None:
    """What the kernel does not list is not believed, whatever files of mounts that ended are left."""
    assert all(Path(one.folder).is_mount() for one in folders.mounted_folders())
