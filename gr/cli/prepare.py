"""`gr prepare`: a public data set, or a generated one, -> a data folder. Imports no torch.

One row of _ROWS a command; the part of gr.prepare it runs is imported when it runs or is asked for its options.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import Field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import click

from gr.cli.lazy import StrictGroup, end_as_by_ctrl_c
from gr.cli.out import say
from gr.cli.prepare_events import command as events


def _load(name: str) -> Any:
    """The object "module:name" of gr.prepare."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(f"gr.prepare.{module}"), attribute)


def _option(name: str, text: str | None = None, **more: Any) -> click.Option:
    return click.Option([name], help=text, show_default=more.get("default") is not None, **more)


def _folder(name: str, text: str, **more: Any) -> click.Option:
    return _option(name, text, type=click.Path(path_type=Path), **more)


def _size(field: Field) -> click.Option:
    """Option of a field that gr.prepare.generate.size declares."""
    at_least, at_most = field.metadata["at_least"], field.metadata["at_most"]
    kind = type(field.default) if at_least is None else click.IntRange(at_least, at_most)
    return _option(f"--{field.name.replace('_', '-')}", field.metadata["help"], default=field.default, type=kind)


def _hots(context: click.Context, option: click.Parameter, text: str | None) -> tuple[int, ...] | None:
    try:
        return None if text is None else tuple(int(number) for number in text.split(","))
    except ValueError:
        raise click.BadParameter(f"{text!r} is no list of whole numbers, like 3,1,2") from None


def _histories(schema: Any) -> list[str]:
    counts = f"{schema.users} users, {schema.events} events, {schema.items} candidate items"
    return [counts, f"order: {schema.order}"]


def _sourced_histories(schema: Any) -> list[str]:
    return [*_histories(schema), f"source: {schema.source}"]


def _stream(oracle: Any) -> list[str]:
    scorers = [oracle[key] for key in ("with_gap", "without_gap") if key in oracle] or [oracle]
    best = [scorer["filter_seen=none"] for scorer in scorers]
    lines = [f"oracle, nothing filtered: hr@10 {each['hr@10']:.4f}  hr@50 {each['hr@50']:.4f}" for each in best]
    return ["train, test and oracle.json", *lines]


def _clicks(oracle: Any) -> list[str]:
    sizes, scores = oracle["options"], (("oracle", oracle), ("without interactions", oracle["without_interactions"]))
    lines = [f"{n}: auc {s['auc']:.4f}  ne {s['ne']:.4f}  log_loss {s['log_loss']:.4f}" for n, s in scores]
    return [f"{sizes['rows']} rows in train, {sizes['test_rows']} in test, oracle.json", *lines]


def _multi_hot(schema: Any) -> list[str]:
    ids = sum(column.hots for column in schema.sparse)
    return [f"{schema.rows} rows, {ids} ids a row in {len(schema.sparse)} columns"]


_OUT = [
    _folder("--out", "Data folder to write.", required=True),
    _option("--force", "Replace --out if it exists.", is_flag=True),
]
_RAW = [
    _option(
        "--source",
        "Folder, zip archive, file (plain, .gz, .bz2, .zst) or URL of the raw data, as published.",
        required=True,
    ),
    _option("--sha256", "Expected digest of the archive; otherwise a download's digest is shown, not checked."),
    *_OUT,
]
_ON_BAD_ROW = _option("--on-bad-row", "skip: counted.", type=click.Choice(["fail", "skip"]), default="fail")
_LOGS = [*_RAW, _ON_BAD_ROW]
_TABULAR = _folder("--source", "Tabular folder to draw from.", required=True)
_ONE_ID = _folder("--source", "Tabular folder with one id a column.", required=True)
_HOTS = _option("--hots", "Ids of a row in each column, like 3,1,2. Default: MLPerf's, for 26 columns.", callback=_hots)
_YAMBDA = [
    _folder("--source", "Folder with flat/ and the mappings, as published.", required=True),
    *_OUT,
    _option("--size", type=click.Choice(["50m", "500m", "5b"]), default="50m"),
    _ON_BAD_ROW,
]
_ROWS_OF_CRITEO = "train.txt, day_N, *.tsv (plain, .gz, .bz2, .zst), *.orc; or a folder or pattern of them."
_TRANSFORM = "Formula for counts x: log(max(x, 0) + 1), or log(x - smallest of the file + 2). Default: log1p_clip."
_CRITEO = [
    _option("--source", _ROWS_OF_CRITEO, required=True, multiple=True),
    click.Argument(["more"], nargs=-1),
    *_OUT,
    _option("--threshold", "Occurrences from which a value gets an id. Default: 1.", type=click.IntRange(1)),
    _option("--transform", _TRANSFORM, type=click.Choice(["log1p_clip", "torchrec_minshift"])),
    _option("--max-rows", "Rows of a table at most: values beyond share ids. Default: none.", type=click.IntRange(2)),
    _folder("--vocabulary", "Prepared folder whose ids and transform to use."),
    _ON_BAD_ROW,
    _option("--rows-per-part", "Rows of a Parquet file at most.", type=click.IntRange(1), default=1 << 20),
    _option("--restart", "Begin again instead of continuing an interrupted run.", is_flag=True),
]


class _Row(NamedTuple):
    """run(folder=, **fixed, **options) writes an empty folder and returns its schema or oracle; report makes the lines
    to print of that. sizes: the options class of a generator, whose fields are options too.
    """

    help: str
    run: str
    report: Callable[[Any], list[str]]
    options: list[click.Option] = _OUT
    fixed: Mapping[str, str] = MappingProxyType({})
    sizes: str | None = None


_MOVIELENS, _KUAIRAND = "movielens:prepare_movielens", "kuairand:prepare_kuairand"
_FILES_100K = "Needs u.data and u.item, or RecBole's ml-100k.inter and ml-100k.item."
_FILES_1M = "Needs ratings.dat and movies.dat; or sequences.parquet (users already in order) and movies.dat."
_FILES_BOOKS = "Needs ratings_Books.csv: user,item,rating,seconds. Items and users with at least 5 ratings."
_FILES_KUAIRAND = "Needs the logs and user_features_{}.csv of KuaiRand-{}, unpacked; all events are kept."
_YAMBDA_HELP = """Needs flat/SIZE/multi_event.parquet of Yambda, and its mappings of artists and albums.\n
Listens, likes, dislikes and their withdrawals in one history, as actions. Without multi_event.parquet the files of
single kinds are read."""
_CRITEO_HELP = """Criteo's click logs (Kaggle, Terabyte): label, 13 counts, 26 categories.\n
More files may follow, as a shell writes day_*.gz. The same command again continues an interrupted run. Id 0 is a
missing, rare or unseen category; a missing count is a count of 0."""
_CLICKS_HELP = """Labels of a planted factorization machine over Zipf ids, with its oracle.\n
Writes train/, test/ and oracle.json: AUC, NE and log loss of the true probabilities on the labels of test/."""
_TRACE_HELP = """Any number of rows with the skew and the missing columns of a tabular folder.\n
Ids are drawn column by column, where another row has one. With --block, whole runs of rows are: what occurs together
stays, and how soon an id comes again."""
_MULTI_HOT_HELP = """Several ids from each id of a tabular folder, as MLPerf's DLRM-v2 data has them.\n
The ids are those of the published recipe, bit for bit, for columns of the same sizes. While it runs, their tables take
4 bytes an element on the disk of --out."""
_SYNTHETIC_HELP = "Dirichlet process over item categories (arXiv 2402.17152), with its oracle."
_TIME_HELP = "Next item depends on the gap before it, with oracles with and without time."
_STREAMING_HELP = "Rated histories whose tastes drift with time, after the streaming data of DLRM-v3."

_TEXT_HELP = """Documents of text, as ids of a tokenizer.\n
Needs .txt (a document a line), or .jsonl or .parquet with the field text; where they have a field prompt too, it goes
before the text and is not predicted. tokenizer.json is kept in --out."""
_TEXT = [
    _option(
        "--source", "Files (.txt, .jsonl, .parquet).", type=click.Path(path_type=Path), required=True, multiple=True
    ),
    _folder("--tokenizer", "tokenizer.json of Hugging Face's tokenizers.", required=True),
    _option("--bos", "Token that begins each document, like <s>. Default: none."),
    _option("--eos", "Token that ends each document, like </s>. Default: none."),
    *_OUT,
]

_ROWS = {
    "movielens-100k": _Row(_FILES_100K, _MOVIELENS, _histories, _RAW, {"name": "movielens-100k"}),
    "movielens-1m": _Row(_FILES_1M, _MOVIELENS, _histories, _RAW, {"name": "movielens-1m"}),
    "movielens-20m": _Row("Needs ratings.csv and movies.csv.", _MOVIELENS, _histories, _RAW, {"name": "movielens-20m"}),
    "amazon-books": _Row(_FILES_BOOKS, "amazon:prepare_amazon_books", _histories, _RAW),
    "kuairand-1k": _Row(_FILES_KUAIRAND.format("1k", "1K"), _KUAIRAND, _sourced_histories, _LOGS, {"size": "1k"}),
    "kuairand-27k": _Row(_FILES_KUAIRAND.format("27k", "27K"), _KUAIRAND, _sourced_histories, _LOGS, {"size": "27k"}),
    "yambda": _Row(_YAMBDA_HELP, "yambda:prepare_yambda", _sourced_histories, _YAMBDA),
    "synthetic": _Row(_SYNTHETIC_HELP, "synthetic:write_stream", _stream, sizes="synthetic:StreamOptions"),
    "synthetic-time": _Row(_TIME_HELP, "synthetic_time:write_time_stream", _stream, sizes="synthetic_time:TimeOptions"),
    "streaming": _Row(
        _STREAMING_HELP,
        "synthetic_ratings:write_ratings",
        lambda schema: [f"{schema.users} users, {schema.events} events, {schema.items} items"],
        sizes="synthetic_ratings:RatingOptions",
    ),
    "clicks": _Row(_CLICKS_HELP, "synthetic_clicks:write_clicks", _clicks, sizes="synthetic_clicks:ClickOptions"),
    "trace": _Row(
        _TRACE_HELP,
        "synthetic_trace:write_trace",
        lambda schema: [f"{schema.rows} rows in {len(schema.sparse)} columns of ids"],
        [_TABULAR, *_OUT],
        sizes="synthetic_trace:TraceOptions",
    ),
    "text": _Row(_TEXT_HELP, "text:prepare_text", lambda schema: [schema.summary()], _TEXT),
    "multi-hot": _Row(_MULTI_HOT_HELP, "multi_hot:prepare_multi_hot", _multi_hot, [_ONE_ID, *_OUT, _HOTS]),
}


class _Command(click.Command):
    """The command of a row."""

    def __init__(self, name: str, row: _Row) -> None:
        super().__init__(name, help=row.help, params=[*row.options], callback=self._run)
        self._row = row

    def get_params(self, context: click.Context) -> list[click.Parameter]:
        if self._row.sizes:
            self.params = [*self._row.options, *map(_size, fields(_load(self._row.sizes)))]
        return super().get_params(context)

    def _run(self, out: Path, force: bool, **values: Any) -> None:
        if self._row.sizes:
            options_class = _load(self._row.sizes)
            sizes = {field.name: values.pop(field.name) for field in fields(options_class)}
            values["options"] = options_class(**sizes)
        with _load("write:atomic_folder")(out, force) as folder:
            if "sha256" in values:
                place, sha256 = values["source"], values.pop("sha256")
                values["source"] = _load("source:open_source")(place, sha256=sha256, download_to=out.parent)
            schema = _load(self._row.run)(folder=folder, **self._row.fixed, **values)
        first, *more = self._row.report(schema)
        say(f"{out}: {first}", *more)


def _criteo(
    source: tuple[str, ...], more: tuple[str, ...], out: Path, force: bool, restart: bool, **values: Any
) -> None:
    """No row of the table: prepare_criteo keeps a folder of its own, to continue an interrupted run."""
    files, options = _load("criteo_rows:find_sources")([*source, *more]), _load("criteo:CriteoOptions")(**values)
    schema = _load("criteo:prepare_criteo")(files, out, options, force=force, restart=restart)
    ids = sum(column.cardinality for column in schema.sparse)
    say(f"{out}: {schema.rows} rows of {len(schema.files)} files, {ids} ids in {len(schema.sparse)} columns")
    say(f"transform: {schema.transform.name}, version {schema.transform.version}")
    effect = "taken as 0" if schema.transform.name == "log1p_clip" else "kept"
    counted = {f"negative counts, {effect}": schema.negative_counts, "bad rows left out": schema.bad_rows}
    for title, counts in counted.items():
        if counts:
            say(f"{title}: {', '.join(f'{name} {count}' for name, count in counts.items())}")


_GROUP_HELP = """Turn your own log (events), or a public data set, into schema.json and Parquet parts.\n
Events are ordered by time within each user, ties in file order; schema.json states the rule."""
_CRITEO_COMMAND = click.Command("criteo", params=_CRITEO, callback=_criteo, help=_CRITEO_HELP)


command = StrictGroup(
    "prepare",
    [*(_Command(name, row) for name, row in _ROWS.items()), _CRITEO_COMMAND, events],
    help=_GROUP_HELP,
    callback=end_as_by_ctrl_c,
)
