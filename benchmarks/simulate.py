"""A plan's step replayed event by event, for 8 to 16,384 ranks, beside the planner's estimate of it.

    python -m benchmarks.simulate [INVENTORY] [KEY=VALUE ...] [--hardware h100] [--ranks 8 64 512 4096 16384]

Every rank has a clock. An all-to-all is its messages: in round k rank a sends to rank a + k, over the link between
them, when both ends are free; each has the latency of a message beside its bytes. So a rank that is late makes those
late that wait for its rows, and these others in turn. The lengths of a rank's examples are drawn (log-normal, of
--spread, cut at the longest and of the planner's mean): its ids, vectors and FLOPs follow, the latter with the square
of a length. `balanced` deals the examples of all ranks by FLOPs, as gr/parallel/load_balance.py does. Gradients of the
dense part go in buckets of 25 MB beside the backward pass, each when the slowest rank has computed it. With `ahead`
the ids of a step travel while the one before is computed, as on a GPU (gr/training/pipeline.py).

The planner counts none of this: every phase waits for its slowest rank, lengths are the mean, and ids wait for the step
before. `equal` is the replay with lengths that are the mean too, which should be the planner's step.
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gr.config.inventory import InventoryConfig, TowerDense
from gr.errors import PlanError
from gr.parallel.load_balance import deal
from gr.planner.estimate import Estimate, estimate, table_costs
from gr.planner.estimate_dense import dense_work, sequence_flops
from gr.planner.estimate_tables import MESSAGE_SECONDS, ROW_TYPES, ShardCosts
from gr.planner.inventory import load_inventory
from gr.planner.memory import PARAMETER_BYTES
from gr.planner.plan import search
from gr.planner.topology import Topology, parse_topology

BUCKET_BYTES = 25e6  # of DDP
STEPS, WARMUPS = 4, 2


def all_to_all(ready_R: np.ndarray, gives_R: np.ndarray, takes_R: np.ndarray, topology: Topology) -> np.ndarray:
    """When each rank has all that is sent to it. gives_R: bytes of each; takes_R: the share that goes to each, sum 1.

    A rank sends and receives one message at a time on each of its two links, to its own host and to others.
    """
    ranks, local = len(ready_R), topology.ranks_per_host
    if ranks == 1:
        return ready_R
    ready_R = ready_R + _latency(topology)
    host_R = np.arange(ranks) // local
    # When the links of a rank to its own host, and to others, are free to send and to receive.
    sends, receives = [ready_R, ready_R], [ready_R, ready_R]
    seconds = [gives_R / topology.intra_bandwidth, gives_R / topology.inter_bandwidth]
    for k in range(1, ranks):
        to_R = _rotated(takes_R, k)
        near_R = host_R == _rotated(host_R, k) if k < local or ranks - k < local else None
        for link in (0, 1) if near_R is not None else (1,):
            receiver_R = _rotated(receives[link], k)
            end_R = np.maximum(sends[link], receiver_R) + (MESSAGE_SECONDS + seconds[link] * to_R)
            if near_R is not None:
                on_R = near_R if link == 0 else ~near_R
                receiver_R = np.where(on_R, end_R, receiver_R)
                end_R = np.where(on_R, end_R, sends[link])
            else:
                receiver_R = end_R
            sends[link], receives[link] = end_R, _rotated(receiver_R, ranks - k)
    return np.maximum(*receives)


def _rotated(values_R: np.ndarray, by: int) -> np.ndarray:
    """values_R[a + by] in place a, around the ranks."""
    return np.concatenate((values_R[by:], values_R[:by]))


def _latency(topology: Topology) -> float:
    return topology.inter_latency if topology.hosts > 1 else topology.intra_latency


def reduce_scatter(ready_R: np.ndarray, bytes_: float, topology: Topology) -> np.ndarray:
    """When each rank has its sum: a ring, in which a rank adds to what its neighbour has passed on."""
    ranks = len(ready_R)
    if ranks == 1:
        return ready_R
    chunk, done_R = bytes_ / ranks, ready_R + _latency(topology)
    slowest = max(1 / topology.intra_bandwidth, 1 / topology.inter_bandwidth / topology.ranks_per_host)
    each = MESSAGE_SECONDS + chunk * (slowest if topology.hosts > 1 else 1 / topology.intra_bandwidth)
    for _ in range(1, ranks):
        done_R = np.maximum(done_R, np.roll(done_R, 1)) + each
    return done_R


@dataclass(frozen=True)
class Group:
    """The tables of one kind and sharding type, which are sent together: bytes and seconds of each rank, mean batches.

    scatters: vectors are added up on the way.
    """

    scatters: bool
    ids_R: np.ndarray
    vectors_R: np.ndarray
    gradients_R: np.ndarray
    lookup_R: np.ndarray
    update_R: np.ndarray


@dataclass(frozen=True)
class Work:
    """What a step of a plan is made of. gradient_bytes: of the dense part."""

    topology: Topology
    inventory: InventoryConfig
    groups: tuple[Group, ...]
    replica_lookup: float
    replica_update: float
    forward: float
    backward: float
    gradient_bytes: float


def work_of(estimated: Estimate) -> Work:
    plan, topology = estimated.plan, estimated.plan.topology
    inventory, ranks = plan.inventory, plan.topology.ranks
    if inventory.groups > 1:
        raise PlanError("groups are not replayed: simulate one, groups=1 on the ranks of a group")
    sums: dict[tuple[str, str], dict[str, np.ndarray]] = {}
    lookup = update = replicated = 0.0
    for table, placement, costs in zip(inventory.tables, plan.placements, table_costs(plan), strict=True):
        if placement.sharding_type == "data_parallel":
            lookup, update = lookup + float(costs.lookup[0]), update + float(costs.update[0])
            replicated += float(costs.table_gradients[0])
            continue
        if placement.sharding_type in ("table_row_wise", "grid_shard"):
            raise PlanError(f"table {table.name}: {placement.sharding_type} is not replayed; allow other types")
        kind = table.kind, placement.sharding_type
        of_kind = sums.setdefault(kind, {name: np.zeros(ranks) for name in _SUMMED})
        for name in _SUMMED:
            np.add.at(of_kind[name], np.array(placement.ranks), getattr(costs, name))
    speed = inventory.dense_efficiency * (topology.flops_bf16 if inventory.precision == "bf16" else topology.flops_fp32)
    dense = dense_work(inventory, inventory.batch_on(ranks))
    groups = [
        Group(kind[0] == "pooled" and kind[1] in ROW_TYPES, *(of_kind[name] for name in _SUMMED))
        for kind, of_kind in sums.items()
    ]
    return Work(
        topology=topology,
        inventory=inventory,
        groups=tuple(groups),
        replica_lookup=lookup,
        replica_update=update,
        forward=dense.forward_flops / speed,
        backward=dense.backward_flops / speed,
        gradient_bytes=dense.parameters * PARAMETER_BYTES + replicated,
    )


_SUMMED = ("id_bytes", "vector_bytes", "gradient_bytes", "lookup", "update")
assert set(_SUMMED) <= {*ShardCosts.__dataclass_fields__}


@dataclass(frozen=True)
class Lengths:
    """How the examples of a step are drawn and dealt. spread: of the logarithm of a length; 0: all are the mean."""

    spread: float = 0.0
    balanced: bool = False

    def draw(
        self, inventory: InventoryConfig, ranks: int, random: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, FLOPs) of every rank in a step, over those of a batch of mean lengths, [R] each."""
        batch, dense = inventory.batch_on(ranks), inventory.dense
        if not isinstance(dense, TowerDense) or not self.spread:
            return np.ones(ranks), np.ones(ranks)
        lengths_N = np.minimum(random.lognormal(0.0, self.spread, ranks * batch) * dense.mean_length, dense.max_length)
        lengths_N = np.maximum(lengths_N * (dense.mean_length / lengths_N.mean()), 1.0)
        mean = float(sequence_flops(inventory, np.array([dense.mean_length]))[0])
        flops_N = sequence_flops(inventory, lengths_N) / mean
        owner_N = deal(flops_N, ranks) if self.balanced else np.arange(ranks).repeat(batch)
        tokens_R, flops_R = (np.bincount(owner_N, each, minlength=ranks) for each in (lengths_N, flops_N))
        return tokens_R / (batch * dense.mean_length), flops_R / batch


def replay(work: Work, lengths: Lengths, ahead: bool = False, seed: int = 0) -> tuple[float, float]:
    """(seconds of a step, share of it that the mean rank waits for others) over STEPS steps."""
    topology, ranks, random = work.topology, work.topology.ranks, np.random.default_rng(seed)
    clock_R, sent_R = np.zeros(ranks), np.zeros(ranks)  # the end of the last step; when ids may be sent
    marks, busy = [], 0.0
    for step in range(WARMUPS + STEPS):
        tokens_R, flops_R = lengths.draw(work.inventory, ranks, random)
        share_R, load = tokens_R / tokens_R.sum(), float(tokens_R.mean())
        began_R = clock_R
        clock_R, computed_R = _exchange_and_look_up(work, sent_R if ahead else clock_R, clock_R, share_R, load)
        sent_R = clock_R  # the next ids leave when this step's rows are there
        computed_R = computed_R + work.replica_lookup + (work.forward + work.backward) * flops_R
        forward_R = clock_R + work.replica_lookup + work.forward * flops_R
        reduced = _all_reduced(work, forward_R, work.backward * flops_R)
        clock_R = forward_R + work.backward * flops_R
        for group in work.groups:
            if group.scatters:
                clock_R = reduce_scatter(clock_R, float(group.gradients_R.mean()), topology)
            else:
                total = group.gradients_R.sum()
                clock_R = all_to_all(clock_R, share_R * total, group.gradients_R / total, topology)
            clock_R, computed_R = clock_R + group.update_R * load, computed_R + group.update_R * load
        clock_R = np.maximum(clock_R, reduced) + work.replica_update
        if step >= WARMUPS:
            marks.append(float(clock_R.mean() - began_R.mean()))
            busy += float((computed_R + work.replica_update).mean())
    seconds = sum(marks) / len(marks)
    return seconds, 1 - busy / STEPS / seconds


def _exchange_and_look_up(
    work: Work, send_R: np.ndarray, ready_R: np.ndarray, share_R: np.ndarray, load: float
) -> tuple[np.ndarray, np.ndarray]:
    """(when each rank has its rows, its seconds of lookups). send_R: when its ids may leave."""
    computed_R = np.zeros_like(ready_R)
    for group in work.groups:
        total = group.ids_R.sum()
        # Lengths first, then ids.
        at_R = all_to_all(send_R, np.zeros_like(ready_R), share_R, work.topology)
        at_R = all_to_all(at_R, share_R * total * load, group.ids_R / total, work.topology)
        ready_R = np.maximum(ready_R, at_R) + group.lookup_R * load
        computed_R = computed_R + group.lookup_R * load
        if group.scatters:
            ready_R = reduce_scatter(ready_R, float(group.vectors_R.mean()), work.topology)
        else:
            ready_R = all_to_all(ready_R, group.vectors_R * load, share_R, work.topology)
        send_R = at_R
    return ready_R, computed_R


def _all_reduced(work: Work, forward_R: np.ndarray, backward_R: np.ndarray) -> float:
    """When the gradients of the dense part are reduced: bucket after bucket, each when all ranks have computed it."""
    topology, ranks = work.topology, work.topology.ranks
    if ranks == 1:
        return 0.0
    buckets = max(1, math.ceil(work.gradient_bytes / BUCKET_BYTES))
    sent = 2 * work.gradient_bytes / buckets * (ranks - 1) / ranks
    seconds = sent / topology.intra_bandwidth
    latency = topology.intra_latency
    if topology.hosts > 1:
        seconds = max(seconds, sent / topology.ranks_per_host / topology.inter_bandwidth)
        latency = topology.inter_latency + MESSAGE_SECONDS * 2 * math.log2(topology.hosts)  # a tree of hosts
    at = 0.0
    for bucket in range(1, buckets + 1):
        at = max(at, float((forward_R + backward_R * bucket / buckets).max())) + latency + seconds
    return at


def simulated(inventory: InventoryConfig, topology: Topology, spread: float) -> tuple[float, ...]:
    """Seconds of a step: the planner's, then replayed with equal lengths, drawn, balanced, and balanced with ids ahead.

    Last, the share of the last but one that the mean rank waits.
    """
    estimated = estimate(search(inventory, topology))
    work, balanced = work_of(estimated), Lengths(spread, balanced=True)
    equal, late, dealt = (replay(work, lengths) for lengths in (Lengths(), Lengths(spread), balanced))
    ahead = replay(work, balanced, ahead=True)
    return estimated.step_seconds, equal[0], late[0], dealt[0], *ahead


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inventory", nargs="?", default="configs/scale/hstu-1.5t.yaml")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--hardware", default="h100")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64, 512, 4096, 16384])
    parser.add_argument("--rows-a-rank", action="store_true", help="rows grow with the ranks; as written at 512")
    parser.add_argument("--spread", type=float, default=0.6, help="of the logarithm of a length")
    options = parser.parse_args(arguments)
    inventory = load_inventory(options.inventory, options.overrides)
    names = ("ranks", "planner ms", "equal / planner", "drawn ms", "balanced ms", "and ahead ms", "waits", "examples/s")
    print(f"| {' | '.join(names)} |\n{'|---' * len(names)}|")
    for ranks in options.ranks:
        topology, sized = parse_topology(f"{options.hardware}x{ranks}"), inventory
        if options.rows_a_rank:
            tables = [t.model_copy(update={"rows": max(1, t.rows * ranks // 512)}) for t in inventory.tables]
            sized = inventory.model_copy(update={"tables": tuple(tables)})
        planned, equal, late, dealt, ahead, waits = simulated(sized, topology, options.spread)
        cells = [f"{ranks:,}", f"{1e3 * planned:.1f}", f"{equal / planned:.3f}"]
        cells += [f"{1e3 * seconds:.1f}" for seconds in (late, dealt, ahead)]
        cells += [f"{waits:.1%}", f"{ranks * sized.batch_on(ranks) / ahead:,.0f}"]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
