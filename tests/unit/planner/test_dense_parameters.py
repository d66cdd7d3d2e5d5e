"""The planner counts exactly the parameters and the tables of the model on meta: every tower, every recipe, DLRM."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingCollection

from gr.config import ClickConfig, RunConfig, load_config
from gr.config.base import Section
from gr.config.click import ClickModelConfig
from gr.config.dlrm import CatInteraction, DCNInteraction, DLRMConfig, DotInteraction, ProjectionInteraction
from gr.config.features import chosen_columns, chosen_features, chosen_item_features
from gr.config.inventory import TableConfig, TowerDense
from gr.config.towers import TOWERS, SASRecConfig, TowerCost
from gr.models import build_model
from gr.parallel.dense import dense_parameters
from gr.planner.estimate_dense import dense_work
from gr.schema import SparseColumn
from tests.support import ROOT
from tests.support.schemas import item_schema, tabular_schema
from tests.support.tiny import ITEMS, tiny_config
from tests.support.tiny_histories import ITEMS as ITEMS_RANKED
from tests.support.tiny_histories import SCHEMA as HISTORIES
from tests.support.tiny_histories import tiny_ranking_config
from tests.support.tiny_tabular import COLUMNS, DENSE, tiny_click_config

DIMS = st.sampled_from([4, 6, 8, 10, 12])
many = settings(max_examples=25, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])


def assert_counts_are_the_models(config: RunConfig, schema: Any) -> nn.Module:
    """Dense parameters to the last one; and name, kind, rows, columns and features of every table. Gives the model."""
    model = build_model(config, schema)
    built = sum(parameter.numel() for parameter in dense_parameters(model).values())
    assert dense_work(config.inventory(schema), 1).parameters == built
    assert sorted(map(described, config.tables(schema))) == sorted(tables_of(model))
    assert config.inventory(schema).tables == config.tables(schema)
    return model


def described(table: TableConfig) -> tuple[str, str, int, int, int]:
    return table.name, table.kind, table.rows, table.dim, table.features


def tables_of(model: nn.Module) -> Iterator[tuple[str, str, int, int, int]]:
    for module in model.modules():
        if isinstance(module, EmbeddingCollection):
            kind, tables = "sequence", module.embedding_configs()
        elif isinstance(module, EmbeddingBagCollection):
            kind, tables = "pooled", module.embedding_bag_configs()
        else:
            continue
        for table in tables:
            yield table.name, kind, table.num_embeddings, table.embedding_dim, len(table.feature_names)


def values_of(annotation: Any, default: Any) -> st.SearchStrategy[Any]:
    """Values for one field of a tower, by its type; the default where the type has no parameters to count."""
    if annotation is bool:
        return st.booleans()
    if annotation is int:
        return st.integers(0, 6)
    if get_origin(annotation) is Literal:
        return st.sampled_from(get_args(annotation))
    return st.just(default)


def towers(kind: str) -> st.SearchStrategy[dict[str, Any]]:
    """Sections of a registered tower with every flag, count and choice it has; some are not valid."""
    config: type[Section] = TOWERS.config(kind)
    fields = {name: values_of(field.annotation, field.default) for name, field in config.model_fields.items()}
    return st.fixed_dictionaries(fields | {"kind": st.just(kind)})


def check_retrieval(tower: dict[str, Any], dim: int) -> None:
    try:
        config = tiny_config("data", "runs", model={"dim": dim, "tower": tower})
    except ValidationError:
        assume(False)
    assert_counts_are_the_models(config, item_schema(ITEMS))


def check_ranking(tower: dict[str, Any], model: dict[str, Any], supervision: str) -> None:
    try:
        config = tiny_ranking_config(model={**model, "tower": tower}, task={"supervision": supervision})
    except ValidationError:
        assume(False)
    built = assert_counts_are_the_models(config, HISTORIES)
    dense = config.inventory(HISTORIES).dense
    assert isinstance(dense, TowerDense) and dense.max_length == built.tokens.max_length


@pytest.mark.parametrize("kind", list(TOWERS))
@many
@given(st.data(), DIMS)
def test_retrieval_with_every_tower(kind: str, data: st.DataObject, dim: int) -> None:
    check_retrieval(data.draw(towers(kind)), dim)


@pytest.mark.parametrize(
    ("tables", "features"),
    [({}, {"item_id": 2, "group": 2, "maker": 2}), ({"maker": {"table": "group"}}, {"item_id": 2, "group": 4})],
)
def test_retrieval_with_features_of_items(tables: dict, features: dict) -> None:
    config = tiny_config("data", "runs", model={"features": ["group", "maker"]}, embeddings={"tables": tables})
    of_events = {"group": 6, "hour": 24, "maker": 6}
    schema = item_schema(ITEMS).model_copy(update={"event_features": of_events, "contextual": {"country": 5}})
    schema = chosen_item_features(schema, config.model.features)
    assert_counts_are_the_models(config, schema)
    assert {table.name: table.features for table in config.tables(schema)} == features
    item, *others = config.tables(schema)
    assert sum(table.ids_per_example for table in others) == 2 * item.ids_per_example
    assert sum(table.ids_per_step for table in others) == 2 * item.ids_per_step


def test_retrieval_with_a_mixture_of_logits() -> None:
    sizes = {"kind": "mol", "query_vectors": 3, "item_vectors": 2, "dim": 5, "hidden": 7}
    plain = tiny_config("data", "runs").inventory(item_schema(ITEMS)).loss.scores_per_example
    config = tiny_config("data", "runs", task={"similarity": sizes})
    assert_counts_are_the_models(config, item_schema(ITEMS))
    assert config.inventory(item_schema(ITEMS)).loss.scores_per_example == 6 * plain


RANKERS = st.fixed_dictionaries(
    {
        "dim": DIMS,
        "input": st.sampled_from([{"kind": "interleaved"}, {"kind": "additive"}]),
        "time": st.sampled_from([None, {"buckets": 7}]),
        "head": st.sampled_from([(5,), (5, 6)]),
    }
)


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(TOWERS))
@many
@given(st.data(), RANKERS)
def test_ranking_with_every_tower(kind: str, data: st.DataObject, model: dict[str, Any]) -> None:
    """Supervision of candidates where the tower has a mask for them, of all events where it has none."""
    masks = TOWERS.config(kind).masks_candidates  # type: ignore[attr-defined]
    supervision = "all" if model["input"]["kind"] == "interleaved" and (not masks or data.draw(st.booleans())) else None
    assume(masks or supervision == "all")
    check_ranking(data.draw(towers(kind)), model, supervision or "candidates")


class OffByOneConfig(SASRecConfig):
    """SASRec, with a cost that forgets one parameter."""

    kind: Literal["off_by_one"] = "off_by_one"  # type: ignore[assignment]

    def cost(self, dim: int, max_length: int, element_bytes: int) -> TowerCost:
        cost = super().cost(dim, max_length, element_bytes)
        return TowerCost(cost.parameters - 1, cost.token_flops, cost.score_flops, cost.kept_bytes)


@pytest.fixture
def off_by_one() -> Iterator[str]:
    TOWERS.add(OffByOneConfig, "gr.towers.sasrec:SASRec")
    yield "off_by_one"
    del TOWERS._configs["off_by_one"], TOWERS._targets["off_by_one"]


def test_a_new_tower_with_a_wrong_cost_is_noticed(off_by_one: str) -> None:
    """Nothing but its registration: the tests above go through the registry."""
    for check in (
        lambda: check_retrieval({"kind": off_by_one}, 8),
        lambda: check_ranking({"kind": off_by_one}, {"dim": 8}, "all"),
    ):
        with pytest.raises(AssertionError, match="parameters"):
            check()


INTERACTIONS = (
    DotInteraction(),
    DotInteraction(self_interaction=True),
    CatInteraction(),
    DCNInteraction(layers=2, rank=5),
    ProjectionInteraction(branch1=(7, 8), branch2=(5, 12)),
)


@pytest.mark.parametrize("row_weights", [False, True])
@pytest.mark.parametrize("interaction", INTERACTIONS, ids=lambda interaction: interaction.kind)
@pytest.mark.parametrize("columns", [COLUMNS[:1], COLUMNS])
def test_dlrm_with_every_interaction(interaction: Section, row_weights: bool, columns: tuple) -> None:
    model = DLRMConfig(dim=4, bottom=(9, 4), top=(6, 5, 1), row_weights=row_weights, interaction=interaction)
    tree = {"run_dir": "runs", "data": {"path": "data"}, "task": {"kind": "click"}, "trainer": {"steps": 1}}
    config = ClickConfig.model_validate({**tree, "model": dict(model)})
    assert_counts_are_the_models(config, tabular_schema(columns, DENSE))


@pytest.mark.parametrize("interaction", INTERACTIONS, ids=lambda interaction: interaction.kind)
def test_dlrm_without_dense_features(interaction: Section) -> None:
    model = ClickModelConfig(dim=4, top=(6, 5, 1), interaction=interaction)
    tree = {"run_dir": "runs", "data": {"path": "data"}, "task": {"kind": "click"}, "trainer": {"steps": 1}}
    config = ClickConfig.model_validate({**tree, "model": model})
    assert_counts_are_the_models(config, tabular_schema(COLUMNS, []))


TWINS = (*COLUMNS, SparseColumn(name="c4", cardinality=64))


@pytest.mark.parametrize("row_weights", [False, True])
@pytest.mark.parametrize(
    ("features", "tables", "ids"),
    [
        (["i1", "c2", "c4"], {}, {"c2": 3, "c4": 1}),
        (["i3", "c4", "c2"], {"c2": {"table": "c4", "dtype": None}}, {"c4": 4}),
        (None, {"c4": {"table": "c2"}, "c1": {"dtype": "fp16"}}, {"c1": 1, "c2": 4, "c3": 1}),
    ],
)
def test_dlrm_with_chosen_columns(features: list | None, tables: dict, ids: dict, row_weights: bool) -> None:
    embeddings = {"tables": tables}
    config = tiny_click_config(
        Path("data"), Path("runs"), model={"features": features, "row_weights": row_weights}, embeddings=embeddings
    )
    schema = chosen_columns(tabular_schema(TWINS, DENSE), config.model.features)
    assert_counts_are_the_models(config, schema)
    inventory = config.inventory(schema)
    assert {table.name: table.ids_per_example for table in inventory.tables} == ids
    assert inventory.interacting_features == len(schema.sparse)


@pytest.mark.parametrize(
    ("features", "tables"),
    [
        ([], {}),
        (["age"], {}),
        (["category", "home"], {"home": {"table": "category"}, "category": {"dtype": "fp16"}}),
        (None, {"seen": {"table": "item_id"}, "home": {"table": "category"}}),
    ],
)
def test_ranking_with_chosen_features(features: list | None, tables: dict) -> None:
    twins = {"event_features": {"category": 43, "seen": ITEMS_RANKED}, "contextual": {"country": 45, "home": 43}}
    config = tiny_ranking_config(model={"features": features}, embeddings={"tables": tables})
    schema = chosen_features(HISTORIES.model_copy(update=twins), config.model.features)
    built = assert_counts_are_the_models(config, schema)
    dense = config.inventory(schema).dense
    assert isinstance(dense, TowerDense) and dense.max_length == built.tokens.max_length


def test_every_interaction_is_there() -> None:
    union = get_args(DLRMConfig.model_fields["interaction"].annotation)
    assert {type(interaction) for interaction in INTERACTIONS} == set(union)


@pytest.mark.parametrize("path", sorted((ROOT / "configs/retrieval").glob("ml-1m-*.yaml")), ids=lambda path: path.stem)
def test_our_own_retrieval_configurations(path) -> None:
    assert_counts_are_the_models(load_config(path), item_schema(3953))
