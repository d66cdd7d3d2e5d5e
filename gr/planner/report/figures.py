"""Figures that both reports show, from one Estimate."""

from dataclasses import dataclass, replace

import numpy as np

from gr.planner.estimate import PHASES, Estimate, TableShare, table_costs
from gr.planner.estimate_dense import dense_work
from gr.planner.estimate_tables import TABLE_PHASES
from gr.units import count, duration, flops, percent, size

EVEN = 0.02  # a straggler less than this share above the mean is not explained
LARGEST_TABLES = 3


@dataclass(frozen=True)
class Straggler:
    """The rank with the most table work, compared with the mean rank."""

    rank: int
    seconds: float
    mean_seconds: float
    phase: str  # in which it is furthest above the mean
    phase_seconds: float
    phase_mean_seconds: float
    tables: tuple[TableShare, ...]  # the costliest that have a shard there

    @property
    def excess(self) -> float:
        """Its table work over the mean rank's, minus 1."""
        return self.seconds / self.mean_seconds - 1 if self.mean_seconds else 0.0

    def explanation(self) -> str:
        if self.seconds == 0:
            return "Tables cost nothing in this step."
        text = f"Rank {self.rank} has the most table work: {duration(self.seconds)} a step"
        if self.excess < EVEN:
            return f"{text}, {percent(self.excess)} above the mean; table work is even."
        text += (
            f", {percent(self.excess)} above the mean of {duration(self.mean_seconds)}. It is furthest ahead in "
            f"{words(self.phase)}: {duration(self.phase_seconds)} against {duration(self.phase_mean_seconds)}."
        )
        costliest = ", ".join(f"{table.name} ({duration(table.seconds)})" for table in self.tables)
        return f"{text} Its costliest tables: {costliest}." if costliest else text


def words(name: str) -> str:
    """The name of a phase or kind of memory in words: gradient_all_to_all -> gradient all-to-all."""
    return (
        name.replace("all_to_all", "all-to-all")
        .replace("all_reduce", "all-reduce")
        .replace("all_gather", "all-gather")
        .replace("_", " ")
    )


def straggler(estimate: Estimate) -> Straggler:
    rank = estimate.straggler
    rows = {phase: estimate.seconds_PR[PHASES.index(phase)] for phase in TABLE_PHASES}
    phase = max(rows, key=lambda name: float(rows[name][rank] - rows[name].mean()))
    shares = sorted(_tables_on(estimate, rank), key=lambda table: -table.seconds)
    return Straggler(
        rank=rank,
        seconds=float(estimate.table_seconds_R[rank]),
        mean_seconds=float(estimate.table_seconds_R.mean()),
        phase=phase,
        phase_seconds=float(rows[phase][rank]),
        phase_mean_seconds=float(rows[phase].mean()),
        tables=tuple(shares[:LARGEST_TABLES]),
    )


def _tables_on(estimate: Estimate, rank: int) -> list[TableShare]:
    """The tables with a shard on `rank`, with the seconds of that shard."""
    shares, plan = [], estimate.plan
    for share, placement, costs in zip(estimate.tables, plan.placements, table_costs(plan), strict=True):
        if rank in placement.ranks:
            shares.append(replace(share, seconds=float(costs.seconds[placement.ranks.index(rank)])))
    return shares


def schedule(estimate: Estimate) -> list[tuple[float, float]]:
    """(start of the hidden part, start of the rest) of each phase, in seconds from the start of the step.

    Every phase starts when the slowest rank has ended the one before. The hidden part of the gradient all-reduce lies
    beside the end of the backward pass, that of another phase beside the phase before it; it is below zero where that
    phase belongs to the step before.
    """
    shown_P = estimate.seconds_PR.max(axis=1) - estimate.hidden_P
    ends_P = np.cumsum(shown_P)
    starts_P = ends_P - shown_P
    hidden_P = starts_P - estimate.hidden_P
    reduce = PHASES.index("gradient_all_reduce")
    hidden_P[reduce] = ends_P[PHASES.index("dense_backward")] - estimate.hidden_P[reduce]
    return list(zip(hidden_P.tolist(), starts_P.tolist(), strict=True))


def table_parameters(estimate: Estimate) -> int:
    return sum(table.rows * table.dim for table in estimate.plan.inventory.tables)


def examples_per_second(estimate: Estimate) -> float:
    """Examples a second over all ranks."""
    inventory, topology = estimate.plan.inventory, estimate.plan.topology
    examples = inventory.global_batch_size or inventory.batch_on(topology.ranks) * topology.ranks
    return examples / estimate.step_seconds


def peak_flops(estimate: Estimate) -> float:
    """Published FLOP/s of a rank at the inventory's precision."""
    topology = estimate.plan.topology
    return topology.peak_bf16 if estimate.plan.inventory.precision == "bf16" else topology.peak_fp32


def imbalance(values_R: np.ndarray) -> float:
    """The maximum over the mean."""
    mean = float(values_R.mean())
    return float(values_R.max()) / mean if mean else 1.0


def world(estimate: Estimate) -> str:
    """The size of the topology in words: 1,024 ranks on 128 hosts, in 8 groups."""
    topology, groups = estimate.plan.topology, estimate.plan.inventory.groups
    words = " on ".join(_counted(n, noun) for n, noun in ((topology.ranks, "rank"), (topology.hosts, "host")))
    return f"{words}, in {groups:,} groups" if groups > 1 else words


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def device_word(estimate: Estimate) -> str:
    return "GPU" if estimate.plan.topology.device == "cuda" else "rank"


def verdict(estimate: Estimate) -> str:
    """One sentence that says whether the plan fits, and how full the fullest rank is."""
    total_R, capacity = estimate.total_memory_R, estimate.plan.topology.hbm_bytes
    rank = int(total_R.argmax())
    fullest = f"rank {rank} takes {size(total_R[rank])} of {size(capacity)} ({percent(total_R[rank] / capacity)})"
    if estimate.fits:
        return f"Fits: the fullest, {fullest}."
    host_capacity = estimate.plan.topology.host_bytes
    over, host_over = int((total_R > capacity).sum()), int((estimate.host_R > host_capacity).sum())
    faults = []
    if over:
        faults.append(f"memory runs out on {over:,} of {len(total_R):,} ranks; {fullest}")
    if host_over:
        most = int(estimate.host_R.argmax())
        taken = f"{size(estimate.host_R[most])} of {size(host_capacity)}"
        faults.append(f"host memory runs out on {host_over:,} of {len(total_R):,} ranks; rank {most} takes {taken}")
    return f"Does not fit: {'; '.join(faults) or fullest}."


def headline(estimate: Estimate) -> list[tuple[str, str, str]]:
    """(name, value, note) of each headline figure, in reading order."""
    topology, inventory = estimate.plan.topology, estimate.plan.inventory
    device = device_word(estimate)
    rank_batch = inventory.batch_on(topology.ranks)
    tables, dense = table_parameters(estimate), dense_work(inventory, rank_batch).parameters
    amount = _counted(len(inventory.tables), "table")
    figures = [
        ("Parameters", count(tables + dense), f"{amount}; {count(dense)} in the dense part"),
        ("Step", duration(estimate.step_seconds), f"{rank_batch:,} examples a rank"),
        ("Examples", f"{count(examples_per_second(estimate))}/s", "over all ranks"),
    ]
    if estimate.tokens:
        rate = count(estimate.tokens / estimate.step_seconds)
        figures.append(("Tokens", f"{rate}/s/{device}", f"{count(estimate.tokens)} a rank and step"))
    if estimate.flops:
        speed = peak_flops(estimate)
        inventory = estimate.plan.inventory
        # The note names the efficiency, because the MFU follows from this assumption.
        assumed = f"dense_efficiency={inventory.dense_efficiency:g}"
        work = f"of {flops(speed)}/s ({inventory.precision}); {assumed}"
        figures.append(("MFU", percent(estimate.flops / estimate.step_seconds / speed), work))
    bound = estimate.plan.bound_seconds
    figures.append(
        (
            "Gap to the bound",
            percent(estimate.gap),
            f"table work {duration(estimate.cost)}, bound {duration(bound)}",
        )
    )
    return figures
