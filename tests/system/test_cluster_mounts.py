"""Mounts that the nodes of a cluster have in common, in a real etcd, with real daemons."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from orchestra.cli.main import main
from orchestra.cluster.etcd_gateway import EtcdGateway
from tests.support.clusters import Cluster, cluster_of, wait_until
from tests.support.members import EtcdServer, etcd_server
from tests.support.node import DaemonNode
from tests.support.web_servers import plain_server

pytestmark = pytest.mark.system

# "A change made on one node is seen on all within 2 s"; looked at every 20 ms.
SEEN_WITHIN_LOOKS = 100


@contextmanager
def etcd_cluster(root: Path, count: int) -> Iterator[tuple[Cluster, EtcdServer, Path]]:
    """Started daemons without mounts, their etcd, and a folder to mount."""
    (root / "etcd").mkdir()
    store = root / "store"
    store.mkdir()
    (store / "a").write_bytes(b"one")
    with etcd_server(root / "etcd") as etcd:
        table = {"membership": "etcd", "endpoints": [etcd.endpoint]}
        with cluster_of(root, count, mounts=[], cluster=table) as cluster:
            cluster.start()
            yield cluster, etcd, store


def orchestra(node: DaemonNode, *arguments: str) -> int:
    """Run a command line at that node."""
    return main(["--config", str(node.config_path), *arguments])


def mounts(node: DaemonNode) -> dict[str, str]:
    """What is mounted there, and from where."""
    return {one["path"]: one["source"] for one in node.client().daemon_request("GET", "/v1/mounts")["mounts"]}


def test_a_mount_made_on_one_node_is_on_all_within_two_seconds_and_so_is_its_end(tmp_path: Path) -> None:
    """Added on the first, read on the third, changed on the second, removed on the third; each seen by all."""
    with etcd_cluster(tmp_path, 3) as (cluster, _, store):
        first, second, third = cluster.nodes
        assert orchestra(first, "mount", "add", "/data", f"file://{store}") == 0
        assert mounts(first) == {"/data": "cluster"}
        wait_until(lambda: mounts(second) == {"/data": "cluster"} == mounts(third), looks=SEEN_WITHIN_LOOKS)
        assert third.client().read_file("/data/a") == b"one"
        assert orchestra(second, "mount", "update", "/data", "--freshness", "7s") == 0
        wait_until(lambda: _freshness(first) == 7.0 == _freshness(third), looks=SEEN_WITHIN_LOOKS)
        assert orchestra(third, "mount", "rm", "/data") == 0
        wait_until(lambda: [mounts(node) for node in cluster.nodes] == [{}] * 3, looks=SEEN_WITHIN_LOOKS)


def _freshness(node: DaemonNode) -> object:
    (mount,) = node.client().daemon_request("GET", "/v1/mounts")["mounts"]
    return mount["freshness_s"]


def test_a_secret_is_refused_and_a_variable_stays_a_variable(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A literal secret, as an option or in an address, is one line and nothing in etcd."""
    with etcd_cluster(tmp_path, 1) as (cluster, etcd, store):
        (node,) = cluster.nodes
        uri = f"file://{store}"
        assert orchestra(node, "mount", "add", "/data", uri, "--option", "secret=hunter2hunter2") == 1
        assert orchestra(node, "mount", "add", "/data", "sftp://me:hunter2hunter2@host/x") == 1
        err = capsys.readouterr().err
        assert err.count("refusing to write a secret") == 2
        assert "hunter2" not in err
        assert _in_etcd(etcd) == {}
        assert b"hunter2" not in b"".join(
            path.read_bytes() for path in (tmp_path / "etcd").rglob("*") if path.is_file()
        )


def test_a_variable_goes_to_etcd_as_it_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each daemon puts in its own value: what all nodes have is `${VAR}`."""
    monkeypatch.setenv("ORCHESTRA_TEST_BLOCKS", "hunter2hunter2")
    with etcd_cluster(tmp_path, 1) as (cluster, etcd, store):
        (node,) = cluster.nodes
        option = "bearer_token=${ORCHESTRA_TEST_BLOCKS}"
        with plain_server(store) as uri:
            assert orchestra(node, "mount", "add", "/data", uri, "--option", option) == 0
        assert _in_etcd(etcd)["/data"]["options"] == {"bearer_token": "${ORCHESTRA_TEST_BLOCKS}"}
        assert b"hunter2" not in b"".join(
            path.read_bytes() for path in (tmp_path / "etcd").rglob("*") if path.is_file()
        )


def _in_etcd(etcd: EtcdServer) -> dict[str, dict[str, object]]:
    import asyncio

    async def ask() -> dict[str, dict[str, object]]:
        gateway = EtcdGateway([etcd.endpoint], timeout_s=5.0)
        try:
            listing = await gateway.list(b"/orchestra/v1/mounts")
        finally:
            await gateway.close()
        return {kv.key.decode().removeprefix("/orchestra/v1/mounts"): json.loads(kv.value) for kv in listing.found}

    return asyncio.run(ask())


def test_an_etcd_that_is_away_leaves_the_mounts_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Reads go on, a change is one line, a daemon that starts then has the mounts; when etcd is back so are changes."""
    with etcd_cluster(tmp_path, 2) as (cluster, etcd, store):
        first, second = cluster.nodes
        assert orchestra(first, "mount", "add", "/data", f"file://{store}") == 0
        wait_until(lambda: mounts(second) == {"/data": "cluster"})
        etcd.kill()
        capsys.readouterr()
        assert orchestra(first, "mount", "rm", "/data") == 1
        assert "the cluster's mounts cannot be changed now: etcd at" in capsys.readouterr().err
        assert second.stop()
        second.start()
        assert mounts(second) == {"/data": "cluster"}
        assert second.client().read_file("/data/a") == b"one"
        etcd.start()
        wait_until(lambda: orchestra(first, "mount", "rm", "/data") == 0)
        wait_until(lambda: mounts(second) == {})


def test_a_node_keeps_what_it_has_of_its_own_at_a_path(tmp_path: Path) -> None:
    """A mount of the cluster whose path one node's file has already is left out there, and is on the others."""
    with etcd_cluster(tmp_path, 2) as (cluster, _, store):
        first, second = cluster.nodes
        other = tmp_path / "other"
        other.mkdir()
        (other / "a").write_bytes(b"two")
        config = second.config.cluster
        assert config is not None
        table = {"listen": config.listen, "membership": "etcd", "endpoints": config.endpoints}
        second.stop()
        second.reconfigure(mounts=[{"path": "/data", "uri": f"file://{other}"}], cluster=table)
        second.start()
        assert orchestra(first, "mount", "add", "/data", f"file://{store}") == 0
        assert orchestra(first, "mount", "add", "/more", f"file://{store}") == 0
        wait_until(lambda: mounts(second) == {"/data": "config", "/more": "cluster"})
        assert second.client().read_file("/data/a") == b"two"
        assert first.client().read_file("/data/a") == b"one"
