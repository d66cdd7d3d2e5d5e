"""A retrieval model's part of a package, opened: the items, their vectors, how they are searched. E items, D width."""

from collections.abc import Mapping
from itertools import count
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from gr.data.dataset import read_corpus, read_item_features
from gr.data.vocabulary import Vocabulary
from gr.errors import ServingError
from gr.schema import DataSchema
from gr.serving.index.approximate import load
from gr.serving.index.exact import ExactIndex
from gr.serving.package.layout import Manifest
from gr.serving.package.version import CompiledPass, Unseen
from gr.serving.package.weights import map_tensors
from gr.serving.servable import Servable
from gr.serving.tables.id_rows import IdRows
from gr.serving.verbs.request_ids import warm_up
from gr.serving.verbs.retrieval import Index, RetrievalForm, RetrieveServable

FORM, LISTS = "items/retrieval.json", "items/lists.faiss"


class StoredRetrieval(BaseModel):
    """retrieval.json. probes: lists that are searched for a query; None: the index is exact."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    form: RetrievalForm
    probes: int | None


def shard_file(place: int) -> str:
    """The path of a shard of item vectors in a version."""
    return f"items/vectors-{place:05d}.safetensors"


def open_exact(folder: Path, ids_E: Tensor) -> ExactIndex:
    """The index over a version's shards of item vectors, which are mapped. Raises ServingError, as ExactIndex does."""
    paths = (folder / shard_file(place) for place in count())
    shards = []
    for path in paths:
        if not path.exists():
            break
        shards.append(map_tensors(path)["vectors"])
    return ExactIndex(ids_E, shards)


def open_verbs(
    folder: Path, manifest: Manifest, passes: Mapping[str, CompiledPass], unseen: Unseen
) -> dict[str, Servable]:
    """The verb of a retrieval model. folder: of the version, whose files have been compared with their checksums."""
    schema = DataSchema.load(folder)
    try:
        stored = StoredRetrieval.model_validate_json((folder / FORM).read_text())
    except (OSError, ValidationError) as error:
        raise ServingError(f"{folder / FORM}: cannot be read ({str(error).splitlines()[0]}); export again") from None
    corpus_E, _ = read_corpus(folder, schema)
    exact = open_exact(folder, torch.tensor(corpus_E))
    index: Index = exact if stored.probes is None else load(exact, folder / LISTS, stored.probes)
    by_item = read_item_features(folder, schema)
    features = [name for name in manifest.form["features"] if name != schema.item_feature]
    items = Vocabulary.open(folder, schema, schema.item_feature)
    warm_up([items])
    query = passes["query"]
    id_rows = IdRows.open(folder, manifest)
    feature_rows = [id_rows.rows(name, by_item[name])[0] for name in features]
    verb = RetrieveServable(stored.form, items, feature_rows, index, query, unseen.add, id_rows)
    return {"retrieve": verb}
