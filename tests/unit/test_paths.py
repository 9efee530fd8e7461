"""What a path may look like: bad ones are refused with one line, odd but legal ones come through as they are."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestra.errors import NameTooLongError, UsageError
from orchestra.namespace.paths import is_shown_name, join, normalize_path, parent_and_name

NAMES = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=40).filter(
    lambda name: name not in (".", "..")
)


@pytest.mark.parametrize(
    ("path", "normalized"),
    [
        ("/", "/"),
        ("//", "/"),
        ("/a", "/a"),
        ("/a/", "/a"),
        ("/a///", "/a"),
        ("//a", "/a"),
        ("/a//b", "/a//b"),
        ("/...", "/..."),
        ("/.hidden/..x", "/.hidden/..x"),
        ("/a b/\n\t\x1b", "/a b/\n\t\x1b"),
        ("/\ufeffcaf\u0301e", "/\ufeffcaf\u0301e"),
        ("/\udcff", "/\udcff"),
    ],
)
def test_a_path_keeps_its_inside_and_loses_its_outer_slashes(path: str, normalized: str) -> None:
    """Slashes at both ends say nothing; what lies between is the store's business and stays as it is."""
    assert normalize_path(path) == normalized


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("", "is not absolute"),
        ("a/b", "is not absolute"),
        ("./a", "is not absolute"),
        ("/a/../b", "'..' is not allowed"),
        ("/..", "'..' is not allowed"),
        ("/a/./b", "'.' is not allowed"),
        ("/a/.", "'.' is not allowed"),
        ("/a/..", "'..' is not allowed"),
        ("/a\0b", "NUL"),
        ("/\ud800", "surrogate"),
    ],
)
def test_what_cannot_be_a_path_is_refused(path: str, words: str) -> None:
    """A way out of a mount, and what no file can be called, are usage errors that say so."""
    with pytest.raises(UsageError, match=words):
        normalize_path(path)


@pytest.mark.parametrize("path", [None, b"/a", 7])
def test_a_path_is_text(path: object) -> None:
    """Bytes, None and numbers are refused by name of their type."""
    with pytest.raises(UsageError, match=f"a path is a str, got {type(path).__name__}"):
        normalize_path(path)  # type: ignore[arg-type]  # on purpose


def test_names_are_limited_in_bytes() -> None:
    """255 bytes are a name and 256 are not, whether they are letters or parts of letters."""
    assert normalize_path("/" + "x" * 255) == "/" + "x" * 255
    assert normalize_path("/" + "é" * 127)
    for name in ("x" * 256, "é" * 128, "日" * 86):
        with pytest.raises(NameTooLongError, match=r"256 bytes|258 bytes"):
            normalize_path(f"/dir/{name}")


def test_paths_are_limited_in_bytes() -> None:
    """4,095 bytes are a path and 4,096 are not, as for the kernel."""
    longest = ("/" + "x" * 255) * 15 + "/" + "y" * 254
    assert normalize_path(longest) == longest
    with pytest.raises(NameTooLongError, match=r"path .* has 4096 bytes, the limit is 4095"):
        normalize_path(longest + "y")


@given(st.lists(NAMES, min_size=1, max_size=5))
def test_parent_and_name_undo_join(names: list[str]) -> None:
    """Joining a name to its parent gives the path back, down to the root."""
    path = "/"
    for name in names:
        path = join(path, name)
    assert normalize_path(path) == path
    for name in reversed(names):
        parent, last = parent_and_name(path)
        assert last == name
        assert join(parent, last) == path
        path = parent
    assert path == "/"
    assert parent_and_name("/") == ("/", "")


@pytest.mark.parametrize(
    ("name", "is_shown"),
    [
        (b"a", True),
        (b"...", True),
        (b"\xff\xfe", True),
        (b"x" * 255, True),
        (b"", False),
        (b".", False),
        (b"..", False),
        (b"a/b", False),
        (b"a\0b", False),
        (b"x" * 256, False),
    ],
)
def test_only_what_can_be_a_file_name_is_shown(name: bytes, is_shown: bool) -> None:
    """A listing shows what a folder could hold, and nothing else that a store may call a key."""
    assert is_shown_name(name) is is_shown
