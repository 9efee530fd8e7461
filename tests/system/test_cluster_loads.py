"""Loads that all nodes of a cluster do together: one job, led from any node, with real daemons."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from orchestra.cli.main import main
from orchestra.cluster.etcd_gateway import EtcdGateway
from orchestra.daemon.jobs.job import Job, JobState, LoadSpec
from orchestra.daemon.nodes.jobs import PREFIX
from orchestra.units import KIB
from tests.support.clusters import Cluster, cluster_of, wait_until
from tests.support.counting_store import CountingServer, counting_server
from tests.support.members import EtcdServer, etcd_server
from tests.support.node import DaemonNode

pytestmark = pytest.mark.system

BLOCK_BYTES = 64 * KIB
SMALL = {f"small/{number:03d}": bytes([number]) * (1000 + number) for number in range(60)}
# 5 extents of 4 blocks, the last one short.
LARGE = bytes(range(256)) * 1024 * 4 + bytes(range(256)) * 100
DATASET_BYTES = sum(len(data) for data in SMALL.values()) + len(LARGE)


@contextmanager
def loading_cluster(
    root: Path, count: int, *, etcd: str | None = None, **tables: object
) -> Iterator[tuple[Cluster, CountingServer]]:
    """Started daemons that share a secret, with one mount, /data, of a store that counts."""
    secret = root / "secret"
    secret.write_text("0123456789abcdef0123456789abcdef")
    secret.chmod(0o600)
    table: dict[str, object] = {"secret_file": str(secret)}
    table |= {"membership": "etcd", "endpoints": [etcd]} if etcd is not None else {}
    cache = {"block_size": f"{BLOCK_BYTES}", "extent_size": f"{4 * BLOCK_BYTES}", "size": "64MiB"}
    with counting_server() as store:
        store.files = {**SMALL, "large": LARGE}
        mounts = [{"path": "/data", "uri": store.url, "prefetch": "none"}]
        with cluster_of(root, count, mounts=mounts, cluster=table, cache={**cache, **tables}) as cluster:
            cluster.start()
            yield cluster, store


def orchestra(node: DaemonNode, *arguments: str) -> int:
    """Run a command line at that node."""
    return main(["--config", str(node.config_path), *arguments])


def load(node: DaemonNode, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, object]]:
    """Load /data from that node; return the exit status and the job."""
    capsys.readouterr()
    status = orchestra(node, "load", "/data", "--wait", "--json", *arguments)
    job = json.loads(capsys.readouterr().out)
    assert isinstance(job, dict)
    return status, job


def held_up_load(node: DaemonNode, store: CountingServer, capsys: pytest.CaptureFixture[str]) -> str:
    """Begin a load of /data at that node, in the middle of which the store answers nobody; return its id."""
    store.hold()
    assert orchestra(node, "load", "/data", "--json") == 0
    job_id = json.loads(capsys.readouterr().out)["id"]
    wait_until(lambda: store.waiting_count > 0)
    return str(job_id)


def assert_all_is_loaded(node: DaemonNode, job_id: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Wait at that node for a load of /data: it succeeds with every file."""
    assert orchestra(node, "job", "wait", "--json", job_id) == 0
    job = json.loads(capsys.readouterr().out)
    assert (job["state"], job["files_done"]) == ("SUCCEEDED", 61)


def held(node: DaemonNode) -> int:
    """Bytes of files that the node's cache has."""
    client = node.client()
    return sum(client.cached_bytes(client.stat(f"/data/{name}")) for name in (*SMALL, "large"))


def test_all_nodes_load_their_own_share_and_each_byte_leaves_the_store_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One job of 61 files; every node holds a part and all together each byte once; a second load fetches nothing."""
    with loading_cluster(tmp_path, 3) as (cluster, store):
        status, job = load(cluster.nodes[0], capsys)
        assert (status, job["state"]) == (0, "SUCCEEDED"), job["message"]
        assert (job["files_total"], job["files_done"], job["files_failed"]) == (61, 61, 0)
        assert job["bytes_total"] == job["bytes_done"] == DATASET_BYTES
        assert store.bytes_sent == DATASET_BYTES
        assert max(Counter(store.gets).values()) == 1
        assert Counter(store.lists) == {"": 1, "small/": 1}, "one LIST run per directory, for leader and parts alike"
        shares = [held(node) for node in cluster.nodes]
        assert sum(shares) == DATASET_BYTES
        assert min(shares) > 0
        assert load(cluster.nodes[1], capsys)[0] == 0
        assert store.bytes_sent == DATASET_BYTES


def test_two_replicas_are_on_two_nodes_and_cost_the_store_nothing_more(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--replicas 2`: twice the bytes in the caches, once from the store, and `stat` shows them on two nodes."""
    with loading_cluster(tmp_path, 3) as (cluster, store):
        status, job = load(cluster.nodes[2], capsys, "--replicas", "2")
        assert (status, job["files_done"]) == (0, 61), job["message"]
        assert job["bytes_done"] == 2 * DATASET_BYTES
        assert sum(held(node) for node in cluster.nodes) == 2 * DATASET_BYTES
        assert store.bytes_sent == DATASET_BYTES
        assert orchestra(cluster.nodes[0], "stat", "--json", "/data/small/007") == 0
        nodes = json.loads(capsys.readouterr().out)["nodes"]
        assert sorted(one["held_bytes"] for one in nodes) == [0, 1007, 1007]


def test_failures_are_one_list_and_can_be_retried(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A store that fails everything: each file is listed once, whoever owns its parts; then --retry brings them all."""
    with loading_cluster(tmp_path, 3) as (cluster, store):
        store.broken = {"small/001", "small/002", "large"}
        status, job = load(cluster.nodes[0], capsys)
        assert (status, job["state"], job["reason"]) == (1, "FAILED", "files")
        assert job["files_failed"] == 3
        failures = job["failures"]
        assert isinstance(failures, list)
        assert sorted(one["path"] for one in failures) == ["/data/large", "/data/small/001", "/data/small/002"]
        store.broken = set()
        status, job = load(cluster.nodes[1], capsys, "--retry")  # from another node than the one that led
        assert (status, job["files_total"], job["files_done"]) == (0, 3, 3), job["message"]
        assert sum(held(node) for node in cluster.nodes) == DATASET_BYTES


def test_jobs_are_listed_followed_and_stopped_from_any_node(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A job that one node leads is shown, waited for and stopped by the others, under one id."""
    with loading_cluster(tmp_path, 3) as (cluster, store):
        store.hold()
        assert orchestra(cluster.nodes[0], "load", "/data", "--json") == 0
        job_id = json.loads(capsys.readouterr().out)["id"]
        for node in cluster.nodes:
            assert orchestra(node, "job", "ls", "--json") == 0
            assert [one["id"] for one in json.loads(capsys.readouterr().out)] == [job_id]
            assert orchestra(node, "job", "status", job_id) == 0
            assert "RUNNING" in capsys.readouterr().out
            assert orchestra(node, "load", "/data", "--json") == 0, "a load that is under way is that job"
            assert json.loads(capsys.readouterr().out)["id"] == job_id
        assert orchestra(cluster.nodes[2], "job", "stop", job_id) == 0
        assert "STOPPED" in capsys.readouterr().out
        store.release()
        assert orchestra(cluster.nodes[1], "job", "wait", job_id) == 1
        assert orchestra(cluster.nodes[1], "job", "status", "99-zzzz") == 1
        assert "there is no job '99-zzzz'" in capsys.readouterr().err


def test_a_share_that_does_not_fit_fails_the_load_before_anything_is_fetched(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The line names the node and its room; --partial loads as much as fits."""
    with loading_cluster(tmp_path, 2, size="512KiB") as (cluster, store):
        status, job = load(cluster.nodes[0], capsys)
        assert (status, job["reason"]) == (1, "space")
        assert str(job["message"]).startswith("node 127.0.0.")
        assert store.gets == []
        status, job = load(cluster.nodes[0], capsys, "--partial")
        assert (status, job["state"]) == (0, "SUCCEEDED"), job["message"]
        assert 0 < sum(held(node) for node in cluster.nodes) < DATASET_BYTES


def test_a_node_killed_in_the_middle_costs_a_round_and_no_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its share is loaded by those that are left, and the job succeeds."""
    with loading_cluster(tmp_path, 3) as (cluster, store):
        job_id = held_up_load(cluster.nodes[0], store, capsys)
        cluster.kill(2)
        store.release()
        assert_all_is_loaded(cluster.nodes[0], job_id, capsys)
        assert sum(held(node) for node in cluster.nodes[:2]) == DATASET_BYTES


def test_a_leader_killed_in_the_middle_goes_on_when_its_daemon_is_started_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The job has the same id, is carried out by all nodes again, and fetches nothing twice that was there."""
    with loading_cluster(tmp_path, 3) as (cluster, store):
        job_id = held_up_load(cluster.nodes[0], store, capsys)
        cluster.kill(0)
        store.release()
        cluster.nodes[0].start()
        assert_all_is_loaded(cluster.nodes[1], job_id, capsys)
        assert sum(held(node) for node in cluster.nodes) >= DATASET_BYTES


def test_etcd_tells_of_a_job_whose_node_is_gone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With etcd a job that is over is shown by others after its node was killed; what is written there is bounded."""
    (tmp_path / "etcd").mkdir()
    with etcd_server(tmp_path / "etcd") as etcd, loading_cluster(tmp_path, 2, etcd=etcd.endpoint) as (cluster, _):
        status, job = load(cluster.nodes[1], capsys)
        assert status == 0, job["message"]
        first = cluster.nodes[0].client()

        def told() -> list[dict[str, object]]:
            return [one for one in first.daemon_request("GET", "/v1/jobs")["jobs"] if one["id"] == job["id"]]

        assert [one["state"] for one in told()] == ["SUCCEEDED"]
        wait_until(lambda: any(b"SUCCEEDED" in path.read_bytes() for path in (tmp_path / "etcd").rglob("*.wal")))
        cluster.kill(1)
        wait_until(lambda: [one["state"] for one in told()] == ["SUCCEEDED"])
        assert orchestra(cluster.nodes[0], "job", "status", str(job["id"])) == 0
        assert "SUCCEEDED" in capsys.readouterr().out


def test_rows_of_etcd_that_are_no_jobs_harm_nobody_and_an_unfinished_takeover_is_finished(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever somebody wrote below the prefix: the daemon lives, touches no other file and leads loads. A row that
    names this node, of a job that it does not know (its takeover was written, and the answer was lost), is gone on
    with after the five seconds that any takeover waits."""
    (tmp_path / "etcd").mkdir()
    with etcd_server(tmp_path / "etcd") as etcd, loading_cluster(tmp_path, 1, etcd=etcd.endpoint) as (cluster, _):
        node = cluster.nodes[0]
        mine = node.status()["cluster"]["node_id"]
        lost = Job("7-abcdef", LoadSpec("/data"), 1.0, JobState.RUNNING, term=3).to_json()
        outside = str(tmp_path / "outside")
        rows = [
            {**lost, "leader": mine},
            {**lost, "id": "8-abcdef", "leader": []},
            {**lost, "id": "9-abcdef", "leader": mine, "files_total": float("inf")},
            {**lost, "id": f"{outside}-1", "leader": mine},
            {**lost, "id": f"{outside}-2", "leader": "gone"},
        ]
        asyncio.run(_write(etcd, rows))
        wait_until(lambda: "7-abcdef" in [one["id"] for one in node.client().daemon_request("GET", "/v1/jobs")["jobs"]])
        assert_all_is_loaded(node, "7-abcdef", capsys)
        assert orchestra(node, "job", "ls", "--json") == 0
        assert [(one["id"], one["term"]) for one in json.loads(capsys.readouterr().out)] == [("7-abcdef", 4)]
        assert not list(tmp_path.glob("outside*"))
        assert load(node, capsys)[0] == 0


async def _write(etcd: EtcdServer, rows: Sequence[dict[str, object]]) -> None:
    """Write these rows of jobs, as a stranger may."""
    gateway = EtcdGateway([etcd.endpoint], timeout_s=5.0)
    try:
        for row in rows:
            await gateway.put_if_unchanged(PREFIX + str(row["id"]).encode(), json.dumps(row).encode(), "0", 0)
    finally:
        await gateway.close()


def test_a_load_whose_leader_stays_away_goes_on_at_another_node(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With etcd, kill -9 of the node that leads a load: when its lease has ended (10 s, hence a long test) another node
    leads the job under its id and ends it. What the living nodes fetch is fetched once; only what the dead one had
    under way comes again. The leader that comes back finds that the job is not its own any more, and its next one has
    another id."""
    (tmp_path / "etcd").mkdir()
    with etcd_server(tmp_path / "etcd") as etcd, loading_cluster(tmp_path, 3, etcd=etcd.endpoint) as (cluster, store):
        store.hold()
        leader, *others = cluster.nodes
        assert orchestra(leader, "load", "/data", "--json") == 0
        job_id = json.loads(capsys.readouterr().out)["id"]
        wait_until(lambda: any(b"RUNNING" in path.read_bytes() for path in (tmp_path / "etcd").rglob("*.wal")))
        wait_until(lambda: store.waiting_count > 0)
        cluster.kill(0)
        in_flight = store.waiting_count
        store.release()
        assert orchestra(others[0], "job", "wait", "--json", job_id) == 0
        job = json.loads(capsys.readouterr().out)
        assert (job["state"], job["files_done"], job["term"]) == ("SUCCEEDED", 61, 1), job["message"]
        statuses = [node.status() for node in others]
        assert sum(status["blocks"]["written_bytes"] for status in statuses) == DATASET_BYTES
        assert len(store.gets) - sum(status["cluster"]["shared"]["from_store"] for status in statuses) <= in_flight
        [kept] = leader.cache_dir.rglob(f"{job_id}.json")
        leader.start()
        wait_until(lambda: not kept.exists())
        for node in cluster.nodes:
            capsys.readouterr()
            assert orchestra(node, "job", "ls", "--json") == 0
            assert [(one["id"], one["state"]) for one in json.loads(capsys.readouterr().out)] == [(job_id, "SUCCEEDED")]
        assert orchestra(leader, "load", "/data/small", "--wait", "--json") == 0
        job = json.loads(capsys.readouterr().out)
        assert job["id"] != job_id, "the old one is in use at another node"
        assert (job["path"], job["files_done"], job["term"]) == ("/data/small", 60, 0)
