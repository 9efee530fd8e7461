"""`orchestra mount` and `orchestra daemon`: what is asked of the daemon, and what is shown of its answers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from orchestra.cli.main import main


class RecordingClient:
    """Answers GET with its mounts and writes down every other request."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, str, Mapping[str, Any] | None]] = []
        self.mounts: list[dict[str, Any]] = [
            {
                "path": "/x",
                "uris": ["s3://b/x"],
                "readonly": True,
                "freshness_s": "immutable",
                "prefetch": "dataset",
                "options": {"region": "eu", "secret": "canary-7f3", "token": "${TOKEN}"},
                "quota_bytes": 1 << 30,
                "ttl_s": None,
                "source": "added",
            }
        ]

    def daemon_request(self, method: str, route: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        if method == "GET":
            return {"mounts": self.mounts}
        self.requests.append((method, route, body))
        return {}

    def close(self) -> None:
        return None


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> RecordingClient:
    """Let the command line talk to it."""
    client = RecordingClient()
    monkeypatch.setattr("orchestra.client.asking.DaemonAsker.request", lambda self, *args: client.daemon_request(*args))
    return client


def test_add_sends_the_whole_mount(client: RecordingClient) -> None:
    """Options are split at the first "=", what is not given has its default."""
    arguments = ["--option", "endpoint_url=http://h:1/?a=b", "--option", "secret=${S}", "--freshness", "5m"]
    assert main(["mount", "add", "/y", "s3://near/y", "s3://far/y", *arguments]) == 0
    body = {
        "path": "/y",
        "uris": ["s3://near/y", "s3://far/y"],
        "readonly": True,
        "freshness_s": 300,
        "prefetch": "readahead",
        "options": {"endpoint_url": "http://h:1/?a=b", "secret": "${S}"},
        "quota_bytes": None,
        "ttl_s": None,
    }
    assert client.requests == [("POST", "/v1/mounts", body)]


def test_immutable_travels_as_a_word(client: RecordingClient) -> None:
    """JSON has no infinity."""
    assert main(["mount", "add", "/y", "s3://b", "--freshness", "immutable", "--writable"]) == 0
    body = client.requests[0][2]
    assert body is not None
    assert (body["freshness_s"], body["readonly"]) == ("immutable", False)
    json.dumps(body, allow_nan=False)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--freshness", "5 parsecs"], "freshness: unknown unit 'parsecs'"),
        (["--option", "secret=${X"], "option secret: '${' without a closing '}'"),
    ],
)
def test_a_bad_value_is_refused_before_the_daemon_is_asked(
    client: RecordingClient, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same sentences as for the file, with status 1."""
    assert main(["mount", "add", "/y", "s3://b", *arguments]) == 1
    assert words in capsys.readouterr().err
    assert client.requests == []


def test_update_keeps_what_is_not_given(client: RecordingClient) -> None:
    """Only the fields given change; options are merged and can be dropped."""
    arguments = ["--freshness", "60s", "--option", "region=us", "--remove-option", "token", "--ttl", "7d"]
    assert main(["mount", "update", "/x/", *arguments]) == 0
    body = {
        "path": "/x",
        "uris": ["s3://b/x"],
        "readonly": True,
        "freshness_s": 60,
        "prefetch": "dataset",
        "options": {"region": "us", "secret": "canary-7f3"},
        "quota_bytes": 1 << 30,
        "ttl_s": 7 * 86400,
    }
    assert client.requests == [("PUT", "/v1/mounts", body)]


def test_a_limit_is_taken_back_with_none(client: RecordingClient) -> None:
    """`--quota none` and `--ttl none` send no limit; what is not given stays."""
    assert main(["mount", "update", "/x", "--quota", "none"]) == 0
    assert main(["mount", "update", "/x", "--ttl", "none"]) == 0
    without_quota, without_ttl = (body for _, _, body in client.requests)
    assert without_quota is not None
    assert without_ttl is not None
    assert without_quota["quota_bytes"] is None
    assert (without_ttl["quota_bytes"], without_ttl["ttl_s"]) == (1 << 30, None)


def test_update_of_nothing_is_an_error(client: RecordingClient, capsys: pytest.CaptureFixture[str]) -> None:
    """A path where nothing is mounted is named."""
    assert main(["mount", "update", "/nope", "--readonly"]) == 1
    assert "nothing is mounted at /nope" in capsys.readouterr().err
    assert client.requests == []


def test_rm_quotes_the_path(client: RecordingClient) -> None:
    """A path of any characters arrives as it is."""
    assert main(["mount", "rm", "/a b&c"]) == 0
    assert client.requests == [("DELETE", "/v1/mounts?path=/a%20b%26c", None)]


@pytest.mark.parametrize("json_flag", [[], ["--json"]])
@pytest.mark.usefixtures("client")
def test_ls_shows_no_secret(json_flag: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """A secret given inline is masked; a variable that names one is shown."""
    assert main(["mount", "ls", *json_flag]) == 0
    output = capsys.readouterr().out
    assert "canary-7f3" not in output
    assert "${TOKEN}" in output
    assert "immutable" in output
    assert "/x" in output


STATUS = {
    "pid": 42,
    "socket": "/cache/s",
    "cache_dir": "/cache",
    "used_bytes": 1536,
    "capacity_bytes": 4096,
    "uptime_s": 61.5,
    "version": "0.1.0",
}


class TestDaemon:
    @pytest.fixture(autouse=True)
    def default_configuration(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Run where no configuration is found."""
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
        monkeypatch.setenv("ORCHESTRA_CACHE_DIR", str(tmp_path / "cache"))

    def test_status_is_shown(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        """For people, and exact as JSON."""
        monkeypatch.setattr("orchestra.client.process.daemon_status", lambda config: STATUS)
        assert main(["daemon", "status"]) == 0
        assert "cached:          1.5 KiB of 4.0 KiB" in capsys.readouterr().out
        assert main(["daemon", "status", "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == STATUS

    def test_no_daemon_is_status_1(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """The line says for which cache directory, and how to start one."""
        assert main(["daemon", "status", "--json"]) == 1
        line = f"no daemon runs for the cache directory {tmp_path}/cache; start it with: orchestra daemon start"
        assert capsys.readouterr() == ("", f"orchestra: {line}\n")

    def test_start_says_when_one_runs(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """That is no error: status 0, and nothing is started."""
        monkeypatch.setattr("orchestra.client.process.daemon_status", lambda config: STATUS)
        monkeypatch.setattr("orchestra.client.process.start_daemon", lambda config: pytest.fail("started a second one"))
        assert main(["daemon", "start"]) == 0
        assert capsys.readouterr().out == "running already (pid 42, socket /cache/s)\n"

    def test_stop_without_a_daemon_is_no_error(self, capsys: pytest.CaptureFixture[str]) -> None:
        """What is wanted is so already."""
        assert main(["daemon", "stop"]) == 0
        assert capsys.readouterr().out == "no daemon was running\n"
