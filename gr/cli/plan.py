"""`gr plan`: where the tables of a configuration would go, without allocating them."""

import click
from rich.console import Console
from rich.table import Table

from gr.config import load_config
from gr.errors import ConfigError


@click.command(help="Print the sharding plan of CONFIG for a number of ranks; allocates nothing.")
@click.argument("config")
@click.argument("overrides", nargs=-1, metavar="[KEY.PATH=VALUE]...")
@click.option("--world-size", type=click.IntRange(1), default=1, show_default=True, help="Ranks of the job.")
@click.option("--local-size", type=click.IntRange(1), default=None, help="Ranks a host; default: all on one.")
def command(config: str, overrides: tuple[str, ...], world_size: int, local_size: int | None) -> None:
    local_size = local_size or world_size
    if world_size % local_size:
        raise ConfigError(f"--local-size={local_size} does not divide --world-size={world_size}")
    loaded = load_config(config, overrides)
    from gr.dist import resolve_device
    from gr.experiment import check_world, meta_model
    from gr.planner import make_plan
    from gr.schema import DataSchema

    check_world(loaded, world_size)
    model = meta_model(loaded, DataSchema.load(loaded.data.path).item_cardinality)
    plan = make_plan(
        model,
        loaded,
        world_size=world_size,
        local_size=local_size,
        device=resolve_device(loaded.device),
    )
    table = Table(title=f"sharding plan for {world_size} ranks")
    for column in ("table", "sharding type", "kernel", "rank", "rows", "columns"):
        table.add_column(column)
    for module in plan.plan.values():
        for name, sharding in module.items():
            spec = sharding.sharding_spec
            shards = spec.shards if spec is not None else []
            for rank, shard in zip(sharding.ranks or [], shards, strict=False):
                (row, column), (rows, columns) = shard.shard_offsets, shard.shard_sizes
                table.add_row(
                    name,
                    sharding.sharding_type,
                    sharding.compute_kernel,
                    str(rank),
                    f"{row}..{row + rows - 1}" if rows else "none",
                    f"{column}..{column + columns - 1}",
                )
            if not shards:
                table.add_row(name, sharding.sharding_type, sharding.compute_kernel, "all", "all", "all")
    Console().print(table)
