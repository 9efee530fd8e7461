"""What does each eviction policy keep? Hit ratios of shuffled epochs and of skewed reads, and what is written for them.

    python benchmarks/eviction.py [--quick] [--record]

First on paper: the policies as they are, without files, over traces of names. Then a daemon with a real cache, over the
same trace as paper, to prove that the real thing keeps what the policy says. Counts, not times: a busy machine changes
nothing. Ratios of epochs are from the second epoch on; "written" is what was put into the cache from then on, as a part
of the data set, per epoch.
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from classic_policies import CLASSICS, belady_hits
from common import common_arguments, machine_state, publish, workspace

from orchestra.blocks.eviction import POLICIES, EvictionPolicy, NextUses, PlanPolicy, make_policy
from orchestra.client.node import NodeClient
from orchestra.client.process import daemon_status, start_daemon, stop_daemon
from orchestra.config import load_config

SHARES = (0.1, 0.35, 0.5, 0.8)
EPOCHS = 4
SKEWS = (0.7, 0.9, 1.1)
SKEWED_SHARES = (0.01, 0.1)
FILE_SIZE_BYTES = 16384
SEED = 20261121


@dataclass(frozen=True, slots=True)
class Kept:
    """What came of a trace: hits and writes after the first epoch (or after the warm-up), as parts of the reads."""

    hit_ratio: float
    written: float


def names_of(count: int) -> list[str]:
    """Names like those of small objects."""
    return [f"{index:032x}" for index in range(count)]


def epochs(names: Sequence[str]) -> list[str]:
    """The data set in a new order each epoch."""
    chance = random.Random(SEED)
    return [name for _ in range(EPOCHS) for name in chance.sample(names, len(names))]


def skewed(names: Sequence[str], skew: float) -> list[str]:
    """Reads by Zipf's law."""
    weights = [1 / (rank + 1) ** skew for rank in range(len(names))]
    return random.Random(SEED).choices(names, weights, k=10 * len(names))


def on_paper(policy: EvictionPolicy, reads: Sequence[str], capacity: int, first: int) -> Kept:
    """Read `reads` through a cache of `capacity` names; count from read `first` on."""
    held: set[str] = set()
    hits = writes = 0
    for at, name in enumerate(reads):
        if isinstance(policy, PlanPolicy):
            policy.advance("reader", at)
        if name in held:
            hits += at >= first
        elif len(held) < capacity or policy.admits(name):
            if len(held) >= capacity:
                victim = next(policy.victims())
                policy.evict(victim)
                held.remove(victim)
            policy.add(name)
            held.add(name)
            writes += at >= first
        policy.touch(name)
    count = len(reads) - first
    return Kept(hits / count, writes / count)


def planned(reads: Sequence[str]) -> EvictionPolicy:
    """The `plan` policy, told the whole order."""
    policy = make_policy("plan")
    assert isinstance(policy, PlanPolicy)
    policy.follow("reader", NextUses(reads))
    return policy


def classic(kind: Callable[[int], object], reads: Sequence[str], capacity: int, first: int) -> float:
    """The hit ratio of one of the classics."""
    cache = kind(capacity)
    hits: list[bool] = [cache.read(name) for name in reads]  # type: ignore[attr-defined]
    return sum(hits[first:]) / (len(reads) - first)


def epoch_lines(count: int) -> tuple[list[str], list[str]]:
    """Return the table of shuffled epochs and its verdicts."""
    names = names_of(count)
    reads = epochs(names)
    policies = ("auto", "never", "plan", "lru", "s3fifo", "sieve")
    rows = [
        f"| c | {' | '.join(policies)} | LRU's formula | Belady | written: auto | never | lru |",
        f"|---|{'---:|' * (len(policies) + 5)}",
    ]
    verdicts = []
    for share in SHARES:
        capacity = int(share * count)
        kept = {
            name: on_paper(planned(reads) if name == "plan" else make_policy(name), reads, capacity, count)
            for name in policies
        }
        best = belady_hits(reads, capacity, count) / (len(reads) - count)
        formula = share + (1 - share) * math.log(1 - share)
        written = " | ".join(f"{kept[name].written:.4f}" for name in ("auto", "never", "lru"))
        ratios = " | ".join(f"{kept[name].hit_ratio:.3f}" for name in policies)
        rows.append(f"| {share} | {ratios} | {formula:.3f} | {best:.3f} | {written} |")
        for name in ("auto", "never"):
            is_near = abs(kept[name].hit_ratio - share) <= 0.02
            verdicts.append(
                _verdict(f"`{name}` at c = {share}: {kept[name].hit_ratio:.3f}", is_near, "within 0.02 of c")
            )
        is_no_less = kept["plan"].hit_ratio >= share
        verdicts.append(_verdict(f"`plan` at c = {share}: {kept['plan'].hit_ratio:.3f}", is_no_less, "no less than c"))
        total = kept["auto"].written * (EPOCHS - 1)
        verdicts.append(
            _verdict(f"`auto` wrote {total:.4f} of the data set in all later epochs", total < 0.01, "< 0.01")
        )
    return rows, verdicts


def skewed_lines(count: int) -> tuple[list[str], list[str]]:
    """Return the table of skewed reads and its verdicts."""
    names = names_of(count)
    ours = ("auto", "s3fifo", "sieve", "lru")
    rows = [
        f"| Zipf | c | {' | '.join(ours)} | {' | '.join(CLASSICS)} | Belady | auto of the best classic |",
        f"|---|---|{'---:|' * (len(ours) + len(CLASSICS) + 2)}",
    ]
    verdicts = []
    for skew in SKEWS:
        reads = skewed(names, skew)
        for share in SKEWED_SHARES:
            capacity, first = int(share * count), len(reads) // 5
            kept = {name: on_paper(make_policy(name), reads, capacity, first).hit_ratio for name in ours}
            classics = {name: classic(kind, reads, capacity, first) for name, kind in CLASSICS.items()}
            bound = belady_hits(reads, capacity, first) / (len(reads) - first)
            best = max(classics.values())
            cells = [f"{ratio:.3f}" for ratio in (*kept.values(), *classics.values(), bound)]
            rows.append(f"| {skew} | {share} | {' | '.join(cells)} | {kept['auto'] / best:.3f} |")
            for name in ("auto", "s3fifo", "sieve"):
                text = f"`{name}` on Zipf {skew} at c = {share}: {kept[name] / best:.3f} of the best classic"
                verdicts.append(_verdict(text, kept[name] >= 0.97 * best, "at least 0.97"))
    return rows, verdicts


@contextlib.contextmanager
def node(folder: Path, names: Sequence[str], eviction: str, capacity: int) -> Iterator[NodeClient]:
    """A daemon whose cache holds so many of the files below `folder`/store."""
    root = folder / f"{eviction}-{capacity}"
    root.mkdir()
    config_path = root / "orchestra.toml"
    config_path.write_text(
        f'[cache]\ndir = "{root}/cache"\nsize = {capacity * FILE_SIZE_BYTES}\nfree_space_ratio = 0.0\n'
        f'block_size = "16KiB"\nextent_size = "64KiB"\neviction = "{eviction}"\n'
        f'[[mount]]\npath = "/d"\nuri = "file://{folder}/store"\nprefetch = "none"\nfreshness = "immutable"\n'
    )
    config = load_config(config_path, {})
    start_daemon(config)
    client = NodeClient(config)
    try:
        client.list("/d")
        yield client
    finally:
        client.close()
        stop_daemon(config)


def on_disk(folder: Path, names: Sequence[str], reads: Sequence[str], eviction: str, capacity: int) -> Kept:
    """The same as `on_paper`, through a daemon."""
    count = len(names)
    with node(folder, names, eviction, capacity) as client:
        before = (0, 0)
        for at, name in enumerate(reads):
            if at == count:
                before = _counts(client)
            if len(client.read_file(f"/d/{name}")) != FILE_SIZE_BYTES:
                raise SystemExit(f"read something else than /d/{name}")
        hits, written = (now - then for now, then in zip(_counts(client), before, strict=True))
    return Kept(hits / (len(reads) - count), written / FILE_SIZE_BYTES / (len(reads) - count))


def _counts(client: NodeClient) -> tuple[int, int]:
    status = daemon_status(client.config)
    assert status is not None, "the daemon runs"
    return status["reads"]["hits"], status["blocks"]["written_bytes"]


def real_lines(folder: Path, count: int) -> tuple[list[str], list[str]]:
    """Return the table of the daemon beside paper, and its verdicts."""
    names = names_of(count)
    (folder / "store").mkdir()
    for name in names:
        (folder / "store" / name).write_bytes(name.encode() * (FILE_SIZE_BYTES // len(name)))
    reads = epochs(names)
    rows = ["| policy | c | on paper | through a daemon | written | on paper |", "|---|---|---:|---:|---:|---:|"]
    verdicts = []
    for eviction, share in (("auto", 0.1), ("auto", 0.5), ("auto", 0.8), ("never", 0.5), ("lru", 0.5)):
        capacity = int(share * count)
        paper = on_paper(POLICIES[eviction](), reads, capacity, count)
        real = on_disk(folder, names, reads, eviction, capacity)
        rows.append(
            f"| {eviction} | {share} | {paper.hit_ratio:.3f} | {real.hit_ratio:.3f} "
            f"| {real.written:.4f} | {paper.written:.4f} |"
        )
        is_near = abs(paper.hit_ratio - real.hit_ratio) <= 0.02
        verdicts.append(
            _verdict(f"daemon, `{eviction}` at c = {share}: {real.hit_ratio:.3f}", is_near, "as paper, 0.02")
        )
        if eviction != "lru":
            total = real.written * (EPOCHS - 1)
            text = f"daemon, `{eviction}` at c = {share} wrote {total:.4f} of the data set in all later epochs"
            verdicts.append(_verdict(text, total < 0.01, "< 0.01"))
    return rows, verdicts


def _verdict(text: str, is_reached: bool, wanted: str) -> str:
    return f"- {text} (wanted {wanted}) {'reached' if is_reached else 'NOT REACHED'}"


def main() -> None:
    """Count, and publish."""
    options = common_arguments("Hit ratios of the eviction policies.").parse_args()
    state = machine_state()
    count, real_count = (2000, 500) if options.quick else (10_000, 2000)
    epoch_rows, epoch_verdicts = epoch_lines(count)
    skewed_rows, skewed_verdicts = skewed_lines(count)
    with workspace() as folder:
        real_rows, real_verdicts = real_lines(folder, real_count)
    lines = [
        f"{EPOCHS} shuffled epochs over {count} files, on paper; ratios from the second epoch on:",
        *("", *epoch_rows, "", *epoch_verdicts, ""),
        f"{10 * count} skewed reads of {count} files, on paper, the first fifth not counted:",
        *("", *skewed_rows, "", *skewed_verdicts, ""),
        f"The same epochs over {real_count} files of 16 KiB through a daemon with a real cache:",
        *("", *real_rows, "", *real_verdicts),
    ]
    publish("Eviction: what is kept", lines, options, state)


if __name__ == "__main__":
    main()
