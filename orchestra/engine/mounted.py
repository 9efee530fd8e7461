"""A mount with its store opened, or the reason why it could not be."""

from __future__ import annotations

from dataclasses import dataclass, field

from orchestra.config import MountConfig
from orchestra.errors import OrchestraError
from orchestra.stores.carrying import PlacingStore, as_placing
from orchestra.stores.contract import UnderStore


@dataclass(frozen=True, slots=True)
class OpenedMount:
    """One entry of the daemon's mount table."""

    config: MountConfig
    source: str  # "config": from orchestra.toml; "added": by `orchestra mount add`
    opened: UnderStore | None
    error: OrchestraError | None = None
    placing: PlacingStore | None = field(init=False, repr=False, compare=False)  # the same store, if it can

    def __post_init__(self) -> None:
        object.__setattr__(self, "placing", as_placing(self.opened))

    @property
    def path(self) -> str:
        """Where it is mounted."""
        return self.config.path

    @property
    def freshness_s(self) -> float:
        """How old metadata may be."""
        return self.config.freshness_s

    @property
    def store(self) -> UnderStore:
        """The opened store; `check_usable` says whether there is one."""
        assert self.opened is not None, "check_usable comes first"
        return self.opened

    def check_usable(self) -> None:
        """Raise the error that kept the store from being opened, if one did."""
        if self.error is not None:
            raise type(self.error)(f"mount {self.path}: {self.error}")
