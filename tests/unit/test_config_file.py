"""What load_config reads: places, keys, overrides, defaults. What it refuses is in tests/badinput."""

from __future__ import annotations

import logging
import math
import tomllib
from pathlib import Path

import pytest

from orchestra import config_file
from orchestra.config import ClusterConfig, Config, MountConfig, Replication, expand_variables, load_config
from orchestra.config_mounts import format_freshness, looks_secret, parse_freshness_s, uri_without_password
from orchestra.errors import ConfigError
from orchestra.units import GIB, MIB

EXAMPLE = """
[cache]
dir = "/nvme/orchestra"
size = "800GiB"
free_space_ratio = 0.1
block_size = "4MiB"
extent_size = "256MiB"
eviction = "auto"

[[mount]]
path = "/imagenet"
uri = "s3://bucket/imagenet"
readonly = true
freshness = "60s"
prefetch = "dataset"
options = { endpoint_url = "http://127.0.0.1:9000", key = "${AWS_ACCESS_KEY_ID}", secret = "${AWS_SECRET_ACCESS_KEY}" }

[[mount]]
path = "/copies"
uris = ["s3://near/x", "s3://far/x"]
freshness = "immutable"
options = { anon = true, retries = 3 }

[daemon]
autostart = true
idle_timeout = "15m"
"""


@pytest.fixture(autouse=True)
def nothing_to_find(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run in an empty folder with an empty user's config folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "user"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user-cache"))


def load(text: str, tmp_path: Path, environ: dict[str, str] | None = None) -> Config:
    """Return the settings of a file that holds `text`."""
    path = tmp_path / "given.toml"
    path.write_text(text)
    return load_config(path, environ or {})


def test_the_example_of_the_design_is_read(tmp_path: Path) -> None:
    """Every key of the example (but the cluster's) arrives in the settings."""
    config = load(EXAMPLE, tmp_path)
    assert config.source == tmp_path / "given.toml"
    assert (config.cache.dir, config.cache.size_bytes) == (Path("/nvme/orchestra"), 800 * GIB)
    assert (config.cache.block_size_bytes, config.cache.extent_size_bytes) == (4 * MIB, 256 * MIB)
    assert (config.daemon.autostart, config.daemon.idle_timeout_s) == (True, 900)
    first, second = config.mounts
    assert (first.path, first.uris, first.readonly) == ("/imagenet", ("s3://bucket/imagenet",), True)
    assert (first.freshness_s, first.prefetch) == (60, "dataset")
    assert second.uris == ("s3://near/x", "s3://far/x")
    assert second.options == {"anon": "true", "retries": "3"}
    assert math.isinf(second.freshness_s)


CLUSTER = """
[cluster]
listen = "10.0.0.1:7420"
membership = "static"
nodes = ["10.0.0.1:7420", "10.0.0.2:7420"]
secret_file = "/etc/orchestra/secret"
replicas = 2
ufs_fallback = "fail"

[[mount]]
path = "/imagenet"
uri = "s3://bucket/imagenet"
replication = { min = 1, max = 4, passive = false }
"""


def test_the_cluster_of_the_design_is_read(tmp_path: Path) -> None:
    """Every key of the table and of a mount's replication arrives; no table is no cluster."""
    config = load(CLUSTER, tmp_path)
    assert config.cluster == ClusterConfig(
        listen="10.0.0.1:7420",
        nodes=("10.0.0.1:7420", "10.0.0.2:7420"),
        secret_file=Path("/etc/orchestra/secret"),
        replicas=2,
        ufs_fallback="fail",
    )
    assert config.mounts[0].replication == Replication(1, 4, False)
    assert config_file.settings_of(config)["cluster.listen"] == "10.0.0.1:7420"
    assert load(EXAMPLE, tmp_path).cluster is None


def test_a_shared_file_gets_each_nodes_address_from_its_environment(tmp_path: Path) -> None:
    """`listen` from a variable, IPv6 too; lists in variables are divided by commas; a Kubernetes service is no key."""
    text = '[cluster]\nmembership = "dns"\nname = "orchestra.ns.svc"\nsecret_file = "/s"\n'
    environ = {"ORCHESTRA_CLUSTER_LISTEN": "[fd00::1]:7420", "ORCHESTRA_CLUSTER_SERVICE_HOST": "10.1.1.1"}
    cluster = load(text, tmp_path, environ).cluster
    assert cluster is not None
    assert (cluster.listen, cluster.name) == ("[fd00::1]:7420", "orchestra.ns.svc")
    whole = {
        "ORCHESTRA_CLUSTER_LISTEN": "127.0.0.1:7420",
        "ORCHESTRA_CLUSTER_MEMBERSHIP": "etcd",
        "ORCHESTRA_CLUSTER_ENDPOINTS": "http://127.0.0.1:2379, http://localhost:3379/",
        "ORCHESTRA_CLUSTER_REPLICAS": "3",
    }
    cluster = load("", tmp_path, whole).cluster
    assert cluster is not None
    assert cluster.endpoints == ("http://127.0.0.1:2379", "http://localhost:3379")
    assert (cluster.replicas, cluster.secret_file) == (3, None)


def test_a_node_may_have_a_name_of_its_own(tmp_path: Path) -> None:
    """`node_id` arrives from file and variable; what could not stand in a record is refused."""
    text = '[cluster]\nlisten = "127.0.0.1:7420"\nnodes = ["127.0.0.1:7420"]\nnode_id = "machine-1.example"\n'
    first = load(text, tmp_path).cluster
    second = load(text, tmp_path, {"ORCHESTRA_CLUSTER_NODE_ID": "machine-2"}).cluster
    assert [one and one.node_id for one in (first, second)] == ["machine-1.example", "machine-2"]
    with pytest.raises(ConfigError, match=r"cluster\.node_id: expected a name of letters, digits"):
        load(text.replace("machine-1.example", "machine 1"), tmp_path)


@pytest.mark.parametrize(("number", "membership"), [(1, "static"), (2, "dns"), (3, "etcd")])
def test_the_documented_clusters_are_read(number: int, membership: str, tmp_path: Path) -> None:
    """Each example in docs/cluster.md is accepted; the one for pods with the variable that it names."""
    text = (Path(__file__).parents[2] / "docs" / "cluster.md").read_text()
    example = text.split("```toml\n")[number].split("```")[0]
    cluster = load(example, tmp_path, {"ORCHESTRA_CLUSTER_LISTEN": "10.0.0.1:7420"}).cluster
    assert cluster is not None
    assert cluster.membership == membership


def test_variables_in_options_are_kept_as_written(tmp_path: Path) -> None:
    """No secret is held by the settings: `${VAR}` is expanded when the mount is made."""
    options = load(EXAMPLE, tmp_path, {"AWS_SECRET_ACCESS_KEY": "do-not-hold-me"}).mounts[0].options
    assert options["secret"] == "${AWS_SECRET_ACCESS_KEY}"


def test_no_file_means_defaults() -> None:
    """Without any file every setting has its default, and the cache lies in the user's cache folder."""
    config = load_config(environ={})
    assert config.source is None
    assert config.mounts == ()
    assert config.cache.dir.name == "orchestra"
    assert 0 < config.cache.size_bytes <= 64 * GIB


def test_places_are_tried_in_order(tmp_path: Path) -> None:
    """The argument wins over the variable, that over ./orchestra.toml, that over the user's config folder."""
    places = [tmp_path / "argument.toml", tmp_path / "variable.toml", tmp_path / "orchestra.toml"]
    places.append(tmp_path / "user" / "orchestra" / "orchestra.toml")
    for place in places:
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text("")
    environ = {"ORCHESTRA_CONFIG": str(places[1])}
    assert load_config("argument.toml", environ).source == places[0]
    assert load_config(None, environ).source == places[1]
    assert load_config(None, {}).source == places[2]
    places[2].unlink()
    assert load_config(None, {}).source == places[3]


def test_the_environment_overrides_the_file(tmp_path: Path) -> None:
    """ORCHESTRA_<TABLE>_<KEY> wins over the file, whatever the kind of the key."""
    environ = {
        "ORCHESTRA_CACHE_SIZE": "10GiB",
        "ORCHESTRA_CACHE_DIR": "/elsewhere",
        "ORCHESTRA_CACHE_FREE_SPACE_RATIO": "0.25",
        "ORCHESTRA_DAEMON_AUTOSTART": "false",
        "ORCHESTRA_DAEMON_WAIT": "1m",
        "ORCHESTRA_FETCH_REQUESTS_MAX": "7",
    }
    config = load(EXAMPLE, tmp_path, environ)
    assert (config.cache.size_bytes, config.cache.dir) == (10 * GIB, Path("/elsewhere"))
    assert config.cache.free_space_ratio == 0.25
    assert (config.daemon.autostart, config.daemon.wait_s) == (False, 60)
    assert config.fetch.requests_max == 7


def test_variables_that_kubernetes_sets_are_not_settings() -> None:
    """A service called orchestra-cache gives every pod ORCHESTRA_CACHE_* variables that are addresses."""
    environ = {
        "ORCHESTRA_CACHE_SERVICE_HOST": "10.0.0.1",
        "ORCHESTRA_CACHE_SERVICE_PORT": "7420",
        "ORCHESTRA_CACHE_PORT": "tcp://10.0.0.1:7420",
        "ORCHESTRA_CACHE_PORT_7420_TCP_ADDR": "10.0.0.1",
    }
    assert load_config(None, environ) == load_config(None, {})


@pytest.mark.parametrize("table", sorted(config_file._TABLES))
def test_every_setting_has_a_key(table: str) -> None:
    """Each field of a table's settings can be set from the file, and each key sets a field."""
    cluster = {"ORCHESTRA_CLUSTER_LISTEN": "127.0.0.1:1", "ORCHESTRA_CLUSTER_NODES": "127.0.0.1:1"}
    field_names = set(getattr(load_config(environ=cluster), table).__dataclass_fields__)
    assert {key.field for key in config_file._TABLES[table]} == field_names


def test_every_key_is_documented() -> None:
    """docs/configuration.md names every key with its environment variable."""
    text = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text()
    for table, keys in config_file._TABLES.items():
        for key in keys:
            assert f"`{table}.{key.name}`" in text
            assert f"ORCHESTRA_{table.upper()}_{key.name.upper()}" in text


def test_the_documented_example_is_read(tmp_path: Path) -> None:
    """The TOML in docs/configuration.md is accepted as it stands."""
    text = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text()
    example = text.split("```toml\n")[1].split("```")[0]
    assert tomllib.loads(example).keys() == {"cache", "mount", "daemon", "fetch"}
    assert load(example, tmp_path).mounts


def test_a_limit_over_the_disk_is_warned_of_and_not_refused(tmp_path: Path) -> None:
    """Row 7: the daemon may start, and the warning names what is free and what will be used."""
    config = load(f'[cache]\ndir = "{tmp_path}"\nsize = "1000TiB"', tmp_path)
    warning = config_file.size_warning(config)
    assert warning is not None
    assert "cache.size is 1000.0 TiB" in warning
    assert "free" in warning
    assert "at most" in warning


def test_a_limit_within_the_disk_is_not_warned_of(tmp_path: Path) -> None:
    """The default of the size never warns."""
    assert config_file.size_warning(load(f'[cache]\ndir = "{tmp_path}"', tmp_path)) is None


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("immutable", math.inf), ("strict", 0), ("90s", 90), ("2h", 7200), ("1d", 86400), ("0.5s", 0.5), ("15m", 900)],
)
def test_freshness_is_printed_as_it_is_written(text: str, seconds: float) -> None:
    """What is printed for a freshness reads back to the same."""
    assert parse_freshness_s(text) == seconds
    assert format_freshness(seconds) == text


def test_variables_are_expanded_once() -> None:
    """What a variable holds is taken as it is, so that no value can pull in another variable or loop for ever."""
    environ = {"A": "${B}", "B": "${A}"}
    assert expand_variables("x${A}y${B}", environ, "here") == "x${B}y${A}"


def test_two_dollars_stand_for_one() -> None:
    """`$${` writes `${` itself; a dollar alone needs nothing."""
    assert expand_variables("$${A} $ $$ a$b", {}, "here") == "${A} $ $$ a$b"


def test_a_missing_variable_is_named_with_its_place() -> None:
    """The error says which variable and who needs it."""
    with pytest.raises(ConfigError) as caught:
        expand_variables("${NOPE}", {}, "mount /x option secret")
    assert str(caught.value) == "environment variable NOPE is not set (needed by mount /x option secret)"


@pytest.mark.parametrize(
    ("name", "value", "secret"),
    [
        ("secret", "abc", True),
        ("aws_secret_access_key", "abc", True),
        ("account_key", "abc", True),
        ("password", "abc", True),
        ("token", "abc", True),
        ("secret", "${SECRET}", False),
        ("key", "AKIA", False),
        ("aws_access_key_id", "AKIA", False),
        ("token_file", "/run/token", False),
        ("use_token", "true", False),
        ("endpoint_url", "http://x", False),
        ("proxy_url", "http://me:pw@host", True),
        ("proxy_url", "http://me:${PW}@host", False),
        ("secrt", "abc", True),
        ("aws_scret_access_key", "abc", True),
        ("tokne", "abc", True),
        ("sse_customer_key_base64", "abc", True),
        ("client_kwargs", '{"aws_secret_access_key": "abc"}', True),
        ("s3_additional_kwargs", '{"SSECustomerKey": "abc"}', True),
        ("client_kwargs", '{"region_name": "eu-central-1"}', False),
        ("region", "eu-central-1", False),
        ("role_session_name", "abc", False),
        ("skip_signature", "true", False),
    ],
)
def test_secrets_are_known_by_their_names(name: str, value: str, secret: bool) -> None:
    """An option is a secret by its name, also a mistyped one, unless a variable stands in its place or it names a file;
    and so is an address with a password in it."""
    assert looks_secret(name, value) is secret


def test_a_mount_shown_by_python_hides_its_options() -> None:
    """The repr of a configuration, as a traceback or a log shows it, holds no secret."""
    mount = MountConfig("/a", ("s3://bucket",), options={"secret": "canary-7f3"})
    assert "canary-7f3" not in repr((mount,))


def test_a_password_in_an_address_is_not_shown() -> None:
    """Only the password goes; what says which store stays."""
    assert uri_without_password("sftp://me:pw@host/x") == "sftp://me:***@host/x"
    assert uri_without_password("s3://bucket/a:b@c") == "s3://bucket/a:b@c"


def test_reading_the_configuration_logs_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A canary secret in the file and in the environment reaches no log."""
    with caplog.at_level(logging.DEBUG):
        load(EXAMPLE, tmp_path, {"AWS_SECRET_ACCESS_KEY": "canary-7f3"})
    assert caplog.text == ""
