"""The limit that overlap.py prints beside what was measured, where it can be reckoned by hand."""

from __future__ import annotations

import pytest
from blind import Setting, blind_limit


def test_one_file_hides_nothing() -> None:
    """Latency, transfer and computing follow one another: 1 s of 1.75 s."""
    assert blind_limit(Setting(1, 4, 8, latency_s=0.25, io_s=0.5, compute_s=1.0)) == pytest.approx(1 / 1.75)


def test_without_latency_the_link_is_never_idle() -> None:
    """One reader after the other takes all of it; the last batch is computed after the last byte."""
    reached = blind_limit(Setting(100, 1, 10, latency_s=0.0, io_s=10.0, compute_s=1.0))
    assert reached == pytest.approx(10 / 10.1)


def test_more_workers_than_the_link_needs_are_bound_by_their_first_batches() -> None:
    """Eight workers fill a link that six requests fill: what is lost is the start, in which each reads a batch."""
    wide, narrow = (blind_limit(Setting(900, workers, 8, 0.05, 9.0, 9.0)) for workers in (8, 4))
    assert 9 / 9.7 < wide < 9 / 9.5
    assert narrow < 0.85
