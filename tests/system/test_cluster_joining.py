"""Daemons with a table [cluster]: they find one another, and say so."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from orchestra.cli.main import main
from tests.support.clusters import cluster_of, health, ring_of, wait_until
from tests.support.members import free_port

pytestmark = pytest.mark.system


def test_three_daemons_of_one_list_have_one_ring(tmp_path: Path) -> None:
    """Each answers /healthz with its record and sees all three; when one stops, the others' ring is without it."""
    with cluster_of(tmp_path, 3, mounts=[]) as cluster:
        cluster.start()
        assert len({ring_of(node)["digest"] for node in cluster.nodes}) == 1
        for node in cluster.nodes:
            listen = node.config.cluster.listen if node.config.cluster else ""
            assert health(listen)["node_id"] == listen
            assert health(listen)["capacity_bytes"] == node.config.cache.size_bytes
        cluster.nodes[2].stop()
        wait_until(lambda: ring_of(cluster.nodes[0])["nodes"] == 2)


def test_a_port_that_is_taken_ends_the_start_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The line names the key and the address; nothing is left behind that holds the cache directory."""
    path = tmp_path / "orchestra.toml"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        path.write_text(f'[cache]\ndir = "{tmp_path}/c"\n[cluster]\nlisten = "{listen}"\nnodes = ["{listen}"]\n')
        assert main(["--config", str(path), "daemon", "run"]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"orchestra: cluster.listen {listen} cannot be opened")


def test_a_secret_that_others_may_read_ends_the_start_with_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the cache directory is made: chmod 600 is what the line says."""
    secret = tmp_path / "secret"
    secret.write_text("0123456789abcdef0123456789abcdef")
    secret.chmod(0o644)
    listen = f"127.0.0.1:{free_port()}"
    path = tmp_path / "orchestra.toml"
    path.write_text(
        f'[cache]\ndir = "{tmp_path}/c"\n[cluster]\nlisten = "{listen}"\nnodes = ["{listen}"]\nsecret_file = "{secret}"'
    )
    assert main(["--config", str(path), "daemon", "run"]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "chmod 600" in err
    assert not (tmp_path / "c").exists()
