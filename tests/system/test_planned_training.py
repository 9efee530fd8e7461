"""Training by a plan with real loaders: workers under fork and spawn, two ranks, a daemon that is killed, a resumption
on another number of ranks, a mounted folder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader

from orchestra.torch import PlannedSampler
from tests.support.node import PATIENCE_S, DaemonNode, folder_daemon_node
from tests.support.ram import ram_folder
from tests.support.reading import ROOT
from tests.support.training import BATCH, Samples, only_indexes, paths_of, write_samples

pytestmark = pytest.mark.system

COUNT = 50


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """In memory: see tests/support/ram.py."""
    with ram_folder() as folder:
        yield folder


@pytest.fixture
def node(tmp_path: Path) -> Iterator[DaemonNode]:
    with folder_daemon_node(tmp_path) as (node, folder):
        write_samples(folder, COUNT)
        yield node


def plans_of(node: DaemonNode) -> list[dict[str, Any]]:
    return list(node.client().daemon_request("GET", "/v1/plans")["plans"])


def loader_of(node: DaemonNode, sampler: PlannedSampler, **options: Any) -> DataLoader[Any]:
    dataset = Samples(str(node.config_path), COUNT)
    return DataLoader(dataset, batch_size=BATCH, sampler=sampler, collate_fn=only_indexes, **options)


def order_of(seed: int, epoch: int) -> list[int]:
    sampler = PlannedSampler(paths_of(COUNT), seed, config="/nonexistent")
    sampler.set_epoch(epoch)
    return list(sampler)


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_read_by_the_plan(node: DaemonNode, context: str) -> None:
    """Two epochs with two workers: the sampler's order, the right bytes, and every file fetched once."""
    sampler = PlannedSampler(paths_of(COUNT), 3, config=str(node.config_path))
    loader = loader_of(node, sampler, num_workers=2, multiprocessing_context=context)
    for epoch in range(2):
        assert [index for batch in loader for index in batch] == order_of(3, epoch)
    (plan,) = plans_of(node)
    assert (plan["epoch"], plan["position"], plan["failed"]) == (1, COUNT, 0)
    assert node.status()["fetch"]["requests"] == COUNT
    sampler.close()
    assert plans_of(node) == []


def test_a_daemon_that_is_killed_costs_nothing_but_time(node: DaemonNode) -> None:
    """kill -9 in the middle of an epoch: the order and the bytes are the same, and its successor knows the plan."""
    sampler = PlannedSampler(paths_of(COUNT), 3, config=str(node.config_path))
    read: list[int] = []
    for batch in loader_of(node, sampler, num_workers=1):
        read += batch
        if len(read) == 5 * BATCH:
            os.kill(node.status()["pid"], signal.SIGKILL)
    assert read == order_of(3, 0)
    assert [index for batch in loader_of(node, sampler, num_workers=1) for index in batch] == order_of(3, 1)
    (plan,) = plans_of(node)
    assert (plan["epoch"], plan["position"]) == (1, COUNT)
    sampler.close()


def test_training_goes_on_where_no_daemon_can_be_started(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A plan that nobody takes is one warning; the order is the same."""
    with folder_daemon_node(tmp_path, daemon={"autostart": False}) as (node, folder):
        write_samples(folder, COUNT)
        sampler = PlannedSampler(paths_of(COUNT), 3, config=str(node.config_path))
        assert [list(sampler), list(sampler)] == [order_of(3, 0), order_of(3, 1)]
    assert sum("could not be published" in record.getMessage() for record in caplog.records) == 3  # two of order_of


# -- ranks ---------------------------------------------------------------------------------------------------------


def run_ranks(node: DaemonNode, root: Path, world: int, *arguments: str) -> list[dict[str, Any]]:
    """Run a training of `world` ranks over gloo; return what each wrote."""
    store = root / f"store-{len(list(root.iterdir()))}"
    outs = [root / f"out-{rank}" for rank in range(world)]
    ranks = [
        training(node, out, "--rank", str(rank), "--world", str(world), "--store", f"file://{store}", *arguments)
        for rank, out in enumerate(outs)
    ]
    for rank in ranks:
        _, errors = rank.communicate(timeout=PATIENCE_S)
        assert rank.returncode == 0, errors
    return [json.loads(out.read_text()) for out in outs]


def training(node: DaemonNode, out: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.support.training", str(node.config_path), str(COUNT), "--out", str(out)]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, *arguments], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    )


def woven(parts: Sequence[list[int]]) -> list[int]:
    return [index for step in zip(*parts, strict=True) for index in step]


def test_every_rank_publishes_its_own_share(node: DaemonNode, tmp_path: Path) -> None:
    """Two processes over gloo: two plans in one daemon, which together are the epoch; each file is fetched once."""
    told = run_ranks(node, tmp_path, 2, "--epochs", "2")
    for epoch in range(2):
        assert woven([rank["epochs"][epoch] for rank in told]) == order_of(7, epoch)
    plans = told[0]["plans"]
    assert [(plan["epoch"], plan["epoch_samples"], plan["failed"]) for plan in plans] == [(1, COUNT // 2, 0)] * 2
    assert node.status()["fetch"]["requests"] == COUNT


def test_a_job_resumes_on_another_number_of_ranks(node: DaemonNode, tmp_path: Path) -> None:
    """Two ranks with workers stop after three batches of the second epoch; one goes on with exactly the rest."""
    state = tmp_path / "state.pt"
    begun = run_ranks(node, tmp_path, 2, "--state", str(state), "--stop-after", "3", "--workers", "1")
    ended = run_ranks(node, tmp_path, 1, "--state", str(state), "--epochs", "2")
    read = woven([rank["epochs"][0] for rank in begun])
    assert len(read) == 3 * 2 * BATCH
    assert read + ended[0]["epochs"][0] == order_of(7, 0)
    assert ended[0]["epochs"][1] == order_of(7, 1)
