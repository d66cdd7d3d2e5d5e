"""A ranking model for a package: its passes over packed tables, with golden rows. See gr/serving/passes/build.py.

E events, M candidates, F features.
"""

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from gr.config.export import ExportConfig, RowKind
from gr.config.ranking import RankingConfig
from gr.embeddings import table_weights
from gr.models.saved import Saved
from gr.models.sequence_ranking import SequenceRanker
from gr.ops import cpp_extension
from gr.schema import SCHEMA_FILE, DataSchema, vocabulary_file
from gr.serving.gate.cached_keys import rounded_keys
from gr.serving.package.layout import VerbRecord
from gr.serving.passes.build import Built, Pass
from gr.serving.passes.ranking import ranking_form, ranking_passes
from gr.serving.tables.packed import PackedFeatures
from gr.serving.verbs.ranking import CACHE_DTYPES, FORM_FILE, ITEM, ROWS, RankingForm

MICROBATCH = 256
_EVENT = ({1: "events"}, {0: "events"}, {0: "events"}, {0: "events"})  # dynamic dims of an event's inputs


def build(saved: Saved, kinds: Mapping[str, RowKind], config: ExportConfig) -> Built:
    """prefill, score, and append where a cache may outlive a request.

    Raises ServingError for a tower that has no attention against a cache.
    """
    own, model, schema = saved.config, saved.model, saved.schema
    assert isinstance(own, RankingConfig) and isinstance(model, SequenceRanker) and isinstance(schema, DataSchema)
    weights = {name: weight.detach() for name, weight in table_weights(model).items()}
    columns = own.columns_by_table(schema)
    looked_up: dict[tuple[str, ...], nn.Module] = {}  # passes share what they read

    def tables_of(features: Sequence[str]) -> nn.Module:
        key = tuple(features)
        if key not in looked_up:
            looked_up[key] = PackedFeatures(weights, kinds, columns, features, model.dim)
        return looked_up[key]

    form = ranking_form(own, schema, microbatch=MICROBATCH, cache=config.cache)
    dtype = CACHE_DTYPES[config.cache]
    passes = ranking_passes(model, tables_of, cache_dtype=dtype)
    if form.lifetime == "request":
        passes.pop("append", None)
    types = {name: vocabulary.type for name, vocabulary in saved.vocabularies.items()}
    names = [
        name for name in (vocabulary_file(column) for column in saved.vocabularies) if (saved.folder / name).exists()
    ]
    rows = {name: len(weights[table]) for table, names in columns.items() for name in names}
    return Built(
        passes=_with_golden_rows(passes, form, rows),
        served=None,
        verbs={"rank": VerbRecord(inputs=form.inputs(types), outputs=form.outputs())},
        tables={name: (*weight.shape, kinds[name]) for name, weight in weights.items()},
        form={
            "model": own.model.model_dump(mode="json"),
            "ranking": form.model_dump(mode="json"),
            "operators": cpp_extension.fingerprint(),
        },
        artifacts={
            SCHEMA_FILE: schema.model_dump_json(indent=2).encode(),
            FORM_FILE: form.model_dump_json(indent=2).encode(),
            **{name: (saved.folder / name).read_bytes() for name in names},
        },
        rounding=partial(rounded_keys, model, dtype),
    )


def _with_golden_rows(passes: Mapping[str, nn.Module], form: RankingForm, rows: Mapping[str, int]) -> dict[str, Pass]:
    """Events and candidates at random, over all rows of the tables. rows: of the table of each column."""
    random = torch.Generator().manual_seed(0)

    def below(size: int, count: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.randint(size, (count,), generator=random, dtype=dtype)

    cardinalities = [min(size, rows[name]) for name, size in {ITEM: form.items, **form.event_features}.items()]
    ids_FE, ids_FM = (torch.stack([below(size, ROWS, torch.int32) for size in cardinalities]) for _ in range(2))
    events = (
        ids_FE,
        below(1 << len(form.actions), ROWS),
        torch.arange(ROWS) % (form.max_events + 1),
        below(max(1, form.buckets), ROWS),
    )
    length = torch.tensor([form.tokens(ROWS)])
    own = [below(min(size, rows[name]), 1, torch.int32) for name, size in form.contextual.items()]
    ids_G = torch.cat(own or [below(1, 1, torch.int32)])
    numbers_K = torch.randn(max(1, len(form.contextual_numeric)), generator=random)
    first: tuple[Tensor, ...] = (*events, length, ids_G, numbers_K)
    ages: tuple[Tensor, ...] = ()
    if form.times:
        hours_E1 = 3600 * torch.arange(ROWS + 1)
        first += (torch.stack([hours_E1[:-1], hours_E1[1:]]),)
        ages = (3600 * torch.arange(form.tokens(ROWS)).flip(0),)
    with torch.no_grad():
        kv_NLHW = passes["prefill"](*first)
    cached: tuple[Mapping[int, str], ...] = ({0: "rows"}, {})
    inputs = {
        "prefill": (first, (*_EVENT, {}, {}, {}, *[{1: "events"}] * form.times)),
        "append": ((kv_NLHW, length, *events), (*cached, *_EVENT)),
        "score": (
            (kv_NLHW, length, ids_FM, events[2][:1], events[3][:1], *ages),
            (*cached, {1: "candidates"}, {}, {}, *[{0: "rows"}] * form.times),
        ),
    }
    return {name: Pass(module, *inputs[name]) for name, module in passes.items()}
