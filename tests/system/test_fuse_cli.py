"""`orchestra fuse` as a user types it, on the real client and daemon, over a local folder as the store."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

from orchestra.fuse.mount import mount_at, unmount
from orchestra.fuse.registry import MountRecord, start_of_process
from tests.support.fuse_mounts import needs_fuse
from tests.support.other_user import python_as_nobody

pytestmark = [pytest.mark.system, pytest.mark.slow, needs_fuse]


@dataclass
class Site:
    """A configuration, its store, and a folder to mount on."""

    root: Path
    store: Path
    target: Path

    @property
    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("ORCHESTRA_")}
        return kept | {"XDG_STATE_HOME": str(self.root / "state"), "HOME": str(self.root)}

    @property
    def command(self) -> list[str]:
        return [sys.executable, "-m", "orchestra", "--config", str(self.root / "orchestra.toml")]

    def run(self, *words: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*self.command, *map(str, words)],
            capture_output=True,
            text=True,
            check=False,
            env=self.environment,
            cwd=cwd,
            timeout=60,
        )

    def known(self) -> dict[str, object] | None:
        """Return what `fuse ls --json` says of the target."""
        rows = json.loads(self.run("fuse", "ls", "--json").stdout)
        return next((row for row in rows if row["folder"] == str(self.target)), None)


def _has_ended(pid: int) -> bool:
    """Whether a process is gone, or waits only for its parent to notice."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes() == b""
    except FileNotFoundError:
        return True


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    store, target = tmp_path / "store", tmp_path / "a target"
    (store / "d").mkdir(parents=True)
    (store / "d" / "file").write_bytes(b"z" * 300_000)
    target.mkdir()
    (tmp_path / "orchestra.toml").write_text(
        f'[cache]\ndir = "{tmp_path}/cache"\nsize = "1GiB"\nfree_space_ratio = 0\n'
        f'[[mount]]\npath = "/data"\nuri = "file://{store}"\n'
    )
    site = Site(tmp_path, store, target)
    yield site
    while mount_at(str(target)) is not None:
        unmount(str(target), lazy=True)
    site.run("daemon", "stop")


def test_mount_answers_when_the_folder_does_and_umount_when_all_has_ended(site: Site) -> None:
    """The main round: mount in the background, read, list, unmount; nothing is left behind."""
    done = site.run("fuse", "mount", site.target)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"mounted / on {site.target}" in done.stdout
    assert (site.target / "data" / "d" / "file").read_bytes() == b"z" * 300_000
    known = site.known()
    assert known is not None
    assert (known["state"], known["path"], known["mode"]) == ("served", "/", "auto")
    assert str(known["log"]).startswith(str(site.root / "state"))
    done = site.run("fuse", "umount", site.target)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"unmounted {site.target}\n", "")
    assert _has_ended(int(str(known["pid"])))
    assert site.known() is None
    assert os.listdir(site.target) == []
    assert not list((site.root / "state").rglob("*.json"))


def test_a_path_of_the_namespace_can_be_mounted_with_options(site: Site) -> None:
    """Relative folders, a path, owner, umask and mode arrive at the process in the background."""
    words = ["--uid", "77", "--gid", "78", "--umask", "027", "--mode", "pagecache", "--attr-timeout", "1h"]
    words += ["--read-ahead", "3MiB", "/data/d"]
    assert site.run("fuse", "mount", *words, "a target", cwd=site.root).returncode == 0
    status = os.stat(site.target / "file")
    assert (status.st_uid, status.st_gid, oct(status.st_mode)) == (77, 78, oct(0o100440))
    known = site.known()
    assert known is not None
    assert (known["path"], known["mode"]) == ("/data/d", "pagecache")
    mounted = mount_at(str(site.target))
    assert mounted is not None
    assert Path(f"/sys/class/bdi/{mounted.device}/read_ahead_kb").read_text() == "3072\n"
    assert site.run("fuse", "umount", "a target", cwd=site.root).returncode == 0


def test_foreground_serves_until_a_signal_and_ends_with_0(site: Site) -> None:
    """It says when it is ready, and Ctrl-C is how it is ended."""
    with subprocess.Popen(
        [*site.command, "fuse", "mount", "--foreground", str(site.target)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=site.environment,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline().startswith(f"mounted / on {site.target}")
        assert os.listdir(site.target) == ["data"]
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        assert process.wait(20) == 0
        assert "Traceback" not in process.stderr.read()
    assert mount_at(str(site.target)) is None


def test_a_busy_folder_is_unmounted_only_lazily(site: Site) -> None:
    """umount says that it is busy and what to do."""
    assert site.run("fuse", "mount", site.target).returncode == 0
    with open(site.target / "data" / "d" / "file", "rb") as file:  # noqa: PTH123 - stays open
        done = site.run("fuse", "umount", site.target)
        assert done.returncode == 1
        assert done.stderr == (
            f"orchestra: {site.target} is busy: close the files open on it, or detach it with --lazy\n"
        )
        assert site.run("fuse", "umount", "--lazy", site.target).returncode == 0
        assert file.read() == b"z" * 300_000


def test_a_dead_mount_is_cleared_and_said(site: Site) -> None:
    """What a killed process without a watcher left behind is detached, in one line, and mounted over."""
    from orchestra.fuse.mount import attach
    from orchestra.fuse.options import MountOptions

    os.close(attach(str(site.target), MountOptions()))
    known = site.known()
    assert known is not None
    assert known["state"] == "dead"
    done = site.run("fuse", "mount", site.target)
    assert done.returncode == 0
    assert "was a dead FUSE mount" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert os.listdir(site.target) == ["data"]
    assert site.run("fuse", "umount", site.target).returncode == 0


def test_a_mount_without_a_record_is_told_as_what_it_is(site: Site) -> None:
    """One that another state folder knows lives and is ours; nobody says that it is another user's."""
    assert site.run("fuse", "mount", site.target).returncode == 0
    (record,) = (site.root / "state").rglob("*.json")
    record.rename(record.with_suffix(".hidden"))
    known = site.known()
    assert known is not None
    assert known["pid"] is None
    assert str(known["state"]).startswith(f"served, but its process left no record in {site.root / 'state'}")
    record.with_suffix(".hidden").rename(record)
    assert site.run("fuse", "umount", site.target).returncode == 0


def test_a_log_that_cannot_be_written_is_said_in_one_line(site: Site) -> None:
    """As for a user without a home; the foreground needs none."""
    (site.root / "state").write_text("a file")
    done = site.run("fuse", "mount", site.target)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "cannot be written: " in done.stderr
    assert "set XDG_STATE_HOME to a folder of yours, or mount with --foreground" in done.stderr
    assert mount_at(str(site.target)) is None


@pytest.mark.parametrize(
    ("words", "status", "sentence"),
    [
        (["mount", "missing"], 1, "does not exist: create it with mkdir -p"),
        (["mount", "orchestra.toml"], 1, "is not a folder"),
        (["mount", "store"], 1, "is not empty"),
        (["mount", "/nope", "a target"], 1, "/nope"),
        (["mount", "/data/d/file", "a target"], 1, "it is a file"),
        (["mount", "relative", "a target"], 1, "must begin with a slash"),
        (["mount", "ftp://x/y", "a target"], 1, "ftp"),
        (["mount", "--option", "a=b", "/data", "a target"], 2, "go with a URI"),
        (["mount", "--workers", "0", "a target"], 2, "1<=x<=16"),
        (["upgrade", "a target"], 1, "no supervisor of a mount on"),
        (["mount", ".."], 1, "lies inside the mount point"),
        (["mount", "--mode", "fast", "a target"], 2, "'auto', 'passthrough', 'pagecache'"),
        (["mount", "--umask", "9", "a target"], 2, "three octal digits"),
        (["mount", "--attr-timeout", "soon", "a target"], 2, "such as 60s"),
        (["mount", "--read-ahead", "1TiB", "a target"], 2, "is more than 1GiB"),
        (["mount", "--read-ahead", "-1", "a target"], 2, "such as 10GiB"),
        (["mount", "/data", ""], 1, "FOLDER is empty"),
        (["mount", "a", "b", "c"], 2, "expected [PATH or URI] FOLDER"),
        (["mount"], 2, "FOLDER"),
        (["umount", "a target"], 1, "nothing is mounted on"),
        (["umount", "/proc"], 1, "is a mount of type proc, not one of orchestra's"),
    ],
)
def test_a_wrong_command_says_why_in_one_line(site: Site, words: list[str], status: int, sentence: str) -> None:
    """No traceback, nothing mounted, 1 for what cannot be done and 2 for what cannot be meant."""
    if words[-1] == "..":
        (site.root / "empty").mkdir()
    done = site.run("fuse", *words, cwd=site.root / "empty" if words[-1] == ".." else site.root)
    assert done.returncode == status, done.stderr
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
    if status == 1:
        assert len(done.stderr.splitlines()) == 1
    assert mount_at(str(site.target)) is None


def test_a_mount_outlives_its_daemon(site: Site) -> None:
    """With the daemon gone hits are served, and a miss starts it again."""
    (site.store / "d" / "second").write_bytes(b"second")
    assert site.run("fuse", "mount", site.target).returncode == 0
    assert (site.target / "data" / "d" / "file").read_bytes() == b"z" * 300_000
    assert site.run("daemon", "stop").returncode == 0
    assert (site.target / "data" / "d" / "file").read_bytes() == b"z" * 300_000
    assert (site.target / "data" / "d" / "second").read_bytes() == b"second"
    assert site.run("fuse", "umount", site.target).returncode == 0


def test_a_store_is_mounted_by_its_address_alone(site: Site) -> None:
    """No [[mount]] of it, no configuration: the address becomes a path of the namespace, the same one next time."""
    (site.root / "other" / "sub").mkdir(parents=True)
    (site.root / "other" / "sub" / "x").write_bytes(b"by address")
    for _ in range(2):
        done = site.run("fuse", "mount", "--freshness", "immutable", f"file://{site.root}/other", site.target)
        assert (done.returncode, done.stderr) == (0, "")
        assert (site.target / "sub" / "x").read_bytes() == b"by address"
        known = site.known()
        assert known is not None
        assert known["path"] == f"/file{site.root}/other"
        mounted = mount_at(str(site.target))
        assert mounted is not None
        assert mounted.source == f"file://{site.root}/other"
        assert site.run("fuse", "umount", site.target).returncode == 0
    mounts = json.loads(site.run("mount", "ls", "--json").stdout)
    assert [mount["path"] for mount in mounts if mount["path"] != "/data"] == [f"/file{site.root}/other"]
    # Told otherwise it is another mount, beside the first.
    done = site.run("fuse", "mount", "--freshness", "5s", f"file://{site.root}/other", site.target)
    assert done.returncode == 0
    known = site.known()
    assert known is not None
    assert str(known["path"]).startswith("/file~")
    assert str(known["path"]).endswith(f"{site.root}/other")
    assert os.listdir(site.target) == ["sub"]


def test_an_attached_store_is_used_where_it_is(site: Site) -> None:
    """The address of a [[mount]] leads to that mount and what is cached of it."""
    assert site.run("fuse", "mount", f"file://{site.store}", site.target).returncode == 0
    known = site.known()
    assert known is not None
    assert known["path"] == "/data"


def test_upgrade_exchanges_the_workers_under_an_open_file(site: Site) -> None:
    """The file that is open goes on; the mount has the same supervisor and other workers."""
    assert site.run("fuse", "mount", site.target).returncode == 0
    known = site.known()
    assert known is not None
    with open(site.target / "data" / "d" / "file", "rb", buffering=0) as file:  # noqa: PTH123 - stays open
        assert file.read(10) == b"z" * 10
        done = site.run("fuse", "upgrade", site.target)
        assert (done.returncode, done.stdout, done.stderr) == (0, f"upgraded {site.target}\n", "")
        assert file.read() == b"z" * 299_990
    after = site.known()
    assert after is not None
    assert after["pid"] == known["pid"]
    assert after["workers"] != known["workers"]


def test_another_users_mount_is_not_upgraded() -> None:
    """As for a user who mounted with sudo: one line, and nothing of ours is touched."""
    with tempfile.TemporaryDirectory() as name:
        state = Path(name)
        state.chmod(0o755)
        ours = MountRecord("/mnt", "/", "auto", os.getpid(), start_of_process(os.getpid()), None, [os.getpid()])
        (state / "orchestra" / "fuse").mkdir(parents=True)
        (state / "orchestra" / "fuse" / "mnt.json").write_text(json.dumps(asdict(ours)))
        done = subprocess.run(
            [*python_as_nobody("import orchestra.cli.fuse"), "-m", "orchestra", "fuse", "upgrade", "/mnt"],
            capture_output=True,
            text=True,
            check=False,
            env={"XDG_STATE_HOME": name, "PATH": os.environ["PATH"]},
            cwd="/",
        )
    assert (done.returncode, done.stderr) == (
        1,
        "orchestra: /mnt is held by a process of another user, who alone can upgrade it\n",
    )


def test_a_unit_for_systemd_is_printed_and_nothing_is_mounted(site: Site) -> None:
    """Its command serves in the foreground with what was asked for; what is special is quoted."""
    done = site.run("fuse", "mount", "--systemd", "--allow-other", "--workers", "2", "s3://bucket/a b", site.target)
    assert (done.returncode, done.stderr) == (0, "")
    command = next(line for line in done.stdout.splitlines() if line.startswith("ExecStart="))
    assert "fuse mount --foreground --mode auto --workers 2 --allow-other" in command
    assert command.endswith(f'"s3://bucket/a b" "{site.target}"')
    assert "KillMode=process" in done.stdout  # workers serve what is open to its end, and the daemon is not ours alone
    assert mount_at(str(site.target)) is None


def test_a_file_says_its_version_store_and_how_much_is_here_and_df_shows_the_cache(site: Site) -> None:
    """Extended attributes user.orchestra.*: from nothing cached to all; `df` has the cache's size, and no room."""
    assert site.run("fuse", "mount", "/data", site.target).returncode == 0
    file = site.target / "d" / "file"
    names = [f"user.orchestra.{name}" for name in ("version", "cached", "location", "store")]
    assert os.listxattr(file) == names
    assert os.getxattr(file, names[1]) == b"0/300000"
    assert os.getxattr(file, names[2]) == b"the store only"
    assert os.getxattr(file, names[3]).decode() == f"file://{site.store}/"
    file.read_bytes()
    assert os.getxattr(file, names[1]) == b"300000/300000"
    assert os.getxattr(file, names[2]).decode() == os.uname().nodename
    assert os.listxattr(site.target / "d") == []
    found = os.statvfs(site.target)
    assert (found.f_blocks * found.f_frsize, found.f_bavail) == (1 << 30, 0)


def test_mount_8_is_understood(site: Site) -> None:
    """What /sbin/mount.orchestra is called with for a line of fstab; an option that nobody knows is refused."""
    options = f"rw,noauto,x-systemd.automount,_netdev,umask=027,mode=pagecache,config={site.root}/orchestra.toml"
    program = [sys.executable, "-m", "orchestra", "fuse", "helper"]
    done = subprocess.run(
        [*program, "/data", str(site.target), "-o", options],
        capture_output=True,
        text=True,
        env=site.environment,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert oct((site.target / "d" / "file").stat().st_mode) == oct(0o100440)
    known = site.known()
    assert known is not None
    assert (known["path"], known["mode"]) == ("/data", "pagecache")
    mounted = mount_at(str(site.target))
    assert mounted is not None
    assert mounted.source == "/data"  # by which `mount -a` sees that the line is done
    assert site.run("fuse", "helper", "/data", "/nowhere", "-f", "-o", "ro").returncode == 0
    refused = site.run("fuse", "helper", "/data", site.target, "-o", "sped=high")
    assert (refused.returncode, "unknown mount option 'sped'" in refused.stderr) == (1, True)
