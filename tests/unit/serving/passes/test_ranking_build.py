"""A ranking checkpoint as a package has it: answers in the log's own ids are those of gr.load(...).score."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

import gr
from gr.config import RunConfig
from gr.config.export import ExportConfig, RowKind
from gr.embeddings import table_weights
from gr.models.saved_ranking import SavedRanking
from gr.serving.gate.dense_layers import dense_layers, put_in_bf16
from gr.serving.passes.build import Built
from gr.serving.passes.ranking_build import build
from gr.serving.verbs.kv_cache import KVCache
from gr.serving.verbs.ranking import FORM_FILE, RankingForm, RankServable
from tests.support.history_folder import histories_by_user
from tests.unit.serving.passes.test_ranking import FORMS, model_of

ITEMS, CATEGORIES = [1, 2, 39], [1, 2, 42]


@pytest.fixture(scope="module")
def saved(absolute_ranking_run: RunConfig) -> SavedRanking:
    loaded = gr.load(absolute_ranking_run.run_dir)
    assert isinstance(loaded, SavedRanking)
    return loaded


def built_of(saved: SavedRanking, kind: RowKind = "fp32", **values: str) -> Built:
    kinds = dict.fromkeys(table_weights(saved.model), kind)
    return build(saved, kinds, ExportConfig.model_validate(values))


def served(saved: SavedRanking) -> RankServable:
    built = built_of(saved)
    form = RankingForm.model_validate_json(built.artifacts[FORM_FILE])
    passes = {name: lambda *inputs, each=each: [each.module(*inputs)] for name, each in built.passes.items()}
    return RankServable(form, passes, saved.vocabularies, version="v1", cache=KVCache(1 << 20))


def test_answers_are_those_of_the_checkpoint(saved: SavedRanking) -> None:
    ranks = served(saved)
    data = Path(saved.config.data.path)  # type: ignore[attr-defined]
    histories = histories_by_user(data)
    for user in list(histories)[:12]:
        row = histories[user]
        history = {
            "item_id": np.array(row["item_ids"], dtype=np.int64),
            "category": np.array(row["category"], dtype=np.int64),
        }
        history |= {name: [bits >> bit & 1 for bits in row["actions"]] for bit, name in enumerate(("like", "share"))}
        history["timestamp"] = np.array(row["timestamps"], dtype=np.int64)
        context = {"country": [row["country"]], "age": [row["age"]]}
        candidates = {"item_id": ITEMS, "category": CATEGORIES}
        (answer,) = ranks.run([ranks.encode({"history": history, "context": context, "candidates": candidates})])
        asked = pa.table({"user_id": [user] * 3, "item_id": ITEMS, "category": CATEGORIES})
        expected = saved.score(asked, data)
        for name, values in expected.items():
            np.testing.assert_allclose(answer[f"score_{name}"], values, atol=5e-6)


def test_what_the_package_says(saved: SavedRanking) -> None:
    built = built_of(saved, cache="int8")
    assert list(built.passes) == ["prefill", "append", "score"]
    for name, each in built.passes.items():  # compiled code has one name for a tensor
        assert len(list(each.module.parameters())) == len(list(each.module.named_parameters(remove_duplicate=False))), (
            name
        )
    form = RankingForm.model_validate_json(built.artifacts[FORM_FILE])
    assert (form.lifetime, form.cache, form.max_events) == ("user", "int8", 15)
    assert built.passes["score"].golden[0].dtype == torch.int8
    assert {spec.name for spec in built.verbs["rank"].outputs} == {"score_like", "score_share", "score_watched"}


def traced(built: Built) -> None:
    """Asserts that torch.export takes every pass, with all that it reads among the pass's own tensors."""
    for each in built.passes.values():
        dims: dict[str, torch.export.Dim] = {}
        shapes = tuple(
            {dim: dims.setdefault(name, torch.export.Dim(name, min=1, max=1 << 24)) for dim, name in named.items()}
            for named in each.dynamic
        )
        with torch.no_grad():
            program = torch.export.export(each.module, each.golden, dynamic_shapes=shapes)
            torch.testing.assert_close(program.module()(*each.golden), each.module(*each.golden))
        # A tensor that is not read is in no compiled code, and so could not be checked for being outside it.
        read = {spec.target for spec in program.graph_signature.input_specs if spec.target}
        used = {node.name for node in program.graph.nodes if node.op == "placeholder" and node.users}
        names = {spec.target for spec in program.graph_signature.input_specs if spec.target and spec.arg.name in used}
        assert names == read == each.module.state_dict().keys()


@pytest.mark.slow
def test_every_pass_is_taken_by_torch_export(saved: SavedRanking) -> None:
    for layer in dense_layers(saved.model).values():
        put_in_bf16(layer)
    traced(built_of(saved, "int8", cache="int8"))


@pytest.mark.slow
@pytest.mark.parametrize("form", ["request, llama", "all, hstu, time"])
def test_every_pass_of_other_towers_is_taken(saved: SavedRanking, form: str) -> None:
    traced(built_of(other_tower(saved, form)))


def other_tower(saved: SavedRanking, form: str) -> SavedRanking:
    """The checkpoint as it would be of a model of one of FORMS, with weights at random."""
    changes = dict(FORMS[form])
    supervision = "all" if changes.pop("all", False) else "candidates"
    tree = saved.config.model_dump()
    tree["model"] |= {"input": {"kind": "interleaved"}, **changes}
    tree["task"]["supervision"] = supervision
    return replace(saved, config=type(saved.config).model_validate(tree), model=model_of(FORMS[form]))
