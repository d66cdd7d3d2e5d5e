"""`gr prepare`: a public data set, or a generated one, -> a data folder. Imports no torch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import click

_SHARED = [
    click.option("--out", type=click.Path(path_type=Path), required=True, help="Data folder to write."),
    click.option("--force", is_flag=True, help="Replace --out if it exists."),
]
_RAW = [
    click.option("--source", required=True, help="Folder, zip archive or URL of the raw data, as published."),
    click.option("--sha256", help="Wanted digest of the archive; otherwise a download's digest is shown, not checked."),
]
_ON_BAD_ROW = click.option(
    "--on-bad-row", type=click.Choice(["fail", "skip"]), default="fail", show_default=True, help="skip: counted."
)
_NAMES = {
    "movielens-100k": "u.data and u.item, or RecBole's ml-100k.inter and ml-100k.item.",
    "movielens-1m": "ratings.dat and movies.dat; or sequences.parquet (users already in order) and movies.dat.",
    "movielens-20m": "ratings.csv and movies.csv.",
    "amazon-books": "ratings_Books.csv: user,item,rating,seconds. Items and users with at least 5 ratings.",
}
_SYNTHETIC = {
    "synthetic": (
        "Dirichlet process over item categories (arXiv 2402.17152), with its oracle.",
        (20_000, 100, 1_000_000, 128),
    ),
    "synthetic-time": (
        "Next item depends on the gap before it, with oracles with and without time.",
        (1_000, 50, 20_000, 50),
    ),
}


@click.group()
def command() -> None:
    """Turn a public data set into schema.json and Parquet parts.

    Events are ordered by time within each user, ties in file order; schema.json states the rule.
    """


def _with(options: list[Callable], function: Callable) -> Callable:
    for option in reversed(options):
        function = option(function)
    return function


def _raw_command(name: str, files: str) -> click.Command:
    def run(source: str, out: Path, force: bool, sha256: str | None) -> None:
        from gr.prepare.amazon import prepare_amazon_books
        from gr.prepare.movielens import prepare_movielens
        from gr.prepare.source import open_source
        from gr.prepare.write import atomic_folder

        with atomic_folder(out, force) as folder:
            place = open_source(source, sha256=sha256, download_to=out.parent)
            if name == "amazon-books":
                schema = prepare_amazon_books(place, folder)
            else:
                schema = prepare_movielens(name, place, folder)
        click.echo(f"{out}: {schema.users} users, {schema.events} events, {schema.items} candidate items")
        click.echo(f"order: {schema.order}")

    return click.command(name, help=f"Needs {files}")(_with(_RAW + _SHARED, run))


def _synthetic_command(name: str, summary: str, sizes: tuple[int, int, int, int]) -> click.Command:
    def run(out: Path, force: bool, **options: int) -> None:
        from gr.prepare.synthetic import StreamOptions, write_stream
        from gr.prepare.synthetic_time import write_time_stream
        from gr.prepare.write import atomic_folder

        write = write_stream if name == "synthetic" else write_time_stream
        with atomic_folder(out, force) as folder:
            oracle = write(StreamOptions(**options), folder)
        click.echo(f"{out}: train, test and oracle.json")
        for knowledge in [oracle[key] for key in ("with_gap", "without_gap") if key in oracle] or [oracle]:
            best = knowledge["filter_seen=none"]
            click.echo(f"oracle, nothing filtered: hr@10 {best['hr@10']:.4f}  hr@50 {best['hr@50']:.4f}")

    items, categories, records, length = sizes
    number = click.IntRange(min=1)
    own = [
        click.option("--items", type=number, default=items, show_default=True, help="Item ids 1..items."),
        click.option("--categories", type=number, default=categories, show_default=True, help="Groups of items."),
        click.option(
            "--records", type=number, default=records, show_default=True, help="Users; the last tenth is test."
        ),
        click.option("--length", type=number, default=length, show_default=True, help="Events of each record."),
        click.option("--seed", type=click.IntRange(min=0), default=1, show_default=True),
    ]
    return click.command(name, help=summary)(_with(own + _SHARED, run))


def _shared(function: Callable) -> Callable:
    return _with(_SHARED, function)


@click.command("criteo")
@click.option(
    "--source", required=True, help="train.txt, day_N, *.tsv (plain or .gz), *.orc; or a folder or pattern of them."
)
@click.argument("more", nargs=-1)
@_shared
@click.option("--threshold", type=click.IntRange(min=1), help="Occurrences from which a value gets an id. Default: 1.")
@click.option(
    "--transform",
    type=click.Choice(["log1p_clip", "torchrec_minshift"]),
    help="Of the counts x: log(max(x, 0) + 1), or log(x - least of the file + 2). Default: log1p_clip.",
)
@click.option("--max-rows", type=click.IntRange(min=2), help="Of a table: values beyond share ids. Default: none.")
@click.option("--vocabulary", type=click.Path(path_type=Path), help="Prepared folder whose ids and transform to use.")
@_ON_BAD_ROW
@click.option(
    "--rows-per-part", type=click.IntRange(min=1), default=1 << 20, show_default=True, help="Of a Parquet file."
)
@click.option("--restart", is_flag=True, help="Begin again instead of continuing an interrupted run.")
def criteo(source: str, more: tuple[str, ...], out: Path, force: bool, restart: bool, **options: Any) -> None:
    """Criteo's click logs (Kaggle, Terabyte): label, 13 counts, 26 categories.

    More files may follow, as a shell writes day_*.gz. The same command again continues an interrupted run. Id 0 is a
    missing, rare or unseen category; a missing count is a count of 0.
    """
    from gr.prepare.criteo import CriteoOptions, prepare_criteo
    from gr.prepare.criteo_rows import find_sources

    schema = prepare_criteo(find_sources([source, *more]), out, CriteoOptions(**options), force=force, restart=restart)
    ids = sum(column.cardinality for column in schema.sparse)
    click.echo(f"{out}: {schema.rows} rows of {len(schema.files)} files, {ids} ids in {len(schema.sparse)} columns")
    click.echo(f"transform: {schema.transform.name}, version {schema.transform.version}")
    if schema.negative_counts:
        effect = "taken as 0" if schema.transform.name == "log1p_clip" else "kept"
        click.echo(f"negative counts, {effect}: {_listed(schema.negative_counts)}")
    if schema.bad_rows:
        click.echo(f"bad rows left out: {_listed(schema.bad_rows)}")


@click.command("clicks")
@_shared
@click.option("--rows", type=int, default=20_000, show_default=True, help="Rows of train/.")
@click.option("--test-rows", type=int, default=5_000, show_default=True, help="Rows of test/.")
@click.option("--columns", type=int, default=8, show_default=True, help="Columns of ids.")
@click.option("--cardinality", type=int, default=100, show_default=True, help="Rows of each table; no row has id 0.")
@click.option("--dense", type=int, default=4, show_default=True, help="Dense columns.")
@click.option("--skew", type=float, default=1.05, show_default=True, help="Exponent of Zipf's law; 0: all ids alike.")
@click.option("--hots", type=int, default=1, show_default=True, help="Ids of a row in each column.")
@click.option("--seed", type=int, default=1, show_default=True)
def clicks(out: Path, force: bool, **options: Any) -> None:
    """Labels of a planted factorization machine over Zipf ids, with its oracle.

    Writes train/, test/ and oracle.json: AUC, NE and log loss of the true probabilities on the labels of test/.
    """
    from gr.prepare.synthetic_clicks import ClickOptions, write_clicks
    from gr.prepare.write import atomic_folder

    wanted = ClickOptions(**options)
    with atomic_folder(out, force) as folder:
        oracle = write_clicks(wanted, folder)
    click.echo(f"{out}: {wanted.rows} rows in train, {wanted.test_rows} in test, oracle.json")
    for name, best in (("oracle", oracle), ("without interactions", oracle["without_interactions"])):
        click.echo(f"{name}: auc {best['auc']:.4f}  ne {best['ne']:.4f}  log_loss {best['log_loss']:.4f}")


@click.command("trace")
@click.option("--source", type=click.Path(path_type=Path), required=True, help="Tabular folder to draw from.")
@_shared
@click.option("--rows", type=int, default=1_000_000, show_default=True, help="Rows to write.")
@click.option("--block", type=int, default=1, show_default=True, help="Rows drawn together, in the source's order.")
@click.option(
    "--profile-rows", type=int, default=1_000_000, show_default=True, help="First rows of the source to read."
)
@click.option("--seed", type=int, default=1, show_default=True)
def trace(source: Path, out: Path, force: bool, **options: int) -> None:
    """Any number of rows with the skew and the missing columns of a tabular folder.

    Ids are drawn column by column, where another row has one. With --block, whole runs of rows are: what occurs
    together stays, and how soon an id comes again.
    """
    from gr.prepare.synthetic_trace import TraceOptions, write_trace
    from gr.prepare.write import atomic_folder

    wanted = TraceOptions(**options)
    with atomic_folder(out, force) as folder:
        schema = write_trace(source, folder, wanted)
    click.echo(f"{out}: {schema.rows} rows in {len(schema.sparse)} columns of ids")


def _hots(context: click.Context, option: click.Parameter, text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError:
        raise click.BadParameter(f"{text!r} is no list of whole numbers, like 3,1,2") from None


@click.command("multi-hot")
@click.option("--source", type=click.Path(path_type=Path), required=True, help="Tabular folder with one id a column.")
@_shared
@click.option(
    "--hots", callback=_hots, help="Ids of a row in each column, like 3,1,2. Default: MLPerf's, for 26 columns."
)
def multi_hot(source: Path, out: Path, force: bool, hots: tuple[int, ...] | None) -> None:
    """Several ids from each id of a tabular folder, as MLPerf's DLRM-v2 data has them.

    The ids are those of the published recipe, bit for bit, for columns of the same sizes. While it runs, their tables
    take 4 bytes an element on the disk of --out.
    """
    from gr.prepare.multi_hot import prepare_multi_hot
    from gr.prepare.multi_hot_tables import MLPERF_HOTS
    from gr.prepare.write import atomic_folder

    with atomic_folder(out, force) as folder:
        schema = prepare_multi_hot(source, folder, hots or MLPERF_HOTS)
    ids = sum(column.hots for column in schema.sparse)
    click.echo(f"{out}: {schema.rows} rows, {ids} ids a row in {len(schema.sparse)} columns")


def _told(out: Path, schema: Any) -> None:
    click.echo(f"{out}: {schema.users} users, {schema.events} events, {schema.items} candidate items")
    click.echo(f"order: {schema.order}")
    click.echo(f"source: {schema.source}")


def _kuairand_command(size: str) -> click.Command:
    def run(source: str, out: Path, force: bool, sha256: str | None, on_bad_row: Literal["fail", "skip"]) -> None:
        from gr.prepare.kuairand import prepare_kuairand
        from gr.prepare.source import open_source
        from gr.prepare.write import atomic_folder

        with atomic_folder(out, force) as folder:
            place = open_source(source, sha256=sha256, download_to=out.parent)
            schema = prepare_kuairand(size, place, folder, on_bad_row)
        _told(out, schema)

    summary = f"Needs the logs and user_features_{size}.csv of KuaiRand-{size.upper()}, unpacked; all events are kept."
    return click.command(f"kuairand-{size}", help=summary)(_with([*_RAW, *_SHARED, _ON_BAD_ROW], run))


@click.command("yambda")
@click.option(
    "--source", type=click.Path(path_type=Path), required=True, help="Folder with flat/ and the mappings, as published."
)
@_shared
@click.option("--size", type=click.Choice(["50m", "500m", "5b"]), default="50m", show_default=True)
@_ON_BAD_ROW
def yambda(source: Path, out: Path, force: bool, size: str, on_bad_row: Literal["fail", "skip"]) -> None:
    """Needs flat/SIZE/multi_event.parquet of Yambda, and its mappings of artists and albums.

    Listens, likes, dislikes and their withdrawals in one history, as actions. Without multi_event.parquet the files of
    single kinds are read.
    """
    from gr.prepare.write import atomic_folder
    from gr.prepare.yambda import prepare_yambda

    with atomic_folder(out, force) as folder:
        schema = prepare_yambda(size, source, folder, on_bad_row)
    _told(out, schema)


@click.command("streaming")
@_shared
@click.option("--users", type=click.IntRange(min=1), default=2_000, show_default=True)
@click.option("--items", type=click.IntRange(min=1), default=10_000, show_default=True, help="Item ids 1..items.")
@click.option("--categories", type=click.IntRange(min=1), default=128, show_default=True, help="Of the items.")
@click.option("--user-categories", type=click.IntRange(min=1), default=5, show_default=True, help="Of a user.")
@click.option("--times", type=click.IntRange(min=1), default=10, show_default=True, help="Days.")
@click.option("--events", type=click.IntRange(min=1), default=20, show_default=True, help="Of a user at one time.")
@click.option("--seed", type=click.IntRange(min=0), default=1, show_default=True)
def streaming(out: Path, force: bool, **options: int) -> None:
    """Rated histories whose tastes drift with time, after the streaming data of DLRM-v3."""
    from gr.prepare.synthetic_ratings import RatingOptions, write_ratings
    from gr.prepare.write import atomic_folder

    wanted = RatingOptions(**options)
    with atomic_folder(out, force) as folder:
        schema = write_ratings(wanted, folder)
    click.echo(f"{out}: {schema.users} users, {schema.events} events, {schema.items} items")


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())


command.add_command(clicks)
command.add_command(streaming)
command.add_command(criteo)
command.add_command(multi_hot)
command.add_command(trace)
command.add_command(yambda)
for _size in ("1k", "27k"):
    command.add_command(_kuairand_command(_size))
for _name, _files in _NAMES.items():
    command.add_command(_raw_command(_name, _files))
for _name, (_summary, _sizes) in _SYNTHETIC.items():
    command.add_command(_synthetic_command(_name, _summary, _sizes))
