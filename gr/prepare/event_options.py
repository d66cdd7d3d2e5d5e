"""The options of `gr prepare events`, and the checks of them that need no log."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from gr.data.columns import PER_SECOND
from gr.errors import DataError
from gr.prepare.event_log import TimeUnit, column_names
from gr.schema import HISTORY_COLUMNS, NAMES_OF_TORCH, FileName


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class EventOptions:
    """The columns of a log, and what to make of it. Names are those of the source.

    actions: one column whose values are actions (click, buy), or several that are 0 or 1. label: 0 or 1, makes rows for
    a click model. since, until: dates, the latter exclusive. test_from: events from this date on are tested on;
    test_users: this share of users is; each makes train/ and test/.
    vocabulary: a prepared folder whose ids are used; events of other items are left out, or have id 0 with a label.
    memory: GiB of DuckDB.
    """

    user: str
    item: str
    time: str | None = None
    time_unit: TimeUnit | None = None
    rating: str | None = None
    actions: tuple[str, ...] = ()
    values: tuple[str, ...] = ()
    features: tuple[str, ...] = ()
    item_features: Any = None
    user_features: Any = None
    label: str | None = None
    min_user_events: int = 1
    min_item_events: int = 1
    since: str | None = None
    until: str | None = None
    keep_duplicates: bool = False
    on_bad_row: Literal["fail", "skip"] = "fail"
    test_from: str | None = None
    test_users: Annotated[float, Field(gt=0, lt=1)] | None = None
    vocabulary: Path | None = None
    name: str = "events"
    memory: Annotated[float, Field(gt=0, le=1e6)] = 0.5

    @property
    def joins_repeats(self) -> bool:
        """Whether events that are the same in all columns become one. Without times nothing tells which are repeats."""
        return self.time is not None and not self.keep_duplicates

    def columns(self) -> dict[str, str]:
        """Name in the table `log` -> name in the source."""
        single = {"user": self.user, "item": self.item, "time": self.time, "rating": self.rating, "label": self.label}
        many = {"action": self.actions, "value": self.values, "feature": self.features}
        numbered = {f"{kind}_{i}": name for kind, names in many.items() for i, name in enumerate(names)}
        return {name: column for name, column in single.items() if column is not None} | numbered


def other_columns(source: Any, key: str) -> list[str]:
    """The columns of a file of features but that of the ids."""
    return [] if source is None else [name for name in column_names(source, key) if name != key]


def check_names(options: EventOptions, names: list[str]) -> None:
    """Raises DataError where two columns would have one name, or a name can be no file's or no table's."""
    taken = list(HISTORY_COLUMNS)
    if options.label is not None:
        if options.rating is not None or options.actions:
            raise DataError("--rating and --action make histories; with --label name such columns as --value")
        taken, names = [], [options.label, options.user, options.item, *names]
    for name in names:
        if name in taken:
            raise DataError(f"column {name}: the folder has another column of this name; rename it in the source")
        try:
            TypeAdapter(FileName).validate_python(name)
        except ValidationError:
            raise DataError(
                f"column {name!r}: no column of a folder may have this name (a dot first, a slash, a control character "
                "or more than 200 letters); rename it in the source"
            ) from None
        if name not in (options.label, *options.values) and ("." in name or name in NAMES_OF_TORCH):
            raise DataError(
                f"column {name}: no table of a model may have this name (a dot, or a name of torch.nn.ModuleDict); "
                "rename it in the source"
            )
        taken.append(name)


def moment(date: str, unit: str, flag: str) -> int:
    """A date such as 2026-11-28 or 2026-11-28T12:00 (UTC where it names no zone) in the unit of the events' times."""
    try:
        parsed = datetime.fromisoformat(date)
    except ValueError:
        raise DataError(f"{flag} {date}: is no date like 2026-11-28 or 2026-11-28T12:00") from None
    seconds = (parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)).timestamp()
    return round(seconds * PER_SECOND[unit])
