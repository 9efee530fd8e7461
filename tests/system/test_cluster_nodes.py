"""`orchestra node` and what `stat` says of nodes, with real daemons."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from orchestra.cli.main import main
from tests.support.clusters import Cluster, cluster_of
from tests.support.node import DaemonNode, folder_daemon_node

pytestmark = pytest.mark.system

SIZE_BYTES = 100_000


def orchestra(node: DaemonNode, *arguments: str) -> int:
    """Run a command line at that node."""
    return main(["--config", str(node.config_path), *arguments])


def rows(node: DaemonNode, capsys: pytest.CaptureFixture[str]) -> list[dict[str, object]]:
    """What `node ls --json` says there."""
    capsys.readouterr()
    assert orchestra(node, "node", "ls", "--json") == 0
    found = json.loads(capsys.readouterr().out)["nodes"]
    assert isinstance(found, list)
    return found


def test_node_ls_is_the_same_from_any_node_and_says_who_is_away(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three rows with equal shares, each with its own use; a node that was killed is away, then down."""
    with cluster_of(tmp_path, 3, mounts=[]) as cluster:
        cluster.start()
        for index, node in enumerate(cluster.nodes):
            found = rows(node, capsys)
            assert [row["state"] for row in found] == ["up"] * 3
            assert [row["share"] for row in found] == [pytest.approx(1 / 3)] * 3
            assert [row["is_self"] for row in found] == [number == index for number in range(3)]
            assert all(row["capacity_bytes"] == 1 << 30 and row["used_bytes"] == 0 for row in found)
        cluster.kill(2)
        assert [row["state"] for row in rows(cluster.nodes[0], capsys)] in (["up", "up", "away"], ["up", "up", "down"])
        assert orchestra(cluster.nodes[0], "node", "ls") == 0
        table = capsys.readouterr().out.splitlines()
        assert table[0].split() == ["NODE", "ADDRESS", "STATE", "CAPACITY", "USED", "SHARE", "NOTE"]
        assert "this node" in table[1]


def test_node_ls_of_one_machine_is_that_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a table [cluster] there is one node, that owns everything."""
    with folder_daemon_node(tmp_path) as (node, _):
        node.start()
        (row,) = rows(node, capsys)
        assert (row["state"], row["share"], row["capacity_bytes"]) == ("up", 1.0, 1 << 30)


def test_stat_says_which_nodes_hold_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before anybody read it no node holds anything and one owns all; afterwards its reader or its owner does."""
    store = tmp_path / "store"
    store.mkdir()
    (store / "a").write_bytes(b"x" * SIZE_BYTES)
    with cluster_of(tmp_path, 3, mounts=[{"path": "/data", "uri": f"file://{store}"}]) as cluster:
        cluster.start()
        before = _nodes(cluster, capsys)
        assert [one["held_bytes"] for one in before] == [0, 0, 0]
        assert sorted(one["owns_bytes"] for one in before) == [0, 0, SIZE_BYTES]
        assert cluster.nodes[1].client().read_file("/data/a") == b"x" * SIZE_BYTES
        after = _nodes(cluster, capsys)
        assert max(one["held_bytes"] for one in after) == SIZE_BYTES
        assert orchestra(cluster.nodes[0], "stat", "/data/a") == 0
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("node:")]
        assert len(lines) == 3
        assert any("100 %" in line and "owns 100 %" in line for line in lines)


def _nodes(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> list[dict[str, int]]:
    capsys.readouterr()
    assert orchestra(cluster.nodes[0], "stat", "--json", "/data/a") == 0
    nodes = json.loads(capsys.readouterr().out)["nodes"]
    assert isinstance(nodes, list)
    return nodes
