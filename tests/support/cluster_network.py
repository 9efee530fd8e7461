"""Where the nodes of a test's cluster live: a network namespace each with a real address, or loopback addresses.

A namespace "hub" holds a bridge, the store and etcd; each node has a namespace of its own and one link to the bridge,
which can be cut: then packets vanish without a word, as when a cable is pulled. Needs root and `ip` (iproute2).
"""

from __future__ import annotations

import ctypes
import itertools
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, TypeVar

T = TypeVar("T")
_CLONE_NEWNET = 0x40000000
# Private, and unlikely to be a route of the machine; nothing of it leaves the namespaces.
_SUBNET = "10.213.77"
_PREFIX = "orcht"
# One test's network may be there while another's is made.
_numbers = itertools.count()


class Network(Protocol):
    """Addresses and commands of `count` places (numbered from 0) and of a hub that all reach."""

    hub_address: str
    hub_command: tuple[str, ...]

    def address(self, number: int) -> str:
        """The address of a place."""

    def command(self, number: int) -> tuple[str, ...]:
        """What to put in front of a command that is to run there."""

    def at_hub(self, act: Callable[[], T]) -> T:
        """Do something there that opens sockets, and return what it returns."""

    def cut(self, number: int) -> None:
        """Cut the link of a place: packets vanish."""

    def mend(self, number: int) -> None:
        """Mend it."""


class Loopback:
    """127.0.0.1, 127.0.0.2, ... : for machines where no namespace can be made. Links cannot be cut."""

    hub_address = "127.0.0.1"
    hub_command: tuple[str, ...] = ()

    def address(self, number: int) -> str:
        return f"127.0.0.{number + 1}"

    def command(self, number: int) -> tuple[str, ...]:
        return ()

    def at_hub(self, act: Callable[[], T]) -> T:
        return act()

    def cut(self, number: int) -> None:
        raise NotImplementedError("a loopback address has no link to cut")

    mend = cut


class Namespaces:
    """`count` namespaces and a hub, joined by a bridge."""

    hub_address = f"{_SUBNET}.254"

    def __init__(self, count: int) -> None:
        name = f"{_PREFIX}-{os.getpid()}-{next(_numbers)}"
        self._hub = f"{name}-hub"
        self._names = [f"{name}-{number}" for number in range(count)]
        self.hub_command = _entering(self._hub)

    def make(self) -> None:
        """Make all of it."""
        _ip("netns", "add", self._hub)
        _ip("-n", self._hub, "link", "set", "lo", "up")
        _ip("-n", self._hub, "link", "add", "bridge", "type", "bridge")
        _ip("-n", self._hub, "addr", "add", f"{self.hub_address}/24", "dev", "bridge")
        _ip("-n", self._hub, "link", "set", "bridge", "up")
        for number, name in enumerate(self._names):
            _ip("netns", "add", name)
            _ip("-n", name, "link", "set", "lo", "up")
            link = ("link", "add", f"to{number}", "type", "veth", "peer", "name", "eth0", "netns", name)
            _ip("-n", self._hub, *link)
            _ip("-n", self._hub, "link", "set", f"to{number}", "master", "bridge", "up")
            _ip("-n", name, "addr", "add", f"{self.address(number)}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "eth0", "up")

    def remove(self) -> None:
        """Remove all of it; the links go with their namespaces."""
        for name in (*self._names, self._hub):
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)

    def address(self, number: int) -> str:
        return f"{_SUBNET}.{number + 1}"

    def command(self, number: int) -> tuple[str, ...]:
        return _entering(self._names[number])

    def at_hub(self, act: Callable[[], T]) -> T:
        return _inside(self._hub, act)

    def cut(self, number: int) -> None:
        _ip("-n", self._hub, "link", "set", f"to{number}", "down")

    def mend(self, number: int) -> None:
        _ip("-n", self._hub, "link", "set", f"to{number}", "up")


def can_make_namespaces() -> bool:
    """Whether this process may; where not, tests that cut links are skipped."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    name = f"{_PREFIX}-{os.getpid()}-try"
    made = subprocess.run(["ip", "netns", "add", name], check=False, capture_output=True).returncode == 0
    subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)
    return made


@contextmanager
def network(count: int) -> Iterator[Network]:
    """The best network that can be had here, removed in the end."""
    if not can_make_namespaces():
        yield Loopback()
        return
    _remove_leftovers()
    made = Namespaces(count)
    try:
        made.make()
        yield made
    finally:
        made.remove()


def _entering(name: str) -> tuple[str, ...]:
    # nsenter and not `ip netns exec`, which would give the process other mounts than ours.
    return ("nsenter", f"--net=/run/netns/{name}", "--")


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], check=False, capture_output=True, text=True)
    assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}"


def _inside(name: str, act: Callable[[], T]) -> T:
    """Run `act` in a thread that has entered the namespace: sockets belong to where they were made."""

    def enter_and_act() -> T:
        with Path(f"/run/netns/{name}").open("rb") as namespace:
            if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), _CLONE_NEWNET) != 0:
                raise OSError(ctypes.get_errno(), f"setns {name}")
        return act()

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(enter_and_act).result()


def _remove_leftovers() -> None:
    """Remove what a run that was killed left behind."""
    for path in Path("/run/netns").glob(f"{_PREFIX}-*"):
        if not Path(f"/proc/{path.name.split('-')[1]}").exists():
            subprocess.run(["ip", "netns", "del", path.name], check=False, capture_output=True)
