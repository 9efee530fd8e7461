"""`orchestra node` and what `stat` says of nodes, with real daemons."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from orchestra.cli.main import main
from tests.support.clusters import Cluster, cluster_of, wait_until
from tests.support.counting_store import CountingServer, counting_server
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


def test_a_drained_node_hands_over_what_it_holds_and_the_store_is_not_asked_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Drained from another node, it is off the ring, its data is at the new owners; after it stopped every byte
    is read and none leaves the store. It stays drained over a restart until it is told otherwise."""
    with counting_server() as store:
        store.files = {f"f{number}": bytes([number]) * 5000 for number in range(40)} | {"large": b"L" * 1_000_000}
        cache = {"size": "64MiB", "block_size": "64KiB", "extent_size": "256KiB"}
        mounts = [{"path": "/data", "uri": store.url, "prefetch": "none"}]
        with cluster_of(tmp_path, 3, mounts=mounts, cache=cache) as cluster:
            cluster.start()
            assert orchestra(cluster.nodes[0], "load", "--wait", "/data") == 0
            sent = store.bytes_sent
            name = str(rows(cluster.nodes[0], capsys)[1]["node_id"])
            assert orchestra(cluster.nodes[0], "node", "drain", name, "--wait") == 0
            assert capsys.readouterr().out.startswith(f"node {name}: drained; ")
            wait_until(lambda: rows(cluster.nodes[2], capsys)[1]["state"] == "drained")
            wait_until(lambda: [row["share"] for row in rows(cluster.nodes[2], capsys)] == [0.5, 0.0, 0.5])
            assert read_all(cluster.nodes[1], store) == len(store.files)
            assert store.bytes_sent == sent
            cluster.nodes[1].stop()
            for index in (0, 2):
                assert read_all(cluster.nodes[index], store) == len(store.files)
            assert store.bytes_sent == sent
            cluster.nodes[1].start()
            wait_until(lambda: rows(cluster.nodes[0], capsys)[1]["state"] == "drained")
            assert orchestra(cluster.nodes[1], "node", "undrain") == 0
            wait_until(lambda: [row["state"] for row in rows(cluster.nodes[0], capsys)] == ["up"] * 3)
            even = [pytest.approx(1 / 3)] * 3
            wait_until(lambda: [row["share"] for row in rows(cluster.nodes[2], capsys)] == even)


def test_draining_says_what_it_cannot_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A node that is not there, and a machine that stands alone, are one line each and status 1."""
    with cluster_of(tmp_path, 1, mounts=[]) as cluster:
        cluster.start()
        assert orchestra(cluster.nodes[0], "node", "drain", "10.0.0.9:1") == 1
        assert "there is no node '10.0.0.9:1' in the cluster now" in capsys.readouterr().err
    alone = tmp_path / "alone"
    alone.mkdir()
    with folder_daemon_node(alone) as (node, _):
        assert orchestra(node, "node", "drain") == 1
        assert "has no table [cluster]" in capsys.readouterr().err


def read_all(node: DaemonNode, store: CountingServer) -> int:
    """Read every file at that node and compare it; return how many there were."""
    client = node.client()
    return sum(client.read_file(f"/data/{name}") == data for name, data in store.files.items())


def test_no_route_between_nodes_answers_without_the_secret(tmp_path: Path) -> None:
    """Every route of the port between nodes is refused without a proof; with it, the nodes find one another."""
    secret = tmp_path / "secret"
    secret.write_text("0123456789abcdef0123456789abcdef")
    secret.chmod(0o600)
    with cluster_of(tmp_path, 2, mounts=[], cluster={"secret_file": str(secret)}) as cluster:
        cluster.start()
        config = cluster.nodes[0].config.cluster
        assert config is not None
        routes = ("GET /v1/node/status", "POST /v1/node/holds", "POST /v1/node/take", "POST /v1/node/drain")
        more = ("POST /v1/node/listing", "POST /v1/node/parts/start", "GET /v1/node/jobs", "POST /v1/node/jobs/1/stop")
        rest = ("POST /v1/node/copy", "POST /v1/node/doubt")
        for method, route in (one.split() for one in (*routes, *more, *rest)):
            request = urllib.request.Request(f"http://{config.listen}{route}", method=method, data=b"{}")
            with pytest.raises(urllib.error.HTTPError) as refusal:
                urllib.request.urlopen(request, timeout=5)
            assert refusal.value.code == 401, route
            refusal.value.close()
        states = cluster.nodes[0].client().daemon_request("GET", "/v1/nodes")["nodes"]
        assert [row["state"] for row in states] == ["up", "up"]
