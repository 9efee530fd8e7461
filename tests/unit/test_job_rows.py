"""What etcd holds of jobs: each row is read once, and one that is no job harms nobody."""

from __future__ import annotations

import json
from typing import Any

import pytest

from orchestra.cluster.etcd_table import Row
from orchestra.daemon.jobs.job import Job, LoadSpec
from orchestra.daemon.nodes.job_rows import JobRows

ID = "7-abcdef"


def row_of(job_id: str = ID, revision: int = 1, **changes: Any) -> Row:
    """A row as a node writes it, but for some fields."""
    shown = {**Job(job_id, LoadSpec("/data"), 1.0).to_json(), "leader": "a", **changes}
    return Row(json.dumps(shown).encode(), revision)


def test_a_row_is_read_once_after_it_changed() -> None:
    """Another job's change costs nothing; nor does being asked again."""
    rows = JobRows()
    rows.changed({b"7-abcdef": row_of(), b"8-abcdef": row_of("8-abcdef")})
    before = dict(rows.by_id())
    assert sorted(before) == ["7-abcdef", "8-abcdef"]
    assert (before[ID].leader, before[ID].job.spec.path) == ("a", "/data")
    rows.changed({b"7-abcdef": row_of(), b"8-abcdef": row_of("8-abcdef", 2, leader="b")})
    after = rows.by_id()
    assert after[ID] is before[ID]
    assert after["8-abcdef"].leader == "b"
    assert rows.by_id() is after
    rows.changed({})
    assert not rows.by_id()


@pytest.mark.parametrize(
    "row",
    [
        Row(b"", 1),
        Row(b"\xff", 1),
        Row(b"[]", 1),
        Row(b"[" * 100_000, 1),
        row_of(leader=[]),
        row_of(leader=None),
        row_of(files_total=float("inf")),
        row_of(created_s=float("nan")),
        row_of(term=-1),
        row_of(state=[]),
        row_of(state="LOST"),
        row_of(path="/a/../b"),
        row_of(path={}),
        row_of(failures=[1]),
        row_of(replicas=10**9),
        row_of("8-abcdef"),
    ],
)
def test_a_row_that_is_no_job_is_left_out_and_said_once(row: Row, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever it holds; the other rows count."""
    rows = JobRows()
    for _ in range(2):
        rows.changed({ID.encode(): row, b"9-abcdef": row_of("9-abcdef")})
        assert list(rows.by_id()) == ["9-abcdef"]
    assert caplog.text.count("is left out") == 1


@pytest.mark.parametrize(
    "job_id", ["/etc/x", "../../x", "7-abcdef/../x", "7-ABCDEF", "07-abcdef", "7-abcdef\n", "9999999999-abcdef"]
)
def test_an_id_that_is_none_names_no_file(job_id: str) -> None:
    """A row of such a name is left out: an id becomes part of a path."""
    rows = JobRows()
    rows.changed({job_id.encode(): row_of(job_id)})
    assert not rows.by_id()
