"""A limit in bytes per second, for a load that is not to take the whole link. Pure but for the clock."""

from __future__ import annotations

from orchestra.clock import Clock

# Unused allowance that is kept: a tenth of a second, so that a pause of the loop does not lower the rate.
_BURST_S = 0.1


class Pace:
    """Says how long to wait before so many bytes."""

    def __init__(self, bytes_per_s: float, clock: Clock) -> None:
        assert bytes_per_s > 0, "a rate of nothing would wait for ever"
        self._bytes_per_s = bytes_per_s
        self._clock = clock
        self._free_at_ns = clock.now_ns()

    def wait_s(self, size_bytes: int) -> float:
        """Count `size_bytes` and return the seconds until they may be asked for; 0 if now."""
        now_ns = self._clock.now_ns()
        begins_ns = max(self._free_at_ns, now_ns - int(_BURST_S * 1e9))
        self._free_at_ns = begins_ns + int(size_bytes / self._bytes_per_s * 1e9)
        return max(0.0, (begins_ns - now_ns) / 1e9)
