"""What `orchestra load` shows before it is known what there is to do, against a daemon that answers by a script."""

from __future__ import annotations

from typing import Any

import pytest

from orchestra.cli.job import wait_planned
from orchestra.cli.session import Session

_JOB = {"id": "7", "path": "/data", "files_total": 3000, "files_done": 0, "files_failed": 0, "bytes_total": 0}
_JOB |= {"bytes_done": 0, "rate_bytes_per_s": 0, "eta_s": None}


class _ScriptedSession(Session):
    """Answers each question about the job with its next state; "interrupt" is a Ctrl-C."""

    def daemon_request(self, method: str, route: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        state = _STATES.pop(0)
        if state == "interrupt":
            raise KeyboardInterrupt
        return {**_JOB, "state": state}


_STATES: list[str] = []


def test_ctrl_c_while_the_store_is_listed_says_that_the_job_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    """Listing a million objects takes a minute: whoever leaves then is told how to stop the job."""
    _STATES[:] = ["CREATED", "interrupt"]
    with pytest.raises(KeyboardInterrupt):
        wait_planned(_ScriptedSession(), {**_JOB, "state": "CREATED"}, quiet=False)
    assert "job 7 goes on; stop it with: orchestra job stop 7" in capsys.readouterr().err


def test_listing_is_shown_on_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """From the second look on, so that a short one shows nothing; --json shows nothing at all."""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    for quiet, shown in ((False, 1), (True, 0)):
        _STATES[:] = ["CREATED", "RUNNING"]
        assert wait_planned(_ScriptedSession(), {**_JOB, "state": "CREATED"}, quiet=quiet)["state"] == "RUNNING"
        assert capsys.readouterr().err.count("looking at /data: 3000 files") == shown
