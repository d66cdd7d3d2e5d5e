"""`gr prepare events`: anyone's interaction log -> a data folder."""

from pathlib import Path
from typing import Any

import click

from gr.cli.lazy import FiniteRange
from gr.cli.out import say

_HELP = """Turn your own log of interactions into a data folder, in bounded memory.\n
--source: Parquet, CSV or TSV (.gz, .zst) with a header line, or JSON lines: files, folders, patterns in quotes. User
and item ids may be text or numbers: vocabularies are kept with the data and with every checkpoint, so that
recommendations come in your ids.\n
With --action or --rating, and features, the folder is one for ranking models too. With --label it is one for click
models: a row for each event."""


def _file(name: str, text: str, **more: Any) -> click.Option:
    return click.Option([name], help=text, type=click.Path(path_type=Path), **more)


def _count(name: str, text: str) -> click.Option:
    return click.Option([name], help=text, type=click.IntRange(1), default=1)


_OPTIONS = [
    click.Option(["--source"], help="File, folder or pattern; more may follow.", required=True),
    click.Argument(["more"], nargs=-1),
    click.Option(["--user"], help="Column of the user's id.", required=True),
    click.Option(["--item"], help="Column of the item's id.", required=True),
    click.Option(["--time"], help="Column of the time: dates, or numbers. Default: events are in the log's order."),
    click.Option(["--time-unit"], help="Unit of a time that is a number.", type=click.Choice(["s", "ms", "us", "ns"])),
    click.Option(["--rating"], help="Column of ratings, a number an event."),
    click.Option(["--action", "actions"], help="Column of actions, or of 0 and 1 (may be repeated).", multiple=True),
    click.Option(["--value", "values"], help="Further column of numbers (may be repeated).", multiple=True),
    click.Option(["--feature", "features"], help="Column of categories of the event (may be repeated).", multiple=True),
    _file("--item-features", "File of items: the item column, and features."),
    _file("--user-features", "File of users: the user column, and features."),
    click.Option(["--label"], help="Column of 0 and 1: write rows for a click model."),
    _count("--min-user-events", "Users with fewer events are left out."),
    _count("--min-item-events", "Items with fewer events are left out."),
    click.Option(["--since"], help="Events from this date on: 2026-11-28 or 2026-11-28T12:00 (UTC)."),
    click.Option(["--until"], help="Events before this date."),
    click.Option(["--keep-duplicates"], help="Keep events that are the same in all columns.", is_flag=True),
    click.Option(["--on-bad-row"], help="skip: counted.", type=click.Choice(["fail", "skip"]), default="fail"),
    click.Option(["--test-from"], help="Write train/ and test/: events from this date on are tested on."),
    click.Option(
        ["--test-users"],
        help="Write train/ and test/: this share of users is tested on.",
        type=FiniteRange(0, 1, True, True),
    ),
    _file("--vocabulary", "Prepared folder whose ids are used; items without one are left out."),
    click.Option(
        ["--memory"], help="GiB of memory for sorting; more goes to disk.", type=FiniteRange(0.1, 1e6), default=0.5
    ),
    click.Option(["--name"], help="Name of the data set, for reports.", default="events"),
    _file("--out", "Data folder to write.", required=True),
    click.Option(["--force"], help="Replace --out if it exists.", is_flag=True),
]


def _prepare(source: str, more: tuple[str, ...], out: Path, force: bool, **values: Any) -> None:
    from gr.prepare.event_options import EventOptions
    from gr.prepare.events import prepare_events
    from gr.prepare.write import atomic_folder

    with atomic_folder(out, force) as folder:
        prepared = prepare_events([source, *more], folder, EventOptions(**values))
    say(*prepared.notes)
    for name, schema in prepared.schemas.items():
        say(f"{out / name}: {schema.summary()}")


command = click.Command("events", params=_OPTIONS, callback=_prepare, help=_HELP)
