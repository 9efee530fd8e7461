"""The systemd unit of a mount, and the options that mount(8) gives its helper.

Owns: their texts. Leaves to others: the options' meaning (fuse.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from orchestra.config_file import variable_names
from orchestra.errors import UsageError

# What mount(8) and fstab say to every file system, and means nothing here or is so in any case.
_IGNORED = frozenset(
    {"ro", "rw", "defaults", "auto", "noauto", "user", "nouser", "users", "_netdev", "nofail", "exec", "noexec"}
    | {"nosuid", "nodev", "suid", "dev", "relatime", "noatime", "atime", "async", "sync"}
)
_FLAGS = frozenset({"allow_other"})
_VALUES = frozenset(
    {"mode", "workers", "uid", "gid", "umask", "attr_timeout", "entry_timeout", "read_ahead", "freshness"}
)


def unit_text(command: Sequence[str], folder: str, what: str, environment: Mapping[str, str]) -> str:
    """Return a unit that mounts at boot, and again when the mount was lost. `command` serves in the foreground, with
    the settings of orchestra that `environment` holds, and nothing else of it: everybody may read a unit."""
    words = " ".join(_quoted(word) for word in command)
    settings = "".join(
        f"Environment={_quoted(f'{name}={value}', dollar='$')}\n"
        for name, value in sorted(environment.items())
        if name in variable_names()
    )
    umount = " ".join(_quoted(word) for word in [*command[: command.index("fuse")], "fuse", "umount", "--lazy", folder])
    return f"""[Unit]
Description=orchestra: {_plain(what)} on {_plain(folder)}
Wants=network-online.target
After=network-online.target

[Service]
{settings}ExecStart={words}
ExecStop=-{umount}
Restart=always
RestartSec=1
# The supervisor ends its workers, or replaces them. What outlives it is meant to: a worker that serves what is still
# open, and the daemon, which may be other mounts' too.
KillMode=process
OOMPolicy=continue
LimitNOFILE=65536

[Install]
WantedBy=multi-user.target
"""


def _plain(text: str) -> str:
    return " ".join(text.replace("%", "%%").splitlines())


def _quoted(word: str, dollar: str = "$$") -> str:
    if word and all(character.isalnum() or character in "-_./:=,+@" for character in word):
        return word
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", dollar)
    escaped = escaped.replace("\n", "\\n").replace("\r", "\\r")  # a line ends a setting, also between quotes
    return f'"{escaped}"'


def words_of_mount_options(text: str) -> tuple[str | None, list[str]]:
    """Return the configuration and the words of the command for the `-o` of mount(8), for example
    `allow_other,umask=022,config=/etc/orchestra.toml,option.endpoint_url=http://...`."""
    words: list[str] = []
    config = None
    for item in text.split(","):
        name, equals, value = item.partition("=")
        if not name or name in _IGNORED or name.startswith("x-"):
            continue
        if name in _FLAGS and not equals:
            words.append(f"--{name.replace('_', '-')}")
        elif name in _VALUES and equals:
            words += [f"--{name.replace('_', '-')}", value]
        elif name.startswith("option.") and equals:
            words += ["--option", f"{name.removeprefix('option.')}={value}"]
        elif name == "config" and equals:
            config = value
        else:
            raise UsageError(
                f"unknown mount option {name!r}; known: {', '.join(sorted(_FLAGS | _VALUES))}, config=FILE, option.KEY="
            )
    return config, words
