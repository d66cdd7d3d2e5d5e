"""Metrics of predicted clicks: NE, log loss, AUC, GAUC, accuracy and calibration, the same at every world size.

There are two accumulators of a task, on the device, in float64; ranks communicate in compute() only:

- RankingMetrics keeps every example, or a window of the newest: all metrics are exact, ties share their rank. It takes
  17 bytes an example (25 with groups); compute() gathers all of them on every rank, at about 250 bytes an example.
- LifetimeMetrics keeps sums and a histogram, 16 MiB however long training runs: AUC comes with the bound of its error.

A model that diverged, or predicts one value, raises an error: such predictions would read as an AUC of 0.5.
B examples of one update on this rank, N examples of weight above 0, G groups.
"""

import math
from collections import deque
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from gr.dist import World
from gr.errors import DataError, TrainingError

Predictions = Literal["logits", "probabilities"]
SCORE_BITS = 20  # the sign, exponent and 11 mantissa bits of a float32 logit: a bin is at most 2^-11 of its logit wide
BINS = 1 << SCORE_BITS


class OneClassError(DataError):
    """All labels are of one class, so there is nothing to tell apart.

    metrics: as far as they exist; NE, AUC and calibration are None.
    """

    def __init__(self, message: str, metrics: dict[str, float]) -> None:
        super().__init__(message)
        self.metrics: dict[str, float | None] = {"ne": None, "auc": None, "calibration": None, **metrics}


class _Examples(NamedTuple):
    """Checked examples. Rows of weight 0 have logit 0 and label 0."""

    logits_B: Tensor  # float64
    labels_B: Tensor  # uint8
    weights_B: Tensor  # float64
    groups_B: Tensor  # int64; empty where there are no groups


class _Intake:
    """Checks examples on their device without waiting for it; raise_faults() raises for what was wrong."""

    def __init__(self, task: str, world: World, predictions: Predictions) -> None:
        self.task, self.world, self.predictions = task, world, predictions
        # The rows of weight other than 0, and how many of them have a wrong prediction, a wrong label, a wrong weight.
        self.counts_4 = torch.zeros(4, dtype=torch.int64, device=world.device)

    def examples(
        self, predictions_B: Tensor, labels_B: Tensor, weights_B: Tensor | None, groups_B: Tensor | None
    ) -> _Examples:
        columns = (predictions_B, labels_B, weights_B, groups_B)
        shapes = [str(tuple(column.shape)) for column in columns if column is not None]
        if predictions_B.ndim != 1 or len(set(shapes)) > 1:
            rule = "predictions, labels, weights and groups must be vectors of one length"
            raise ValueError(f"task {self.task!r}: {rule}, found shapes {', '.join(shapes)}")
        if groups_B is not None and (groups_B.is_floating_point() or groups_B.is_complex()):
            raise ValueError(f"task {self.task!r}: groups must be integers, are {groups_B.dtype}")
        device = self.world.device
        predictions = predictions_B.detach().to(device, torch.float64)
        labels = labels_B.detach().to(device)
        weights = torch.ones_like(predictions) if weights_B is None else weights_B.detach().to(device, torch.float64)
        groups = predictions.new_empty(0) if groups_B is None else groups_B.detach().to(device)
        # The logit of a probability outside of (0, 1) is not finite.
        logits = predictions if self.predictions == "logits" else predictions.logit()
        counted = weights != 0
        faults = (counted, ~logits.isfinite(), (labels != 0) & (labels != 1), ~(weights.isfinite() & (weights >= 0)))
        self.counts_4 += torch.stack([(counted & fault).sum() for fault in faults])
        positive = (counted & (labels == 1)).to(torch.uint8)
        return _Examples(torch.where(counted, logits, 0.0), positive, weights, groups.to(torch.int64))

    def raise_faults(self) -> None:
        """Raises for the faults of all examples since the start, the same error on every rank. Collective."""
        examples, predictions, labels, weights = map(int, self.world.all_reduce_sum(self.counts_4.tolist()))
        allowed = "finite logits" if self.predictions == "logits" else "strictly between 0 and 1"
        correct = "correct the data, or give weight 0 to examples without a label"
        mend = "the model has diverged; lower its learning rate, or look for inputs that are not finite"
        for error, count, fault in (
            (DataError, weights, "weights are negative or not finite; correct the data"),
            (DataError, labels, f"labels are neither 0 nor 1; {correct}"),
            (TrainingError, predictions, f"predictions are not {allowed}: {mend}"),
        ):
            if count:
                raise error(f"task {self.task!r}: {count} of {examples} {fault}")


class RankingMetrics:
    """Exact metrics of one task over all examples since the start, or over the newest `window` of them."""

    def __init__(
        self, task: str, world: World, *, predictions: Predictions = "logits", window: int | None = None,
        grouped: bool = False
    ) -> None:  # fmt: skip
        """window: keep the fewest newest updates that hold so many examples over all ranks, of any weight.

        The window consists of whole updates, so it does not depend on which rank had which example of a batch.
        grouped: update() takes groups, and compute() returns GAUC.
        """
        if window is not None and window < 1:
            raise ValueError(f"window must be at least 1 example, is {window}")
        self._intake = _Intake(task, world, predictions)
        self._window, self._grouped = window, grouped
        self._parts: deque[_Examples] = deque()
        self._examples = self._updates = 0

    def update(
        self, predictions_B: Tensor, labels_B: Tensor, weights_B: Tensor | None = None, groups_B: Tensor | None = None
    ) -> None:
        """labels_B: 0 or 1. weights_B: all 1 where None; weight 0 excludes an example. groups_B: int ids, if `grouped`.

        A rank may have no example. With a window all ranks update equally often. Raises ValueError for shapes or groups
        that do not fit; compute() checks the values.
        """
        if (groups_B is not None) != self._grouped:
            raise ValueError(f"task {self._intake.task!r}: groups must be given if, and only if, grouped=True")
        self._parts.append(self._intake.examples(predictions_B, labels_B, weights_B, groups_B))
        self._examples += len(predictions_B)
        self._updates += 1
        # An update leaves once the newer ones of this rank alone fill the window.
        while self._window is not None and self._examples - len(self._parts[0].logits_B) >= self._window:
            self._examples -= len(self._parts.popleft().logits_B)

    def compute(self) -> dict[str, float]:
        """The metrics, on every rank. Collective; may be called between updates.

        ne: log_loss (nats) over the entropy of base_rate, so 1 for predictions of the base rate (He et al., ADKDD 2014,
        section 2). auc. gauc: the mean AUC of groups, weighted by their impressions (Zhou et al., KDD 2018,
        section on metrics), over the gauc_groups with both classes; absent where all groups are among the
        gauc_groups_skipped, which have one class. accuracy: at probability 0.5. base_rate: mean label.
        calibration: mean prediction / mean label. examples: the number of weight above 0.

        Raises OneClassError for labels of one class; DataError for no example, labels not 0 and 1, bad weights;
        TrainingError for predictions that are not finite or all the same; ValueError for a window where ranks updated
        unequally often.
        """
        self._intake.raise_faults()
        self._trim()
        world, device = self._intake.world, self._intake.world.device
        empty = torch.zeros(0, dtype=torch.float64, device=device)
        parts = [_Examples(empty, empty.to(torch.uint8), empty, empty.to(torch.int64)), *self._parts]
        columns = (torch.cat(column) for column in zip(*parts, strict=True))
        every = _Examples(*(torch.cat(world.all_gather_variable(column)) for column in columns))
        counted_N = every.weights_B > 0
        logits_N, labels_N, weights_N = (column[counted_N] for column in every[:3])
        lowest, highest = map(float, logits_N.aminmax()) if len(logits_N) else (math.inf, -math.inf)
        means = _means(_sums(logits_N, labels_N, weights_N), lowest, highest, self._intake.task)
        means["auc"] = auc_by_group(logits_N, labels_N, weights_N)[0].item()
        if self._grouped:
            means |= self._gauc(*auc_by_group(logits_N, labels_N, weights_N, every.groups_B[counted_N]))
        return means

    def _gauc(self, auc_G: Tensor, weight_G: Tensor) -> dict[str, float]:
        scored_G = ~auc_G.isnan()
        groups = int(scored_G.sum())
        if not groups:
            return {"gauc_groups": 0, "gauc_groups_skipped": len(auc_G)}
        mean = (auc_G[scored_G] * weight_G[scored_G]).sum() / weight_G[scored_G].sum()
        return {"gauc": mean.item(), "gauc_groups": groups, "gauc_groups_skipped": len(auc_G) - groups}

    def _trim(self) -> None:
        """Drops the updates that are older than the window over all ranks."""
        if self._window is None:
            return
        world = self._intake.world
        updates = [rank[0] for rank in world.all_gather_ints([self._updates])]
        if len(set(updates)) > 1:
            raise ValueError(f"ranks updated {updates} times: with a window all ranks must update equally often")
        newest_first = [len(part.logits_B) for part in reversed(self._parts)]
        lengths_R = world.all_gather_variable(torch.tensor(newest_first, dtype=torch.int64, device=world.device))
        examples = torch.zeros(max(map(len, lengths_R)), dtype=torch.int64, device=world.device)
        for lengths in lengths_R:
            examples[: len(lengths)] += lengths
        updates_short = int((examples.cumsum(0) < self._window).sum())
        while len(self._parts) > updates_short + 1:
            self._examples -= len(self._parts.popleft().logits_B)


class LifetimeMetrics:
    """Metrics of one task over all examples since the start, in memory that does not grow. No GAUC."""

    def __init__(self, task: str, world: World, *, predictions: Predictions = "logits") -> None:
        self._intake = _Intake(task, world, predictions)
        self._sums_6 = torch.zeros(6, dtype=torch.float64, device=world.device)
        self._histogram = torch.zeros(2 * BINS, dtype=torch.float64, device=world.device)  # label 0, then label 1
        self._range_2 = torch.tensor([math.inf, -math.inf], dtype=torch.float64, device=world.device)

    def update(self, predictions_B: Tensor, labels_B: Tensor, weights_B: Tensor | None = None) -> None:
        """Adds examples, as RankingMetrics.update does; ranks need not update equally often."""
        part = self._intake.examples(predictions_B, labels_B, weights_B, None)
        if not len(predictions_B):
            return
        self._sums_6 += _sums(part.logits_B, part.labels_B, part.weights_B)
        self._histogram.index_add_(0, part.labels_B.long() * BINS + _bins(part.logits_B), part.weights_B)
        counted_B = part.weights_B > 0
        low = torch.where(counted_B, part.logits_B, math.inf).amin()
        high = torch.where(counted_B, part.logits_B, -math.inf).amax()
        self._range_2 = torch.stack([torch.minimum(self._range_2[0], low), torch.maximum(self._range_2[1], high)])

    def compute(self) -> dict[str, float]:
        """The metrics of RankingMetrics.compute, on every rank, but for AUC. Collective; may be called between updates.

        auc counts pairs that share a bin as ties. The exact AUC lies within auc_error of it, which is half the share of
        positive-negative pairs in one bin, counted and not estimated.
        """
        world = self._intake.world
        self._intake.raise_faults()
        totals = torch.cat([self._sums_6, self._histogram])
        if world.size > 1:
            dist.all_reduce(totals)
        ranges_R2 = torch.stack(world.all_gather_variable(self._range_2))
        means = _means(totals[:6], float(ranges_R2[:, 0].min()), float(ranges_R2[:, 1].max()), self._intake.task)
        negative, positive = totals[6:].view(2, BINS)
        pairs = positive.sum() * negative.sum()
        ties = (positive * negative).sum() / 2
        wins = (positive * (negative.cumsum(0) - negative)).sum()
        return means | {"auc": ((wins + ties) / pairs).item(), "auc_error": (ties / pairs).item()}


def normalised_entropy(log_loss: float, base_rate: float) -> float:
    """log_loss in nats over the entropy of a coin of base_rate, which must lie strictly between 0 and 1."""
    return log_loss / -(base_rate * math.log(base_rate) + (1 - base_rate) * math.log1p(-base_rate))


def auc_by_group(
    scores_N: Tensor, labels_N: Tensor, weights_N: Tensor, groups_N: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The AUC [G] and the weight [G] of each group, by ascending group id; one group of all where groups_N is None.

    AUC is the weighted share of pairs of a positive and a negative where the positive scores higher; ties count half.
    It is NaN for a group of one class. N must be at least 1.
    """
    order = scores_N.argsort(stable=True)
    if groups_N is None:
        groups_N = torch.zeros_like(labels_N, dtype=torch.int64)
    else:
        order = order[groups_N[order].argsort(stable=True)]
    scores, groups, labels, weights = scores_N[order], groups_N[order], labels_N[order] == 1, weights_N[order].double()
    new_group = groups[1:] != groups[:-1]
    group_N = F.pad(new_group.long().cumsum(0), (1, 0))
    run_N = F.pad((new_group | (scores[1:] != scores[:-1])).long().cumsum(0), (1, 0))  # runs of one group and score

    def totals(values_N: Tensor, index_N: Tensor) -> Tensor:
        return values_N.new_zeros(int(index_N[-1]) + 1).index_add_(0, index_N, values_N)

    positive_N, negative_N = weights * labels, weights * ~labels
    positive_G, negative_G = totals(positive_N, group_N), totals(negative_N, group_N)
    negative_R = totals(negative_N, run_N)
    # A positive wins over the negatives of the runs below its own and half of its own run's, less earlier groups'.
    below_R = negative_R.cumsum(0) - negative_R / 2
    earlier_G = negative_G.cumsum(0) - negative_G
    wins_N = below_R[run_N] - earlier_G[group_N]
    pairs_G = positive_G * negative_G
    auc_G = torch.where(pairs_G > 0, totals(positive_N * wins_N, group_N) / pairs_G, torch.nan)
    return auc_G, positive_G + negative_G


def _sums(logits_B: Tensor, labels_B: Tensor, weights_B: Tensor) -> Tensor:
    """[6]: the weights of positives and negatives, the weighted predictions, log losses and hits, the examples."""
    labels = labels_B.double()
    loss_B = F.binary_cross_entropy_with_logits(logits_B, labels, reduction="none")
    hit_B = (logits_B >= 0) == (labels_B == 1)
    terms = (labels, 1 - labels, logits_B.sigmoid(), loss_B, hit_B)
    return torch.stack([*((weights_B * term).sum() for term in terms), (weights_B > 0).sum().double()])


def _means(sums_6: Tensor, lowest: float, highest: float, task: str) -> dict[str, float]:
    """Every metric but AUC, from _sums and the range of the logits."""
    positive, negative, prediction, loss, hits, examples = sums_6.tolist()
    if not examples:
        raise DataError(f"task {task!r}: no example of weight above 0, so there is nothing to measure")
    weight = positive + negative
    if not (positive and negative):
        problem = f"all {examples:.0f} labels are {int(positive > 0)}, so there is no NE, AUC or calibration"
        known = {"log_loss": loss / weight, "accuracy": hits / weight, "base_rate": positive / weight}
        message = f"task {task!r}: {problem}; measure more examples, or a larger window"
        raise OneClassError(message, {**known, "examples": examples})
    if lowest == highest:
        problem = f"all predictions are the same (logit {lowest:.6g}), so they order nothing"
        remedy = "look for dead units, inputs that are all missing, or a learning rate that is too high"
        raise TrainingError(f"task {task!r}: {problem}; {remedy}")
    base_rate, log_loss = positive / weight, loss / weight
    means = {"ne": normalised_entropy(log_loss, base_rate), "log_loss": log_loss, "accuracy": hits / weight}
    return means | {"base_rate": base_rate, "calibration": prediction / positive, "examples": examples}


def _bins(logits_B: Tensor) -> Tensor:
    """int64 [B] in [0, BINS), monotone in the logit: the leading bits of its float32."""
    bits = (logits_B.float() + 0.0).view(torch.int32)  # + 0.0: -0.0 becomes 0.0
    ascending = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # negative floats count downwards
    return (ascending >> (32 - SCORE_BITS)).long() + BINS // 2
