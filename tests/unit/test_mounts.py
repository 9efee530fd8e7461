"""The mount table: longest prefix, nested mounts, and tables that are refused."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestra.errors import ConfigError, NotFoundError
from orchestra.namespace.mounts import Location, MountTable, check_mount_path
from orchestra.namespace.paths import parent_and_name


@dataclass(frozen=True)
class Mount:
    path: str


def table(*paths: str) -> MountTable[Mount]:
    return MountTable(Mount(path) for path in paths)


def located(mounts: MountTable[Mount], path: str) -> tuple[str, str] | None:
    location = mounts.locate(path)
    return None if location is None else (location.mount.path, location.key)


def test_the_longest_prefix_wins() -> None:
    """A path belongs to the deepest mount above it, whatever order the mounts were named in."""
    for paths in (("/a", "/a/b", "/a/b/c/d"), ("/a/b/c/d", "/a/b", "/a")):
        mounts = table(*paths)
        assert located(mounts, "/a") == ("/a", "")
        assert located(mounts, "/a/x/y") == ("/a", "x/y")
        assert located(mounts, "/a/b") == ("/a/b", "")
        assert located(mounts, "/a/b/c") == ("/a/b", "c")
        assert located(mounts, "/a/b/c/d/e") == ("/a/b/c/d", "e")
        assert located(mounts, "/a/bc") == ("/a", "bc")


def test_a_mount_at_the_root_takes_what_no_other_does() -> None:
    """ "/" may be a mount point, and others may be mounted inside it."""
    mounts = table("/", "/a")
    assert located(mounts, "/") == ("/", "")
    assert located(mounts, "/x") == ("/", "x")
    assert located(mounts, "/x//y") == ("/", "x//y")
    assert located(mounts, "/a/x") == ("/a", "x")
    assert mounts.names_below("/") == ("a",)


def test_below_a_mount_the_path_is_the_key() -> None:
    """Doubled slashes inside are part of the key, not of the way to it."""
    mounts = table("/m")
    assert located(mounts, "/m/a//b") == ("/m", "a//b")
    assert located(mounts, "/m//etc/passwd") == ("/m", "/etc/passwd")


def test_directories_above_mounts_exist_only_in_the_table() -> None:
    """What leads to a mount is a directory of names, and no store is asked for it."""
    mounts = table("/teams/vision/a", "/teams/audio", "/z")
    for path in ("/", "/teams", "/teams/vision"):
        assert mounts.locate(path) is None
    assert mounts.names_below("/") == ("teams", "z")
    assert mounts.names_below("/teams") == ("audio", "vision")
    assert mounts.names_below("/teams/vision") == ("a",)
    assert mounts.names_below("/z") == ()
    assert mounts.names_below("/nowhere") == ()


def test_inside_a_mount_a_nested_one_shows_on_its_way() -> None:
    """A mount deep inside another makes directories of the names that lead to it."""
    mounts = table("/a", "/a/b/c")
    assert mounts.names_below("/a") == ("b",)
    assert mounts.names_below("/a/b") == ("c",)
    assert located(mounts, "/a/b") == ("/a", "b")


def test_a_path_to_nowhere_names_the_mounts() -> None:
    """An unmounted path is not found, and the error says what is mounted."""
    with pytest.raises(NotFoundError, match=r"no mount covers /x/y \(mounts: /a, /b\)"):
        table("/b", "/a").locate("/x/y")
    with pytest.raises(NotFoundError, match=r"mounts: none"):
        table().locate("/x")


def test_an_empty_table_has_an_empty_root() -> None:
    """Without mounts there is still "/", with nothing in it."""
    assert table().locate("/") is None
    assert table().names_below("/") == ()
    assert len(table()) == 0


def test_a_mount_over_a_mount_is_refused() -> None:
    """Two mounts at one path are a configuration error."""
    with pytest.raises(ConfigError, match="mount /a: something is mounted there already"):
        table("/a", "/b", "/a")


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("a", "not absolute"),
        ("", "not absolute"),
        ("/a/", "without a trailing slash, as '/a'"),
        ("/a//b", "single slashes, as '/a/b'"),
        ("//a", "single slashes, as '/a'"),
        ("/a/../b", "'..' is not allowed"),
        ("/./a", "'.' is not allowed"),
        ("/a\0", "NUL"),
        ("/" + "x" * 256, "256 bytes"),
    ],
)
def test_what_cannot_be_a_mount_point_is_refused(path: str, words: str) -> None:
    """A bad mount point is one line that says how to write it."""
    with pytest.raises(ConfigError, match=words) as caught:
        check_mount_path(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=words):
        table(path)


PATHS = st.lists(st.sampled_from("abc"), min_size=1, max_size=4).map(lambda names: "/" + "/".join(names))


@given(st.sets(PATHS, max_size=6), PATHS)
def test_locate_agrees_with_trying_every_mount(paths: set[str], path: str) -> None:
    """The table finds what a search through all mounts finds; a directory it knows is the parent of what is mounted."""
    mounts = table(*paths)
    covering = [one for one in paths if path == one or path.startswith(one + "/")]
    is_above = any(one.startswith(path + "/") for one in paths)
    if covering:
        longest = max(covering, key=len)
        assert mounts.locate(path) == Location(Mount(longest), path[len(longest) + 1 :])
    elif is_above:
        assert mounts.locate(path) is None
    else:
        with pytest.raises(NotFoundError):
            mounts.locate(path)
    below = {one[len(path) + 1 :].split("/")[0] for one in paths if one.startswith(path + "/")}
    assert mounts.names_below(path) == tuple(sorted(below))
    for name in below:
        assert parent_and_name(f"{path}/{name}") == (path, name)
