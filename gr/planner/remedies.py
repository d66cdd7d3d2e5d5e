"""Explanations of tables that do not fit, and remedies: every remedy is tried before it is named."""

from collections.abc import Collection, Iterator
from dataclasses import replace
from math import ceil

import numpy as np

from gr.config.inventory import InventoryConfig
from gr.errors import PlanError, printable
from gr.planner.dense_strategies import changed_keys, strategies, with_layers_again
from gr.planner.enumerate import search_space, without_option
from gr.planner.estimate import estimate
from gr.planner.groups import one_group
from gr.planner.memory import fixed_memory
from gr.planner.memory_bound import MemoryBound
from gr.planner.placement import Plan
from gr.planner.plan import DoesNotFit, search, table_capacity
from gr.planner.smallest import in_steps, smallest, smallest_by_strategy
from gr.planner.topology import Topology
from gr.units import duration, size

NAMED = 5
GROWTH, MOST_GROWTH = 1.05, 100  # of memory, until there is a plan


def nearest(inventory: InventoryConfig, topology: Topology) -> Plan:
    """A plan for tables that do not fit, which takes about as little more than the memory as any.

    It is the plan of a machine with more memory, which grows until there is a plan.
    """
    (hbm,), (host,) = MemoryBound(inventory, topology).least(np.array([topology.ranks]))
    fixed = sum(fixed_memory(inventory, topology).values())
    hbm, host = max(hbm, topology.hbm_bytes - fixed), max(host, topology.host_bytes)
    for power in range(MOST_GROWTH):
        larger = replace(topology, hbm_bytes=ceil(fixed + GROWTH**power * hbm), host_bytes=ceil(GROWTH**power * host))
        try:
            return replace(search(inventory, larger), topology=topology)
        except DoesNotFit:
            continue
    raise PlanError(f"{inventory.name}: no plan was found even with {GROWTH**power:.0f} times the memory of a rank")


def explanation(inventory: InventoryConfig, topology: Topology, error: DoesNotFit, divides: int = 0) -> str:
    """`error` with the shortfall in bytes, the tables that cause it, and the outcome of each remedy.

    divides: the number of ranks has to divide it, unless it is 0.
    """
    lines = [f"{inventory.name} does not fit {topology.name} x {topology.ranks}: {error}"]
    lines += _shortfall(inventory, topology)
    lines.append("remedies tried:")
    lines += [f"  {remedy}" for remedy in _remedies(inventory, topology, divides)]
    return "\n".join(map(printable, lines))  # a line break in a name begins no line


def _shortfall(inventory: InventoryConfig, topology: Topology) -> Iterator[str]:
    fixed, ranks = sum(fixed_memory(inventory, topology).values()), one_group(inventory, topology)[1].ranks
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
            f"shard of {inventory.tables[widest].name} takes {size(host_T[widest])}, and a rank has "
            f"{size(topology.host_bytes)}"
        )
    table_T = options.minimum_T(options.total_hbm_O)
    shard_T = options.minimum_T(options.hbm_O + np.maximum(options.extra_hbm_O, 0))
    missing = float(table_T.sum()) - left * ranks
    if missing > 0:
        yield (
            f"shortfall: {int(missing):,} bytes: the tables take at least {size(table_T.sum())}, and {ranks} "
            f"ranks have {size(left * ranks)} for them"
        )
    wide = np.flatnonzero(shard_T > left)
    if len(wide):
        worst = wide[np.argsort(-shard_T[wide], kind="stable")][:NAMED]
        yield (
            f"shortfall: {int(shard_T[worst[0]] - left):,} bytes on a rank: the smallest shard of "
            + ", ".join(f"{inventory.tables[t].name} takes {size(shard_T[t])}" for t in worst)
            + f", and a rank has {size(left)} for tables"
        )
    elif missing <= 0:
        yield (
            f"shortfall: none in total ({size(table_T.sum())} of {size(left * ranks)}), but no packing of the "
            "shards was found"
        )
    largest = np.argsort(-table_T, kind="stable")[:NAMED]
    yield "largest tables: " + ", ".join(f"{inventory.tables[t].name} {size(table_T[t])}" for t in largest)


def _remedies(inventory: InventoryConfig, topology: Topology, divides: int) -> Iterator[str]:
    yield _other_ranks(inventory, topology, divides)
    yield from _other_strategies(inventory, topology, divides)
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
        yield f"fp16 tables: {_outcome(halved, topology)[1]}"
    yield from _fewer_groups(inventory, topology)
    yield from _states_at_host(inventory, topology)
    yield _offloaded(inventory, topology)
    yield _smaller_batch(inventory, topology)


def _other_ranks(inventory: InventoryConfig, topology: Topology, divides: int) -> str:
    least, local = smallest(inventory, topology, divides), topology.ranks_per_host
    if least.ranks is None:
        return f"more hosts: {least.reason}"
    name = "more hosts" if least.ranks > topology.ranks else "fewer ranks"
    hosts = f"{-(-least.ranks // local)} hosts of {local}" if least.ranks > local else f"of a host of {local}"
    return f"{name}: {least.ranks} ranks fit ({hosts})" + (f"; {least.reason}" if least.reason else "")


def _other_strategies(inventory: InventoryConfig, topology: Topology, divides: int) -> Iterator[str]:
    """Each strategy of the dense part on these ranks, with layers computed again where it takes that, or on others."""
    for strategy in strategies(inventory, topology):
        for changed in with_layers_again(strategy):
            fits, outcome = _outcome(changed, topology)
            if fits:
                yield f"{changed_keys(inventory, changed)}: {outcome}"
                break
    for changed, ranks in smallest_by_strategy(inventory, topology, divides):
        if ranks is not None and ranks != topology.ranks:
            yield f"{changed_keys(inventory, changed)}: fits on {ranks:,} ranks"


def _fewer_groups(inventory: InventoryConfig, topology: Topology) -> Iterator[str]:
    """The most groups below the present number that help: each has a copy of the tables on its ranks."""
    fewer = [groups for groups in range(inventory.groups - 1, 0, -1) if inventory.groups % groups == 0]
    for groups in fewer:
        fits, outcome = _outcome(inventory.model_copy(update={"groups": groups}), topology)
        if fits or groups == 1:
            yield f"fewer groups: groups={groups}: {outcome}"
            return


def _states_at_host(inventory: InventoryConfig, topology: Topology) -> Iterator[str]:
    """Optimizer states of every element on the host, bf16 where that is offered, of the tables that have any."""
    changed, dtypes = [], set()
    for table in inventory.tables:
        optimizer = table.optimizer_config
        update: dict[str, str] = {"state": "host"}
        if not optimizer.state_fault(table.optimizer, "host", "bf16"):
            update["state_dtype"] = "bf16"
        if optimizer.states_a("element") and "fused" in table.kernels and table.state == "device":
            dtypes.add(update.get("state_dtype", table.state_dtype))
            changed.append(table.model_copy(update=update))
        else:
            changed.append(table)
    if dtypes and topology.host_bytes and topology.device == "cuda":
        outcome = _outcome(inventory.model_copy(update={"tables": tuple(changed)}), topology)[1]
        yield f"optimizer states on the host (state: host, state_dtype: {' or '.join(sorted(dtypes))}): {outcome}"


def _offloaded(inventory: InventoryConfig, topology: Topology) -> str:
    """The fewest tables on the host that help, those that free most memory first.

    Every number of them is planned, or excluded by the sums that too_large() has: packing is not monotone.
    """
    if topology.host_bytes == 0:
        return "offload: the hosts of this topology have no memory for tables"
    left = topology.hbm_bytes - sum(fixed_memory(inventory, topology).values())
    if left <= 0:
        return "offload: it moves tables alone, for which a rank has no memory at all"
    order, counts = _offload_order(inventory, topology, left)
    outcome = "no table would take less memory"
    for count in in_steps(counts):
        chosen = order[:count]
        fits, outcome = _outcome(_with_offload(inventory, chosen), topology)
        if fits:
            names = [inventory.tables[t].name for t in chosen]
            named = ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
            return f"offload {named} (kernels: [fused_uvm_caching]): {outcome}"
    if order and not counts:
        outcome = _outcome(_with_offload(inventory, order), topology)[1]
    return f"offload: with up to {len(order)} tables on the host (fused_uvm_caching) it still {outcome}"


def _offload_order(inventory: InventoryConfig, topology: Topology, left: float) -> tuple[list[int], list[int]]:
    """(tables that take less memory when they are offloaded, how many of them to offload so that sums permit a fit).

    left: bytes for tables on a rank.
    """
    every = range(len(inventory.tables))
    movable = set(every) - set(without_option(_with_offload(inventory, every), topology))
    plain, moved = search_space(inventory, topology), search_space(_with_offload(inventory, movable), topology)
    freed_T = plain.minimum_T(plain.total_hbm_O) - moved.minimum_T(moved.total_hbm_O)
    helps_T = (freed_T > 0) & (moved.minimum_T(moved.host_O) <= topology.host_bytes)
    order = [t for t in np.argsort(-freed_T, kind="stable").tolist() if helps_T[t]]
    shard_T, moved_T = plain.minimum_T(plain.hbm_O), moved.minimum_T(moved.hbm_O)
    total, counts = plain.minimum_T(plain.total_hbm_O).sum(), []
    ranks = one_group(inventory, topology)[1].ranks
    for count, table in enumerate(order, start=1):
        total, shard_T[table] = total - freed_T[table], moved_T[table]
        if total <= left * ranks and shard_T.max() <= left:
            counts.append(count)
    return order, counts


def _with_offload(inventory: InventoryConfig, chosen: Collection[int]) -> InventoryConfig:
    update = {"kernels": ("fused_uvm_caching",)}
    tables = [
        table.model_copy(update=update) if index in chosen else table for index, table in enumerate(inventory.tables)
    ]
    return inventory.model_copy(update={"tables": tuple(tables)})


def _smaller_batch(inventory: InventoryConfig, topology: Topology) -> str:
    field = "rank_batch_size" if inventory.rank_batch_size is not None else "global_batch_size"
    batch = inventory.batch_on(topology.ranks)
    per_rank = 1 if field == "rank_batch_size" else topology.ranks
    # Memory falls with the batch, but packing may fail at one and succeed at a larger one: every halving is tried.
    for halvings in range(1, batch.bit_length()):
        smaller = inventory.model_copy(update={field: (batch >> halvings) * per_rank})
        fits, outcome = _outcome(smaller, topology)
        if fits:
            return f"smaller batch, halved to {field}={getattr(smaller, field)}: {outcome}"
    return f"smaller batch: even {field}={per_rank} does not fit"


def _outcome(inventory: InventoryConfig, topology: Topology) -> tuple[bool, str]:
    try:
        estimated = estimate(search(inventory, topology))
    except PlanError as error:
        return False, f"does not fit: {error}"
    if not estimated.fits:
        return False, "does not fit"
    fullest, step = size(float(estimated.total_memory_R.max())), estimated.step_seconds
    return True, f"fits, {fullest} on the fullest rank, {duration(step)} a step"
