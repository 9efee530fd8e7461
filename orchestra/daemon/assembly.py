"""Where the daemon's live objects are made and joined; the only place that knows all of them."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from orchestra.blocks.accounts import Accounts, SpaceLimit
from orchestra.blocks.disk import RecentUsage
from orchestra.blocks.eviction import make_policy
from orchestra.blocks.geometry import Geometry
from orchestra.blocks.index import BlockIndex, IndexUnavailableError
from orchestra.blocks.layout import CacheLayout, empty_tmp, prepare
from orchestra.blocks.reader import read_small_file
from orchestra.blocks.scan import adopt_ready
from orchestra.blocks.store import BlockStore
from orchestra.clock import Clock, SystemClock, boot_id
from orchestra.config import Config, FetchConfig
from orchestra.daemon.cluster import ClusterNode, secret_of
from orchestra.daemon.jobs.journal import Journal
from orchestra.daemon.jobs.load import LoadTools
from orchestra.daemon.jobs.runner import JobRunner
from orchestra.daemon.lock import OwnerLock
from orchestra.daemon.mounts import MountAdmin, StoreOpener
from orchestra.daemon.nodes.control import NodeControl
from orchestra.daemon.peers import PeerService
from orchestra.daemon.replicas import Replicas
from orchestra.daemon.space import SpaceAdmin
from orchestra.engine.carried import CarriedParts
from orchestra.engine.courier import Courier
from orchestra.engine.engine import Engine
from orchestra.engine.mounted import OpenedMount
from orchestra.engine.sharing import ClusterSharing
from orchestra.fetch.budget import ByteBudget
from orchestra.fetch.fetcher import Fetcher
from orchestra.fetch.shared import SharedFetcher
from orchestra.metadata.catalog import Catalog
from orchestra.metadata.reader import MetadataReader
from orchestra.namespace.mounts import MountTable
from orchestra.namespace.paths import is_shown_name
from orchestra.observe.access_ring import AccessLog
from orchestra.observe.change_log import ChangeLog
from orchestra.prefetch.dataset import DatasetLimits, DatasetPrefetch, dataset_margin_bytes
from orchestra.prefetch.planned import PlanRunner
from orchestra.prefetch.runner import PrefetchRunner
from orchestra.prefetch.steering import Steering
from orchestra.stores.contract import StoreSettings, UnderStore
from orchestra.stores.failover import FailoverStore

# Threads that write blocks and verify them: the disk is one, and two more hide its waits.
_WRITERS = 3
# Free space without which the daemon cannot even publish its mounts. A full disk is often full of our own blocks.
_FREE_AT_START_MIN_BYTES = 256 * 1024
# What is evicted when a record finds the disk full: the listing of 10,000 files.
_ROOM_FOR_RECORDS_BYTES = 1024 * 1024


@dataclass(slots=True)
class Node:
    """Everything that a daemon is made of."""

    config: Config
    layout: CacheLayout
    geometry: Geometry
    lock: OwnerLock
    clock: Clock
    blocks: BlockStore
    index: BlockIndex
    budget: ByteBudget
    fetcher: Fetcher
    catalog: Catalog
    engine: Engine
    mounts: MountAdmin
    accesses: AccessLog
    changes: ChangeLog
    prefetch: PrefetchRunner
    dataset: DatasetPrefetch
    jobs: JobRunner
    plans: PlanRunner
    space: SpaceAdmin
    writers: ThreadPoolExecutor
    started_ns: int
    cluster: ClusterNode | None  # one machine
    nodes: NodeControl | None = None  # beside `cluster`


def assemble(
    config: Config, *, started: str, clock: Clock | None = None, open_store: StoreOpener | None = None
) -> Node:
    """Open the cache directory and make a node on it; runs inside the daemon's event loop.

    Raises CacheDirectoryError, ConfigError. Nothing is left open then but what the ending process closes.
    """
    asyncio.get_running_loop()
    clock = clock or SystemClock()
    secret = None if config.cluster is None else secret_of(config.cluster)
    geometry = Geometry(config.cache.block_size_bytes, config.cache.extent_size_bytes)
    layout, geometry = prepare(config.cache.dir, geometry)
    lock = OwnerLock(layout.lock, started=started)
    blocks, index = _open_blocks(config, layout, geometry, clock)
    changes = ChangeLog(str(layout.changes))
    catalog = _catalog(layout, blocks, clock, changes)
    budget = ByteBudget(config.fetch.in_flight_bytes_max)
    fetcher = Fetcher(budget)
    writers = ThreadPoolExecutor(_WRITERS, thread_name_prefix="blocks")
    nothing: MountTable[OpenedMount] = MountTable([])
    engine = Engine(nothing, catalog, blocks, fetcher, geometry, writers)
    engine.carried = _carried(layout, engine)
    cluster = _clustered(config, layout, secret, engine, clock)

    space = _space_admin(layout, blocks, clock)
    open_store, use = open_store or _open_store, partial(_use_mounts, engine, space)
    mounts = _mount_admin(config, layout, geometry, open_store, use, changes)
    steering = Steering(engine, clock)
    tools = LoadTools(
        engine, blocks, geometry, writers, steering, Journal(layout.jobs), clock, config.fetch.requests_max
    )
    jobs = JobRunner(tools)
    node = Node(
        config=config,
        layout=layout,
        geometry=geometry,
        lock=lock,
        clock=clock,
        blocks=blocks,
        index=index,
        budget=budget,
        fetcher=fetcher,
        catalog=catalog,
        engine=engine,
        mounts=mounts,
        accesses=AccessLog(str(layout.accesses)),
        changes=changes,
        prefetch=PrefetchRunner(engine, geometry),
        dataset=_dataset(config, engine, blocks, geometry, steering, clock),
        jobs=jobs,
        plans=_plan_runner(config, engine, blocks, steering, clock),
        space=space,
        writers=writers,
        started_ns=clock.now_ns(),
        cluster=cluster,
    )
    _control(node)
    jobs.resume()
    return node


async def disassemble(node: Node) -> None:
    """Stop everything in the order that loses nothing, and give the cache directory back."""
    await node.plans.close()
    await node.jobs.close()
    await node.dataset.close()
    await node.prefetch.close()
    await node.engine.close()
    if node.engine.carried is not None:
        await node.engine.carried.courier.close()
    await node.mounts.close()
    node.writers.shutdown(wait=True)
    if node.blocks.close():
        with contextlib.suppress(IndexUnavailableError):  # the next daemon counts the files
            node.index.mark_clean(True)
    node.index.close()
    node.accesses.close()
    node.changes.close()
    node.lock.release()


def _clustered(
    config: Config, layout: CacheLayout, secret: bytes | None, engine: Engine, clock: Clock
) -> ClusterNode | None:
    """Make the node's part in its cluster: the engine asks an extent's owners before the store, and others ask it."""
    settings = config.cluster
    if settings is None:
        return None
    geometry = engine.geometry
    block_size = geometry.block_size_bytes
    cluster = ClusterNode(settings, secret, config.cache.size_bytes, clock, block_size_bytes=block_size)
    between = ByteBudget(config.fetch.in_flight_bytes_max)
    shared = SharedFetcher(engine.fetcher, cluster.peers, cluster, between, ufs_fallback=settings.ufs_fallback)
    engine.sharing = ClusterSharing(
        shared,
        engine.blocks,
        geometry,
        replicas=settings.replicas,
        disk_errors=lambda: engine.statistics.disk_errors,
    )
    cluster.shared = shared
    boot = boot_id()

    def read_small(digest: str, size_bytes: int) -> bytes | None:
        return read_small_file(layout.small_file(digest), bytes.fromhex(digest), size_bytes, boot)

    service = PeerService(engine, engine.blocks, geometry, cluster.is_first_owner, read_small)
    replicas = Replicas(cluster, service)
    shared.offer = replicas.offer
    cluster.service, cluster.replicas = service, replicas
    return cluster


def _carried(layout: CacheLayout, engine: Engine) -> CarriedParts | None:
    """What loads have a second process for; on one core it would only cost."""
    if len(os.sched_getaffinity(0)) < 2:
        return None
    courier = Courier(layout, engine.geometry, boot_id=boot_id())
    return CarriedParts(courier, engine.blocks, engine.fetcher, engine.statistics)


def _open_blocks(
    config: Config, layout: CacheLayout, geometry: Geometry, clock: Clock
) -> tuple[BlockStore, BlockIndex]:
    adopted_count = adopt_ready(layout, geometry)
    empty_tmp(layout)
    index = BlockIndex(layout.index, boot_id=boot_id())
    rows, clean = index.load()
    limit = SpaceLimit(
        config.cache.size_bytes, config.cache.free_space_ratio, RecentUsage(partial(os.statvfs, layout.prefix), clock)
    )
    new_policy = partial(make_policy, config.cache.eviction)
    accounts = Accounts(new_policy(), limit, index, make_policy=new_policy, clock=clock)
    accounts.load(rows)
    blocks = BlockStore(layout, geometry, accounts, boot_id=boot_id())
    if adopted_count or not clean:
        blocks.recount()
    disk = os.statvfs(layout.root)
    if disk.f_bavail * disk.f_frsize < _FREE_AT_START_MIN_BYTES:
        blocks.evict(_FREE_AT_START_MIN_BYTES)
    blocks.flush()
    return blocks, index


def _plan_runner(config: Config, engine: Engine, blocks: BlockStore, steering: Steering, clock: Clock) -> PlanRunner:
    return PlanRunner(
        engine,
        blocks,
        steering=steering,
        clock=clock,
        capacity_bytes=config.cache.size_bytes,
        requests_max=config.fetch.requests_max,
    )


def _mount_admin(
    config: Config,
    layout: CacheLayout,
    geometry: Geometry,
    open_store: StoreOpener,
    use: Callable[[MountTable[OpenedMount]], None],
    changes: ChangeLog,
) -> MountAdmin:
    return MountAdmin(
        config,
        layout,
        geometry,
        open_store=open_store,
        open_failover=FailoverStore,
        environ=os.environ,
        on_change=use,
        tell=changes.note,
    )


def _control(node: Node) -> None:
    if node.cluster is not None:
        node.nodes = NodeControl(node.cluster, node)


def _space_admin(layout: CacheLayout, blocks: BlockStore, clock: Clock) -> SpaceAdmin:
    reader = MetadataReader(layout.listing_file, layout.attr_file, clock=clock, boot_id=boot_id())
    return SpaceAdmin(blocks, reader, layout.root / "pins.json")


def _use_mounts(engine: Engine, space: SpaceAdmin, table: MountTable[OpenedMount]) -> None:
    engine.mounts = table
    space.use(table)


def _catalog(layout: CacheLayout, blocks: BlockStore, clock: Clock, changes: ChangeLog) -> Catalog:
    return Catalog(
        layout,
        str(layout.tmp),
        MetadataReader(layout.listing_file, layout.attr_file, clock=clock, boot_id=boot_id()),
        clock=clock,
        boot_id=boot_id(),
        is_shown_name=is_shown_name,
        make_room=lambda: blocks.evict(_ROOM_FOR_RECORDS_BYTES),
        on_change=changes.note,
    )


def _dataset(
    config: Config, engine: Engine, blocks: BlockStore, geometry: Geometry, steering: Steering, clock: Clock
) -> DatasetPrefetch:
    margin = dataset_margin_bytes(config.cache.size_bytes, config.fetch.in_flight_bytes_max)
    limits = DatasetLimits(config.fetch.requests_max, margin)
    return DatasetPrefetch(engine, geometry, steering, clock, limits, blocks.room_bytes)


def _open_store(settings: StoreSettings, fetch: FetchConfig) -> UnderStore:
    # Late, so that a process which only looks at settings does not load the store clients.
    from orchestra.stores.registry import open_store

    return open_store(settings, fetch)
