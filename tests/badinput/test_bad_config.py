"""The configuration rows of reliability.md's list of bad inputs, as data: each is refused in one line that helps.

Every row is put to `load_config` and to the command line, which ends with status 1, prints nothing on standard output
and exactly one line on standard error.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from orchestra.cli.main import main
from orchestra.config import load_config
from orchestra.errors import ConfigError

MOUNT = '[[mount]]\npath = "/x"\nuri = "s3://b/x"\n'


@dataclass(frozen=True)
class BadConfig:
    """One bad input: the file's text (None: no file), the environment, and words of the error in their order."""

    row: str
    text: str | bytes | None
    words: tuple[str, ...]
    environ: dict[str, str] = field(default_factory=dict)
    mode: int = 0o600


def cache(line: str) -> str:
    """Return a file whose table [cache] holds `line`."""
    return f"[cache]\n{line}\n"


LISTEN = '[cluster]\nlisten = "127.0.0.1:7420"\n'
STATIC = LISTEN + 'nodes = ["127.0.0.1:7420"]\n'
CLUSTER_ROWS = [
    BadConfig(
        "3-cluster-key", STATIC + "replica = 2", ("unknown key 'replica' in [cluster]; did you mean 'replicas'",)
    ),
    BadConfig(
        "3-cluster-variable", "", ("$ORCHESTRA_CLUSTER_LISTN; did you", "LISTEN'?"), {"ORCHESTRA_CLUSTER_LISTN": "x"}
    ),
    BadConfig("4-cluster-table", "cluster = 3", ("cluster: expected a table [cluster], got 3",)),
    BadConfig("4-cluster-nodes", LISTEN + 'nodes = "a:1"', ("cluster.nodes: expected a list of 1 to 1024", "'a:1'")),
    BadConfig("4-cluster-no-nodes", LISTEN + "nodes = []", ("cluster.nodes: expected a list of 1 to 1024",)),
    BadConfig("4-cluster-number", LISTEN + "nodes = [7420]", ("cluster.nodes: expected host:port such as", "7420")),
    BadConfig("4-cluster-word", STATIC + 'membership = "zk"', ("expected one of static, dns, etcd, got 'zk'",)),
    BadConfig("4-cluster-fallback", STATIC + 'ufs_fallback = "no"', ("expected one of allow, warn, fail, got 'no'",)),
    BadConfig("22-no-port", '[cluster]\nlisten = "10.0.0.1"', ("cluster.listen: expected host:port", "'10.0.0.1'")),
    BadConfig("22-port-0", '[cluster]\nlisten = "h:0"', ("cluster.listen: expected host:port", "'h:0'")),
    BadConfig("22-port-70000", '[cluster]\nlisten = "h:70000"', ("cluster.listen: expected host:port", "'h:70000'")),
    BadConfig("22-port-word", '[cluster]\nlisten = "h:abc"', ("cluster.listen: expected host:port", "'h:abc'")),
    BadConfig("22-no-listen", "[cluster]\nreplicas = 2", ("cluster: key 'listen' is missing (the address",)),
    BadConfig("22-everywhere", '[cluster]\nlisten = "0.0.0.0:7420"', ("reach this one", "$ORCHESTRA_CLUSTER_LISTEN")),
    BadConfig("22-twice", LISTEN + 'nodes = ["a:1", "a:1"]', ("cluster.nodes: 'a:1' stands twice",)),
    BadConfig(
        "22-not-itself",
        LISTEN + 'nodes = ["127.0.0.2:1"]',
        ("cluster.nodes must contain this node's own address, 127.0.0.1:7420 (cluster.listen)",),
    ),
    BadConfig(
        "23-no-secret",
        '[cluster]\nlisten = "10.0.0.1:7420"\nnodes = ["10.0.0.1:7420"]',
        ("cluster: key 'secret_file' is missing: refusing to speak with 10.0.0.1:7420, which is not this machine",),
    ),
    BadConfig(
        "23-no-secret-node",
        LISTEN + 'nodes = ["127.0.0.1:7420", "10.0.0.2:7420"]',
        ("key 'secret_file' is missing: refusing to speak with 10.0.0.2:7420",),
    ),
    BadConfig(
        "23-no-secret-dns", LISTEN + 'membership = "dns"\nname = "nodes.svc"', ("refusing to speak with nodes.svc",)
    ),
    BadConfig(
        "23-secret-path", STATIC + 'secret_file = "secret"', ("expected the absolute path of a file", "'secret'")
    ),
    BadConfig("27-zero", STATIC + "replicas = 0", ("cluster.replicas: expected a whole number from 1 to 64, got 0",)),
    BadConfig("27-negative", STATIC + "replicas = -1", ("cluster.replicas: expected a whole number from 1", "-1")),
    BadConfig(
        "28-missing", LISTEN + 'membership = "etcd"', ("cluster: key 'endpoints' is missing (membership is etcd)",)
    ),
    BadConfig(
        "28-not-etcd",
        STATIC + 'endpoints = ["http://127.0.0.1:2379"]',
        ("cluster.endpoints belongs to membership etcd",),
    ),
    *(
        BadConfig(
            f"28-{name}", LISTEN + f'membership = "etcd"\nendpoints = ["{endpoint}"]', ("cluster.endpoints: ", words)
        )
        for name, endpoint, words in (
            ("no-port", "http://127.0.0.1", "expected an address such as http://127.0.0.1:2379"),
            ("path", "http://127.0.0.1:2379/v3", "expected an address such as http://127.0.0.1:2379"),
            ("scheme", "tcp://127.0.0.1:2379", "expected an address such as http://127.0.0.1:2379"),
            ("port", "http://127.0.0.1:99999", "expected an address such as http://127.0.0.1:2379"),
            ("password", "http://me:canary-7f3@127.0.0.1:2379", "with a user or password in it is not supported"),
        )
    ),
    BadConfig("28-name", LISTEN + 'membership = "dns"\nname = "a b"', ("cluster.name: expected a host name",)),
    BadConfig(
        "replication-alone", MOUNT + "replication = { min = 1 }", ("mount /x: replication needs a table [cluster]",)
    ),
    BadConfig(
        "replication-key",
        MOUNT + "replication = { mni = 1 }",
        ("unknown key 'mni' in replication; did you mean 'min'?",),
    ),
    BadConfig("replication-table", MOUNT + "replication = 2", ("replication: expected a table such as", "got 2")),
    BadConfig(
        "replication-order", MOUNT + "replication = { min = 3, max = 2 }", ("replication.min (3) is more than max (2)",)
    ),
    BadConfig(
        "replication-zero", MOUNT + "replication = { min = 0 }", ("replication.min: expected a whole number from 1",)
    ),
    BadConfig(
        "replication-max",
        STATIC + "replicas = 3\n" + MOUNT + "replication = { max = 2 }",
        ("mount /x: replication.max (2) is less than cluster.replicas (3)",),
    ),
]


ROWS = [
    BadConfig("1-missing", None, ("config file not found: {file} (looked in {file}, named by ",)),
    BadConfig("2-syntax", '[cache]\nsize = "1GiB\n', ("{file}:2:", ": ")),
    BadConfig("2-syntax-at-the-end", "[cache", ("{file}", "at the end of the file")),
    BadConfig("2-not-text", b'[cache]\ndir = "\xff"\n', ("{file}:2: not UTF-8 text",)),
    BadConfig("2-folder", "FOLDER", ("{file}: cannot be read: Is a directory",)),
    BadConfig("3-key", cache('dri = "/c"'), ("{file}: unknown key 'dri' in [cache]; did you mean 'dir'?",)),
    BadConfig("3-far-key", cache("colour = 1"), ("unknown key 'colour' in [cache] (known: dir, size, ",)),
    BadConfig("3-table", '[chache]\nsize = "1GiB"', ("unknown table 'chache'; did you mean 'cache'?",)),
    BadConfig("3-mount-key", MOUNT + "red_only = true", ("mount 1 (/x): unknown key 'red_only'; did you mean",)),
    BadConfig("3-variable", "", ("unknown variable $ORCHESTRA_CACHE_SIZ; did", "SIZE'?"), {"ORCHESTRA_CACHE_SIZ": "1"}),
    BadConfig("4-size", cache('size = "ten"'), ("{file}: cache.size: expected a size such as 10GiB, got 'ten'",)),
    BadConfig("4-bool", "[daemon]\nautostart = 1", ("daemon.autostart: expected true or false, got 1",)),
    BadConfig("4-bool-text", '[daemon]\nautostart = "yes"', ("daemon.autostart: expected true or false, got 'yes'",)),
    BadConfig("4-number", cache('free_space_ratio = "x"'), ("expected a number from 0 to 0.95, got 'x'",)),
    BadConfig("4-table", "cache = 3", ("cache: expected a table [cache], got 3",)),
    BadConfig("4-mounts", '[mount]\npath = "/x"', ("mount: expected tables, each headed [[mount]]",)),
    BadConfig("4-word", cache('eviction = "fifo"'), ("cache.eviction: expected one of auto, lru,", "got 'fifo'")),
    BadConfig("4-option", MOUNT + "options = { a = [1] }", ("option a: expected text, a whole number or", "a list")),
    BadConfig("4-options", MOUNT + 'options = "a=b"', ("options: expected a table",)),
    BadConfig("4-in-variable", "", ("$ORCHESTRA_CACHE_SIZE: expected a size",), {"ORCHESTRA_CACHE_SIZE": "big"}),
    BadConfig(
        "4-bool-variable", "", ("$ORCHESTRA_DAEMON_AUTOSTART: ", "'maybe'"), {"ORCHESTRA_DAEMON_AUTOSTART": "maybe"}
    ),
    BadConfig("5-unit", cache('size = "10GX"'), ("unknown unit 'GX'", "use B, KiB")),
    BadConfig("6-zero", cache("size = 0"), ("cache.size: 0 is not allowed (allowed: 4.0 KiB to ",)),
    BadConfig("6-negative", cache("size = -1"), ("cache.size: ", "got -1 (allowed: 4.0 KiB to ")),
    BadConfig("6-nan", cache("size = nan"), ("cache.size: expected a size such as 10GiB, got nan (allowed: ",)),
    BadConfig("6-inf", cache("size = inf"), ("cache.size: expected a size such as 10GiB, got inf (allowed: ",)),
    BadConfig("6-1e400", cache("size = 1e400"), ("cache.size: ", "(allowed: ")),
    BadConfig("6-long", cache(f'size = "{"9" * 5000}"'), ("cache.size: ", "got a text of 5000 characters (allowed: ")),
    BadConfig("3-long-key", cache(f"{'k' * 5000} = 1"), ("unknown key 'kkkkkkkk", " ...")),
    BadConfig("6-ratio", cache("free_space_ratio = nan"), ("expected a number from 0 to 0.95, got nan",)),
    BadConfig("6-count", "[fetch]\nrequests_max = 0", ("fetch.requests_max: expected a whole number from 1 to 4096",)),
    BadConfig("8-zero", cache("block_size = 0"), ("cache.block_size: 0 is not allowed (allowed: 4.0 KiB to 1.0 GiB",)),
    BadConfig("8-one", cache("block_size = 1"), ("(allowed: 4.0 KiB to 1.0 GiB, a power of two)",)),
    BadConfig("8-three", cache('block_size = "3MiB"'), ("'3MiB' is not allowed", "a power of two)")),
    BadConfig("8-huge", cache('block_size = "2GiB"'), ("'2GiB' is not allowed (allowed: 4.0 KiB to 1.0 GiB",)),
    BadConfig("8-extent", cache('extent_size = "6MiB"'), ("cache.extent_size (6.0 MiB) must be a whole number of",)),
    BadConfig("8-size", cache('size = "1MiB"'), ("cache.size (1.0 MiB) must hold at least one block",)),
    BadConfig("9-negative", MOUNT + 'freshness = "-5"', ("freshness: expected a duration", "immutable")),
    BadConfig("9-unit", MOUNT + 'freshness = "5 parsecs"', ("unknown unit 'parsecs'", "(use ms, s, m, h, d)")),
    BadConfig("readers-word", '[daemon]\nreaders = "all"', ("daemon.readers: expected a list of at most 256 users",)),
    BadConfig("readers-name", '[daemon]\nreaders = ["a b"]', ("daemon.readers: expected the name or number", "'a b'")),
    BadConfig("9-daemon", '[daemon]\nidle_timeout = "0s"', ("daemon.idle_timeout: '0s' is not allowed",)),
    BadConfig("10-large", "#" * 2_000_000, ("{file}: config file too large (over 1.0 MiB)",)),
    BadConfig("10-nested", "a = " + "[" * 100_000, ("{file}: arrays or tables nested too deeply",)),
    BadConfig("11-key", cache('size = "1GiB"\n# again\nsize = "2GiB"'), ("{file}:4:", "given twice (first in line 2)")),
    BadConfig("11-table", "[cache]\n[daemon]\n[cache]\n", ("{file}:3:", "given twice (first in line 1)")),
    BadConfig(
        "12-secret",
        MOUNT + 'options = { key = "AK", secret = "canary-7f3" }',
        ("{file} holds a secret (mount /x, option secret) and is mode 0644", "chmod 600 {file} or write ${{VAR}}"),
        mode=0o644,
    ),
    BadConfig(
        "12-password",
        '[[mount]]\npath = "/x"\nuri = "sftp://me:canary-7f3@host/x"',
        ("holds a secret (mount /x, the password in its uri)", "chmod 600"),
        mode=0o604,
    ),
    BadConfig(
        "13-unclosed", MOUNT + 'options = { secret = "${NOPE" }', ("option secret: '${{' without a closing '}}'",)
    ),
    BadConfig("13-name", MOUNT + 'options = { a = "${1-x}" }', ("'${{1-x}}' does not name an environment variable",)),
    BadConfig("15-relative", cache('dir = "cache"'), ("cache.dir: expected an absolute path, got 'cache'",)),
    BadConfig("15-empty", cache('dir = ""'), ("cache.dir: expected the path of a folder, got ''",)),
    BadConfig("21-no-path", '[[mount]]\nuri = "s3://b/x"', ("{file}: mount 1: key 'path' is missing",)),
    BadConfig("21-no-uri", '[[mount]]\npath = "/x"', ("mount 1 (/x): exactly one of the keys 'uri' and 'uris'",)),
    BadConfig("21-both", MOUNT + 'uris = ["s3://c/x"]', ("exactly one of the keys 'uri' and 'uris'",)),
    BadConfig("21-no-uris", '[[mount]]\npath = "/x"\nuris = []', ("uris: expected a list of 1 to 16 addresses",)),
    BadConfig("21-control", MOUNT.replace("/x", "/\\u0000x", 1), ("path: expected text that is not empty and",)),
    *CLUSTER_ROWS,
    BadConfig("later-writes", MOUNT + 'write_policy = "through"', ("key 'write_policy' is not supported by this",)),
]


@pytest.fixture
def file(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put the row's file and environment in place."""
    row: BadConfig = request.param
    path = tmp_path / "bad.toml"
    if row.text == "FOLDER":
        path.mkdir()
    elif row.text is not None:
        path.write_bytes(row.text if isinstance(row.text, bytes) else row.text.encode())
        path.chmod(row.mode)
    for name, value in row.environ.items():
        monkeypatch.setenv(name, value)
    return path


_each_row = pytest.mark.parametrize(("file", "row"), [pytest.param(r, r, id=r.row) for r in ROWS], indirect=["file"])


def assert_says(message: str, row: BadConfig, file: Path) -> None:
    """Fail unless the words stand in `message` in their order, on one line that repeats no secret."""
    position = 0
    for words in row.words:
        wanted = words.format(file=file)
        assert wanted in message[position:], f"{wanted!r} is missing in {message!r}"
        position = message.index(wanted, position) + len(wanted)
    assert "\n" not in message
    assert "canary-7f3" not in message
    assert len(message) < 1000


@_each_row
def test_load_config_refuses_it_in_one_line(file: Path, row: BadConfig) -> None:
    """Bad input raises ConfigError whose text names file, key, value and what is allowed."""
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    assert_says(str(caught.value), row, file)


@_each_row
def test_the_command_line_ends_with_status_1(file: Path, row: BadConfig, capsys: pytest.CaptureFixture[str]) -> None:
    """The command line prints that one line on standard error, nothing else, and no traceback."""
    assert main(["--config", str(file), "daemon", "status"]) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("orchestra: ")
    assert output.err.count("\n") == 1
    assert_says(output.err.strip().removeprefix("orchestra: "), row, file)


def test_a_secret_that_only_its_owner_reads_is_accepted(tmp_path: Path) -> None:
    """Row 12 asks for mode 0600 or a variable, and either of them is enough."""
    path = tmp_path / "ok.toml"
    path.write_text(MOUNT + 'options = { secret = "inline" }')
    path.chmod(0o600)
    assert load_config(path).mounts[0].options == {"secret": "inline"}
    path.write_text(MOUNT + 'options = { secret = "${SECRET}" }')
    path.chmod(0o644)
    assert load_config(path).mounts[0].options == {"secret": "${SECRET}"}
