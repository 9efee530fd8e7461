"""Keys that no path can show are counted, and said: by `ls`, by `daemon status`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestra.cli.daemon import status_fields
from orchestra.cli.main import main
from tests.support.node import ThreadNode, thread_node
from tests.support.ram import ram_folder
from tests.support.versioned_store import VersionedStore


@pytest.fixture
def node(store: VersionedStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadNode]:
    """A node whose store has ordinary keys and four that are hidden, two of them below a folder."""
    for key in ("plain/file", "folder/file", "folder//double", "folder/..", "both", "both/below", "../above"):
        store.put(key, b"x")
    with ram_folder() as folder, thread_node(Path(folder), store) as running:
        monkeypatch.setattr("orchestra.client.connect.connect", lambda config: running.client())
        yield running


@pytest.mark.usefixtures("node")
@pytest.mark.parametrize(
    ("arguments", "warning"),
    [
        (["/data/folder"], "2 keys are hidden that no path can show, such as /data/folder/.."),
        (["/data"], "2 keys are hidden that no path can show, such as /data/../"),
        (["-R", "/data"], "4 keys are hidden that no path can show, such as /data/../"),
        (["-R", "--json", "/data"], "4 keys are hidden that no path can show, such as /data/../"),
    ],
)
def test_ls_warns_in_one_line(arguments: list[str], warning: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The listing is what it was; standard error says how many keys it lacks, and one of them."""
    assert main(["ls", *arguments]) == 0
    found = capsys.readouterr()
    assert found.err == f"orchestra: warning: {warning}\n"
    assert "double" not in found.out


@pytest.mark.usefixtures("node")
def test_ls_of_a_folder_without_such_keys_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """A warning means something."""
    assert main(["ls", "/data/plain"]) == 0
    assert capsys.readouterr() == ("file\n", "")


def test_the_status_names_mount_count_and_example(node: ThreadNode, capsys: pytest.CaptureFixture[str]) -> None:
    """What was listed since the start counts, once however often it was listed; nothing listed is nothing hidden."""
    client = node.client()
    assert client.daemon_request("GET", "/v1/status")["hidden"] == []
    for _ in range(2):
        client.list("/data", refresh=True)
        client.list("/data/folder", refresh=True)
    answer = client.daemon_request("GET", "/v1/status")
    assert answer["hidden"] == [{"mount": "/data", "count": 4, "example": "/data/../"}]
    assert ("hidden keys", "4 in /data, such as /data/../") in status_fields(answer)


def test_keys_that_are_gone_are_counted_no_more(node: ThreadNode, store: VersionedStore) -> None:
    """The number is that of the last listing."""
    client = node.client()
    client.list("/data/folder")
    store.delete("folder//double")
    store.delete("folder/..")
    client.list("/data/folder", refresh=True)
    assert client.daemon_request("GET", "/v1/status")["hidden"] == []
