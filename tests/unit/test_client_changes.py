"""Changes of a node as paths of its namespace."""

from __future__ import annotations

from pathlib import Path

from orchestra.client.changes import NodeChanges
from orchestra.client.contract import Extent
from orchestra.errors import ConfigError
from orchestra.namespace.mounts import MountTable
from orchestra.namespace.published import PublishedMount
from orchestra.observe.change_log import Change, ChangeLog, Scope


def _mount(path: str, store_id: str) -> PublishedMount:
    return PublishedMount(path, store_id, True, 60.0, "none")


def test_a_key_is_a_path_of_every_mount_of_its_store(tmp_path: Path) -> None:
    """And of no other; what is said twice is told once."""
    table = MountTable([_mount("/a", "s3://x"), _mount("/b/c", "s3://x"), _mount("/other", "s3://y")])
    log = ChangeLog(str(tmp_path / "changes"))
    changes = NodeChanges(lambda: table, str(tmp_path / "changes"), None)
    log.note([Change(Scope.KEY, "s3://x", "d/f")] * 2 + [Change(Scope.CHILDREN, "s3://x", "")])
    log.note([Change(Scope.CHILDREN, "s3://y", "d/"), Change(Scope.PATH, "", "/b"), Change(Scope.BELOW, "", "/b/c")])
    assert changes.wait() == [
        (Extent.PATH, "/a/d/f"),
        (Extent.PATH, "/b/c/d/f"),
        (Extent.CHILDREN, "/a"),
        (Extent.CHILDREN, "/b/c"),
        (Extent.CHILDREN, "/other/d"),
        (Extent.PATH, "/b"),
        (Extent.BELOW, "/b/c"),
    ]


def test_without_a_mount_table_everything_may_have_changed(tmp_path: Path) -> None:
    """And the next change is told again."""

    def no_table() -> MountTable[PublishedMount]:
        raise ConfigError("another configuration")

    log = ChangeLog(str(tmp_path / "changes"))
    changes = NodeChanges(no_table, str(tmp_path / "changes"), None)
    for _ in range(2):
        log.note([Change(Scope.KEY, "s3://x", "d/f")])
        assert changes.wait() == [(Extent.BELOW, "/")]
