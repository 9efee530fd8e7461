"""Whom `daemon.readers` lets in."""

from __future__ import annotations

import asyncio
import grp
import os
import pwd

import pytest

from orchestra.daemon.guests import Admission

NOBODY = pwd.getpwnam("nobody")
NOBODYS_GROUP = grp.getgrgid(NOBODY.pw_gid).gr_name
NO_SUCH_UID = 54321


def admits(readers: list[str], uid: int) -> bool:
    return asyncio.run(Admission(readers).admits(uid))


@pytest.mark.parametrize("reader", ["*", NOBODY.pw_name, str(NOBODY.pw_uid), f"@{NOBODYS_GROUP}"])
def test_who_is_named_may_read(reader: str) -> None:
    """By name, by number, by a group, or as everybody."""
    assert admits(["somebody", reader], NOBODY.pw_uid)


def test_who_is_not_named_may_not() -> None:
    """Also not by a group's name without its sign, nor as a number that looks alike; an unknown user only by number."""
    assert not admits(["somebody", "@nogroup-at-all", f"0{NOBODY.pw_uid}", "@nobody-else"], NOBODY.pw_uid)
    assert not admits([f"@{NOBODY.pw_uid}", "nobod"], NOBODY.pw_uid)
    assert not admits(["somebody", "@root"], NO_SUCH_UID)
    assert admits([str(NO_SUCH_UID)], NO_SUCH_UID)


def test_the_owner_and_root_are_at_home() -> None:
    """Whatever is written."""
    assert admits([], os.geteuid())
    assert admits([], 0)
