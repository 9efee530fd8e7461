"""The unit that `orchestra fuse mount --systemd` prints."""

from __future__ import annotations

from orchestra.cli.fuse_unit import unit_text

COMMAND = ["/bin/orchestra", "fuse", "mount", "--option", "secret=${SECRET}", "--", "s3://b/50%", "/mnt/a b"]


def lines_of(environment: dict[str, str]) -> list[str]:
    return unit_text(COMMAND, "/mnt/a b", "s3://b/50%", environment).splitlines()


def test_what_systemd_would_expand_is_escaped() -> None:
    """Specifiers and variables reach the program as they were typed."""
    lines = lines_of({})
    assert "Description=orchestra: s3://b/50%% on /mnt/a b" in lines
    assert 'ExecStart=/bin/orchestra fuse mount --option "secret=$${SECRET}" -- "s3://b/50%%" "/mnt/a b"' in lines
    assert 'ExecStop=-/bin/orchestra fuse umount --lazy "/mnt/a b"' in lines


def test_settings_of_the_environment_are_the_units_too() -> None:
    """Those of orchestra and no others; the configuration file is named by the command."""
    environment = {"ORCHESTRA_CACHE_DIR": "/c $x 5%", "ORCHESTRA_CONFIG": "/etc/o.toml", "AWS_SECRET_ACCESS_KEY": "s"}
    environment |= {"ORCHESTRA_S3_SECRET": "canary", "ORCHESTRA_CACHE_PORT": "tcp://10.0.0.1"}
    settings = [line for line in lines_of(environment) if line.startswith("Environment=")]
    assert settings == ['Environment="ORCHESTRA_CACHE_DIR=/c $x 5%%"']


def test_a_line_break_ends_no_setting() -> None:
    """It reaches the program as it was, as systemd reads escapes between quotes."""
    lines = lines_of({"ORCHESTRA_CACHE_DIR": "/c\nExecStartPre=/bin/evil"})
    assert 'Environment="ORCHESTRA_CACHE_DIR=/c\\nExecStartPre=/bin/evil"' in lines
