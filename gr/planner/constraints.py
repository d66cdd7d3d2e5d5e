"""The choices that a run's configuration and device leave to the planner. No torch."""

from gr.config.inventory import InventoryConfig, TableConfig
from gr.config.planner import PlannerConfig
from gr.errors import ConfigError

BY_COLUMNS = ("column_wise", "table_column_wise", "grid_shard")


def constrained(inventory: InventoryConfig, planner: PlannerConfig, device: str) -> InventoryConfig:
    """`inventory` limited to what planner.sharding, planner.tables and the device (cpu or cuda) allow.

    auto allows the sharding types that train the same model: column shards keep row statistics of their own. Raises
    ConfigError.
    """
    names = [table.name for table in inventory.tables]
    if unknown := sorted(set(planner.tables) - set(names)):
        raise ConfigError(f"planner.tables: no table named {', '.join(unknown)}; the model has {', '.join(names)}")
    for table in inventory.tables:
        check_state(planner, table, sharding_type_of(planner, table.name))
    tables = [_allowed(table, sharding_type_of(planner, table.name), device) for table in inventory.tables]
    return inventory.model_copy(update={"tables": tuple(tables)})


def sharding_type_of(planner: PlannerConfig, table: str) -> str:
    """The sharding type that the configuration requires for a table, or auto."""
    return planner.tables.get(table, planner.sharding)


def check_state(planner: PlannerConfig, table: TableConfig, sharding_type: str) -> None:
    """Raises ConfigError where column shards would train another model, and the configuration does not allow it."""
    if sharding_type in BY_COLUMNS and table.optimizer_config.states_a("row") and not planner.allow_state_per_shard:
        raise ConfigError(
            f"planner: {sharding_type} of {table.name}: {table.optimizer} keeps one number a row over all columns, and "
            "each column shard would keep its own, which trains another model than one rank does: use auto, table_wise "
            "or row_wise, an optimizer with a state for each element, or planner.allow_state_per_shard=true"
        )


def _check_host_memory(table: TableConfig) -> None:
    """On a CPU all memory is the host's: fbgemm has no other there, and TorchRec runs the kernels as if it had."""
    if "fused" not in table.kernels and "dense" not in table.kernels:
        raise ConfigError(
            f"table {table.name}: compute_kernel={table.kernels[0]} is of CUDA, and this is a cpu, where every table "
            "is in host memory: set embeddings.compute_kernel=fused"
        )
    if not table.has_plain_states:
        raise ConfigError(
            f"table {table.name}: optimizer.state={table.state}, state_dtype={table.state_dtype} are of CUDA, and this "
            "is a cpu, where every state is fp32 in host memory: set state=device and state_dtype=fp32"
        )


def _allowed(table: TableConfig, chosen: str, device: str) -> TableConfig:
    valid = table.valid_sharding_types()
    if chosen not in ("auto", *valid):
        raise ConfigError(f"planner: {chosen} {table.why_invalid(chosen)}: {table.name}; use auto, {', '.join(valid)}")
    optimizer = table.optimizer_config
    types: list[str] = [chosen]
    if chosen == "auto":
        types = [name for name in ("table_wise", "row_wise", "table_row_wise") if name in valid]
        types += [] if optimizer.states_a("row") else ["column_wise"]
        types += ["data_parallel"]
    kernels = table.kernels
    if device == "cpu":
        _check_host_memory(table)
        kernels = ("fused",) if table.is_fused_on_cpu() else ("dense",)
    return table.model_copy(update={"sharding_types": tuple(types), "kernels": kernels})
