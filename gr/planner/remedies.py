"""Explanations of tables that do not fit, and remedies: every remedy is tried before it is named."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from gr.config.inventory import InventoryConfig
from gr.errors import PlanError, printable
from gr.planner.enumerate import search_space
from gr.planner.estimate import estimate
from gr.planner.memory import fixed_memory
from gr.planner.plan import DoesNotFit, search, table_capacity
from gr.planner.solve import too_large
from gr.planner.topology import Topology, with_ranks

MOST_RANKS = 1 << 16
NAMED = 5


@dataclass(frozen=True)
class Trial:
    """One number of ranks: whether a plan was found, and the fullest rank under it, or what was missing."""

    ranks: int
    fits: bool
    limit: str


def smallest(inventory: InventoryConfig, topology: Topology) -> tuple[int | None, list[Trial]]:
    """The smallest number of ranks that fits, None up to MOST_RANKS; and every number tried.

    Parts of one host are tried in powers of two, then whole hosts. A sum tells without a plan whether the tables exceed
    all memory together, so only larger numbers are planned.
    """
    local, tried = topology.ranks_per_host, dict[int, Trial]()

    def fits(ranks: int) -> bool:
        if ranks not in tried:
            tried[ranks] = _trial(inventory, with_ranks(topology, ranks))
        return tried[ranks].fits

    sizes = [1 << power for power in range(local.bit_length()) if 1 << power < local]
    smallest_ranks = next((ranks for ranks in sizes if fits(ranks)), None)
    if smallest_ranks is None:
        most = MOST_RANKS // local
        start = _first(most, lambda hosts: _may_fit(inventory, with_ranks(topology, hosts * local)) is None)
        if start is not None:
            if start > 1:
                fits((start - 1) * local)
            hosts = _first_that_fits(start, most, lambda hosts: fits(hosts * local))
            smallest_ranks = None if hosts is None else hosts * local
    return smallest_ranks, sorted(tried.values(), key=lambda trial: trial.ranks)


def _first_that_fits(start: int, most: int, fits: Callable[[int], bool]) -> int | None:
    """The first number from `start` on that fits, by growing steps and then halving; None up to four times `start`."""
    below, hosts = start - 1, start
    while not fits(hosts):
        below, hosts = hosts, hosts + max(1, hosts // 8)
        if hosts > min(most, 4 * start):
            return None
    while hosts - below > 1:
        middle = (below + hosts) // 2
        below, hosts = (below, middle) if fits(middle) else (middle, hosts)
    return hosts


def _may_fit(inventory: InventoryConfig, topology: Topology) -> str | None:
    """The reason why no plan can fit, by sums alone; None where they do not exclude one."""
    try:
        capacity = table_capacity(inventory, topology)
        return too_large(search_space(inventory, topology), capacity)
    except PlanError as error:
        return str(error)


def _trial(inventory: InventoryConfig, topology: Topology) -> Trial:
    reason = _may_fit(inventory, topology)
    if reason is not None:
        return Trial(topology.ranks, False, reason)
    try:
        estimated = estimate(search(inventory, topology))
    except PlanError as error:  # a constraint may exclude every option on a part of a host
        return Trial(topology.ranks, False, str(error))
    used = float(estimated.total_memory_R.max())
    return Trial(topology.ranks, estimated.fits, f"the fullest rank holds {_gb(used)} of {_gb(topology.hbm_bytes)}")


def explanation(inventory: InventoryConfig, topology: Topology, error: DoesNotFit) -> str:
    """`error` with the shortfall in bytes, the tables that cause it, and the outcome of each remedy."""
    lines = [f"{inventory.name} does not fit {topology.name} x {topology.ranks}: {error}"]
    lines += _shortfall(inventory, topology)
    lines.append("remedies tried:")
    lines += [f"  {remedy}" for remedy in _remedies(inventory, topology)]
    return "\n".join(map(printable, lines))  # a line break in a name begins no line


def _shortfall(inventory: InventoryConfig, topology: Topology) -> Iterator[str]:
    fixed = sum(fixed_memory(inventory, topology).values())
    try:
        left = table_capacity(inventory, topology).hbm_bytes
        options = search_space(inventory, topology)
    except DoesNotFit:
        yield f"shortfall: {int(fixed - topology.hbm_bytes):,} bytes a rank before any table is placed"
        return
    host_T = options.minimum_T(options.host_O)
    if host_T.max() > topology.host_bytes:
        widest = int(host_T.argmax())
        yield (
            f"shortfall: {int(host_T[widest] - topology.host_bytes):,} bytes of host memory on a rank: the smallest "
            f"shard of {inventory.tables[widest].name} takes {_gb(host_T[widest])}, and a rank has "
            f"{_gb(topology.host_bytes)}"
        )
    table_T = options.minimum_T(options.total_hbm_O)
    shard_T = options.minimum_T(options.hbm_O + np.maximum(options.extra_hbm_O, 0))
    missing = float(table_T.sum()) - left * topology.ranks
    if missing > 0:
        yield (
            f"shortfall: {int(missing):,} bytes: the tables take at least {_gb(table_T.sum())}, and {topology.ranks} "
            f"ranks have {_gb(left * topology.ranks)} for them"
        )
    wide = np.flatnonzero(shard_T > left)
    if len(wide):
        worst = wide[np.argsort(-shard_T[wide], kind="stable")][:NAMED]
        yield (
            f"shortfall: {int(shard_T[worst[0]] - left):,} bytes on a rank: the smallest shard of "
            + ", ".join(f"{inventory.tables[t].name} takes {_gb(shard_T[t])}" for t in worst)
            + f", and a rank has {_gb(left)} for tables"
        )
    elif missing <= 0:
        yield (
            f"shortfall: none in total ({_gb(table_T.sum())} of {_gb(left * topology.ranks)}), but no packing of the "
            "shards was found"
        )
    largest = np.argsort(-table_T, kind="stable")[:NAMED]
    yield "largest tables: " + ", ".join(f"{inventory.tables[t].name} {_gb(table_T[t])}" for t in largest)


def _remedies(inventory: InventoryConfig, topology: Topology) -> Iterator[str]:
    ranks, _ = smallest(inventory, topology)
    if ranks is None:
        yield f"more hosts: none up to {MOST_RANKS} ranks suffices"
    else:
        local = topology.ranks_per_host
        yield f"more hosts: {ranks} ranks fit ({-(-ranks // local)} hosts of {local})"
    halved = inventory.model_copy(
        update={
            "tables": tuple(
                t.model_copy(update={"dtype": "fp16"}) if t.dtype == "fp32" else t for t in inventory.tables
            )
        }
    )
    if halved == inventory:
        yield "fp16 tables: they take two bytes already"
    else:
        yield f"fp16 tables: {_outcome(halved, topology)}"
    yield _offloaded(inventory, topology)
    yield _smaller_batch(inventory, topology)


def _offloaded(inventory: InventoryConfig, topology: Topology) -> str:
    if topology.host_bytes == 0:
        return "offload: the hosts of this topology have no memory for tables"
    bytes_T = np.array([table.rows * table.dim for table in inventory.tables])
    order = np.argsort(-bytes_T, kind="stable")
    most = len(order)
    start = _first(most, lambda count: _may_fit(_with_offload(inventory, order[:count]), topology) is None)
    offloaded = None
    if start is not None:
        offloaded = _first_that_fits(
            start, most, lambda count: _fits(_with_offload(inventory, order[:count]), topology)
        )
    if offloaded is None:
        return "offload: with every table on the host (fused_uvm_caching) it still does not fit"
    names = [inventory.tables[t].name for t in order[:offloaded]]
    named = ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
    outcome = _outcome(_with_offload(inventory, order[:offloaded]), topology)
    return f"offload {named} (kernels: [fused_uvm_caching]): {outcome}"


def _with_offload(inventory: InventoryConfig, tables: np.ndarray) -> InventoryConfig:
    chosen = set(tables.tolist())
    return inventory.model_copy(
        update={
            "tables": tuple(
                table.model_copy(update={"kernels": ("fused_uvm_caching",)}) if index in chosen else table
                for index, table in enumerate(inventory.tables)
            )
        }
    )


def _smaller_batch(inventory: InventoryConfig, topology: Topology) -> str:
    field = "rank_batch_size" if inventory.rank_batch_size is not None else "global_batch_size"
    batch = inventory.batch_on(topology.ranks)
    per_rank = 1 if field == "rank_batch_size" else topology.ranks
    halvings = batch.bit_length() - 1

    def with_batch(halved: int) -> InventoryConfig:
        return inventory.model_copy(update={field: max(1, batch >> halved) * per_rank})

    start = _first(halvings, lambda halved: _may_fit(with_batch(halved), topology) is None)
    halved = None
    if start is not None:
        halved = next((n for n in range(start, halvings + 1) if _fits(with_batch(n), topology)), None)
    if halved is None:
        return f"smaller batch: even {field}={per_rank} does not fit"
    smaller = with_batch(halved)
    return f"smaller batch, halved to {field}={getattr(smaller, field)}: {_outcome(smaller, topology)}"


def _first(most: int, holds: Callable[[int], bool]) -> int | None:
    """The first of 1..most for which `holds` is true; it is monotone. None where it is false at `most`."""
    if most < 1 or not holds(most):
        return None
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def _fits(inventory: InventoryConfig, topology: Topology) -> bool:
    return _trial(inventory, topology).fits


def _outcome(inventory: InventoryConfig, topology: Topology) -> str:
    try:
        estimated = estimate(search(inventory, topology))
    except PlanError as error:
        return f"does not fit: {error}"
    if not estimated.fits:
        return "does not fit"
    return (
        f"fits, {_gb(float(estimated.total_memory_R.max()))} on the fullest rank, "
        f"{estimated.step_seconds * 1e3:.1f} ms a step"
    )


def _gb(size: float) -> str:
    return f"{size / 1e9:,.1f} GB"
