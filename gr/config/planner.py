"""The section `planner` of an experiment: how tables lie on the ranks, and how their vectors travel. No torch."""

from typing import Literal

from pydantic import Field, PositiveInt

from gr.config.base import PathText, Section
from gr.config.inventory import AnyShardingType, CommDtype
from gr.errors import ConfigError


class PlannerConfig(Section):
    sharding: Literal["auto"] | AnyShardingType = Field("auto", description="For every table; auto asks the planner.")
    tables: dict[str, AnyShardingType] = Field({}, description="Sharding type of single tables, by name.")
    plan: PathText | None = Field(
        None, description="Plan to train with, as written by `gr plan --json`; unset makes one."
    )
    replan: bool = Field(
        False, description="Make another plan where that of `plan` is for another machine: elastic runs change theirs."
    )
    allow_state_per_shard: bool = Field(
        False,
        description="Take column shards of tables whose optimizer keeps one number a row, as rowwise_adagrad does: "
        "each shard then keeps its own, which trains another model than one rank does.",
    )
    groups: PositiveInt = Field(
        1,
        description="Groups of neighbouring ranks. Each has the tables whole, sharded over its own ranks, so that "
        "all-to-alls stay within it, and updates its copy by its own examples; the copies are then averaged (2D).",
    )
    sync_interval: PositiveInt = Field(
        1,
        description="Steps after which the groups average their tables and optimizer states; also before each "
        "evaluation and checkpoint. With sgd and 1, groups train the model that one group does.",
    )
    comm_dtype: CommDtype = Field(
        CommDtype(), description="Types in which vectors of tables and their gradients travel between ranks."
    )
    index_dedup: bool = Field(
        True,
        description="A rank asks for a row of a sequence table once a step, however many of its ids read it. Ids, "
        "vectors and gradients that travel are then the distinct ones.",
    )
    topology: PathText | None = Field(
        None,
        description="Hardware, by name or as a YAML file; unset: cpu, or what the GPU is. The ranks are the run's.",
    )

    def check_ranks(self, ranks: int) -> None:
        """Raises ConfigError where `ranks` ranks make no such groups."""
        if ranks % self.groups:
            raise ConfigError(
                f"planner.groups={self.groups} does not divide the {ranks} ranks of this run: use a multiple of "
                f"{self.groups} ranks, or set it to a divisor of {ranks}"
            )
