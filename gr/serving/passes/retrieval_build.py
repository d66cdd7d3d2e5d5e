"""The package of a retrieval model: the query pass, item vectors in shards of rows, and an inverted file if asked for.

F features of an item, T events, E items, D width, B queries.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gr.config.export import ExportConfig
from gr.config.retrieval import RetrievalConfig
from gr.data.dataset import read_corpus
from gr.embeddings import table_weights
from gr.logging import get_logger
from gr.models.saved_retrieval import SavedRetrieval
from gr.ops import cpp_extension
from gr.schema import ITEMS_FILE, SCHEMA_FILE, vocabulary_file
from gr.serving.index.approximate import build as build_lists
from gr.serving.package.layout import VerbRecord
from gr.serving.package.weights import write_tensors
from gr.serving.passes.build import Built, Pass
from gr.serving.passes.retrieval import QueryPass
from gr.serving.tables.packed import PackedFeatures
from gr.serving.tables.quantize import RowKind
from gr.serving.verbs.retrieval import RetrievalForm, tensors
from gr.serving.verbs.retrieval_package import FORM, LISTS, StoredRetrieval, open_exact, shard_file
from gr.tasks import require_product

ITEM = "item_id"
SHARD_ROWS = 1 << 18  # item vectors that are in memory together
GOLDEN_EVENTS = 7
TUNING_QUERIES = 1024
_HOUR = 3600  # between the events of a history that is made up

log = get_logger(__name__)


def build(saved: SavedRetrieval, kinds: Mapping[str, RowKind], config: ExportConfig) -> Built:
    """The one pass of a retrieval model, `query`, and its index.

    Raises ConfigError for a table that the model does not have; ServingError for a tower that has no pass.
    """
    run, schema = saved.config, saved.schema
    assert isinstance(run, RetrievalConfig)
    require_product(saved.model.similarity, "an index of items")
    weights = {name: weight.detach() for name, weight in table_weights(saved.model).items()}
    features = _features(saved)
    tables = PackedFeatures(weights, kinds, run.columns_by_table(schema), features, saved.model.dim)
    module = QueryPass(saved.model, tables).eval()
    form = RetrievalForm(
        max_length=run.data.max_length,
        item_cardinality=schema.item_cardinality,
        timed=run.model.tower.uses_time,
        filter_seen=run.evaluation.filter_seen,
        unknown=config.unknown,
    )
    inputs, outputs = tensors(saved.vocabularies[ITEM], form)
    corpus_E, counts_E = read_corpus(saved.folder, schema)
    vocabularies = [vocabulary_file(ITEM)] if ITEM in schema.vocabularies else []
    draw = np.random.default_rng(0)
    golden = _history(saved, draw.choice(corpus_E, min(GOLDEN_EVENTS, form.max_length)))
    return Built(
        passes={"query": Pass(module, golden, ({1: "events"}, {0: "events"}))},
        served=None,  # though the index has the vectors of fp32 rows, which lie closer
        verbs={"retrieve": VerbRecord(inputs=inputs, outputs=outputs)},
        tables={name: (*weight.shape, kinds[name]) for name, weight in weights.items()},
        form={
            "model": run.model.model_dump(mode="json"),
            "similarity": {"temperature": run.task.temperature, "l2_norm": run.task.l2_norm},
            "max_length": form.max_length,
            "features": features,
            "operators": cpp_extension.fingerprint(),
        },
        artifacts={
            SCHEMA_FILE: schema.model_dump_json(indent=2).encode(),
            **{name: (saved.folder / name).read_bytes() for name in (ITEMS_FILE, *vocabularies)},
            **_shards(saved, corpus_E),
            **_index(saved, config, form, module, (corpus_E, counts_E)),
        },
    )


def _shards(saved: SavedRetrieval, corpus_E: np.ndarray) -> dict[str, Callable[[Path], None]]:
    """Writers of the item vectors, as the model compares them, SHARD_ROWS at a time."""

    @torch.no_grad()
    def write(ids_E: Tensor, path: Path) -> None:
        vectors_ED = saved.model.similarity.items(saved.model.item_vectors(ids_E).float())
        write_tensors(path, {"vectors": vectors_ED})

    parts = torch.tensor(corpus_E).split(SHARD_ROWS)
    return {shard_file(place): partial(write, ids_E) for place, ids_E in enumerate(parts)}


def _index(
    saved: SavedRetrieval,
    config: ExportConfig,
    form: RetrievalForm,
    query: QueryPass,
    corpus: tuple[np.ndarray, np.ndarray],
) -> dict[str, bytes | Callable[[Path], None]]:
    """The record of how items are searched, and the inverted file if there is one. corpus: ids and counts, [E]."""
    if config.index.kind == "exact":
        return {FORM: StoredRetrieval(form=form, probes=None).model_dump_json(indent=2).encode()}
    probes: list[int] = []

    @torch.no_grad()
    def write_lists(path: Path) -> None:
        exact = open_exact(path.parent.parent, torch.tensor(corpus[0]))
        k = min(config.index.k, len(exact))
        queries_BD = torch.stack([query(*_history(saved, ids_T)) for ids_T in _popular(corpus, form)])
        index, measured = build_lists(exact, queries_BD, recall=config.index.recall, k=k)
        for each in measured:
            log.info(
                "inverted file, %s: %d of %d lists searched, recall %.4f at %d on %d histories made up by popularity, "
                "of others at least %.4f",
                *(each.rows, each.probes, each.lists, each.recall, each.k, each.queries, each.least),
            )
        log.info("inverted file: %d lists are searched", index.probes)
        index.save(path)
        probes.append(index.probes)

    def write_form(path: Path) -> None:
        path.write_text(StoredRetrieval(form=form, probes=probes[0]).model_dump_json(indent=2))

    return {LISTS: write_lists, FORM: write_form}


def _popular(corpus: tuple[np.ndarray, np.ndarray], form: RetrievalForm) -> list[np.ndarray]:
    """Histories of items drawn by their counts: a checkpoint has no histories of users."""
    ids_E, counts_E = corpus
    weights_E = (counts_E + 1) / (counts_E + 1).sum()
    draw = np.random.default_rng(1)
    return [draw.choice(ids_E, draw.integers(1, form.max_length + 1), p=weights_E) for _ in range(TUNING_QUERIES)]


def _features(saved: SavedRetrieval) -> list[str]:
    """The ids of an event in the order in which the pass takes them."""
    return [ITEM, *saved.model.features]


def _history(saved: SavedRetrieval, ids_T: np.ndarray) -> tuple[Tensor, Tensor]:
    """The inputs of the query pass for these items, an hour apart."""
    items_T = torch.from_numpy(ids_T)
    by_item = saved.model.item_features
    ids_by_feature = {name: items_T if name == ITEM else by_item[name][items_T] for name in _features(saved)}
    ids_FT = torch.stack([saved.rows_of(name, ids_T).int() for name, ids_T in ids_by_feature.items()])
    return ids_FT, _HOUR * torch.arange(len(ids_T))
