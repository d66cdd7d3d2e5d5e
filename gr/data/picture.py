"""The picture of a folder of histories: lengths, popularity of items, events over time. Imports matplotlib."""

from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter

from gr.data.check import Check

_BINS = 60


def draw(check: Check, path: Path) -> None:
    """Writes the picture; the suffix of its path chooses the format. check: of a folder of histories."""
    assert check.lengths_N is not None and check.events_E is not None, "a folder of histories"
    panels = 3 if check.days else 2
    figure, axes = plt.subplots(1, panels, figsize=(5.2 * panels, 4.2))
    _lengths(axes[0], check.lengths_N)
    _popularity(axes[1], check.events_E)
    if check.days:
        _over_time(axes[2], check.days)
    figure.suptitle(check.title, fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _lengths(axes: Axes, lengths_N: np.ndarray) -> None:
    length = np.arange(1, len(lengths_N))
    shortest = max(1, int(np.argmax(lengths_N > 0)))
    bins = np.unique(np.geomspace(shortest, max(len(lengths_N), shortest + 1), _BINS).astype(int))
    axes.hist(length, bins=bins.tolist(), weights=lengths_N[1:])
    axes.set(title="History lengths", xlabel="events of a user", ylabel="users", xscale="log")
    axes.grid(alpha=0.3)


def _popularity(axes: Axes, events_E: np.ndarray) -> None:
    seen = np.sort(events_E[events_E > 0])[::-1]
    # A line of as many points as items is large and looks the same.
    place = np.unique(np.geomspace(1, max(len(seen), 1), 2000).astype(int))
    axes.plot(place, seen[place - 1])
    axes.set(title="Popularity of items", xlabel="place of the item", ylabel="events", xscale="log", yscale="log")
    axes.grid(which="both", alpha=0.3)


def _over_time(axes: Axes, days: dict[int, int]) -> None:
    day = np.array(sorted(days))
    edges = np.linspace(day[0], day[-1] + 1, min(_BINS, int(day[-1] + 1 - day[0])) + 1)
    events, edges = np.histogram(day, edges, weights=[days[int(each)] for each in day])
    axes.stairs(events, edges, fill=True)  # matplotlib counts dates in days since 1970
    axes.set(title="Events over time", xlabel="date (UTC)", ylabel="events")
    locator = AutoDateLocator(maxticks=6)
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(ConciseDateFormatter(locator))
    axes.grid(alpha=0.3)
