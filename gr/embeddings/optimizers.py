"""The optimizers of the embedding tables: fused into backward where fbgemm can, stepped here where it cannot.

On CPU fbgemm has no fused Adam, and data-parallel tables never are fused: their kernels leave gradients of the rows
that were looked up, which `TableOptimizer.step` applies by the same rule: it updates these rows and no others.
"""

from collections.abc import Sequence
from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from torch import Tensor, nn

from gr.config.features import ID_MAP, Rounding
from gr.config.optim import TABLE_OPTIMIZERS, TableOptimizerConfig
from gr.config.run import EmbeddingsConfig
from gr.embeddings.dynamic import HandedOver, IdEntry, id_map_of
from gr.embeddings.growth import GrownEntry, grown
from gr.embeddings.init import key_of
from gr.embeddings.local_shards import Kernel, TableShard, local_shards
from gr.embeddings.state import TableEntry, table_entries
from gr.ops.huge_pages import take_huge_pages
from gr.ops.row_update import StochasticRounding, row_update


def fused_params(config: TableOptimizerConfig, rounding: Rounding | None = None) -> dict[str, Any]:
    """The parameters that TorchRec hands to fbgemm for the update in backward. rounding: of a half table.

    fbgemm rounds stochastically on CUDA only, by draws that are not those of gr.ops.row_update; on CPU it is given no
    table that asks for it (TableConfig.is_fused_on_cpu).
    """
    optimizer = EmbOptimType[config.fused_type]
    draws = {} if rounding is None else {"stochastic_rounding": rounding == "stochastic"}
    home: dict[str, Any] = {} if config.state == "device" else {"uvm_non_rowwise_momentum": True}
    if config.state_dtype == "bf16":
        home["optimizer_state_dtypes"] = _StateDtypes(momentum1=SparseType.BF16)
    return {"optimizer": optimizer, "learning_rate": config.lr, **config.fused_arguments(), **draws, **home}


class _StateDtypes(dict[str, SparseType]):
    """A dict that TorchRec can hash, as it does with the parameters that tables are grouped by."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(tuple(sorted((name, dtype.value) for name, dtype in self.items())))


class TableOptimizer:
    """Steps the tables of a sharded model, each by its optimizer, and owns their state for checkpoints.

    seed: of the draws of stochastic rounding. configs[i]: the optimizer of shards[i]. states[i] holds the state
    tensors of shards[i] by fbgemm's names: sum (Adagrad), exp_avg and exp_avg_sq (Adam).
    """

    def __init__(self, model: nn.Module, embeddings: EmbeddingsConfig, seed: int) -> None:
        self.embeddings, self.seed = embeddings, seed
        self.ids = id_map_of(model)
        self.factor = 1.0
        self.steps = 0
        self.growing: list[TableEntry | IdEntry | GrownEntry] = []
        self.shards: list[TableShard] = list(local_shards(model))
        self.configs = [embeddings.optimizer_of(shard.table) for shard in self.shards]
        self.states = [
            shard.states if shard.is_fused else _dense_states(shard.weight, config)
            for shard, config in zip(self.shards, self.configs, strict=True)
        ]

    def scale_learning_rates(self, factor: float) -> None:
        """Each is `factor` of its configured value: from the next lookup for fused tables, the next step for others.

        The shards of one kernel have one optimizer: TorchRec groups tables by it.
        """
        self.factor = factor
        for shard, config in zip(self.shards, self.configs, strict=True):
            if shard.is_fused:
                shard.kernel.emb_module.set_learning_rate(config.lr * factor)

    def set_steps(self, steps: int) -> None:
        """Steps taken so far, for Adam's bias correction; called after a checkpoint was loaded."""
        self.steps = steps
        self.reload()
        for shard in self.shards:
            if shard.is_fused:
                shard.kernel.emb_module.set_optimizer_step(steps)
        for entry in self.growing:
            if isinstance(entry, GrownEntry):
                entry.deal_out()
        self.growing = []
        if self.ids is not None:
            self.ids.set_steps(steps)

    def grow_from(self, saved: EmbeddingsConfig) -> None:
        """The next checkpoint to be loaded, up to set_steps(), is of `saved`, whose sets may have fewer ways."""
        ids = {} if self.ids is None else self.ids.dynamic
        ways = {name: (saved.ids_of(name), table.config.ways) for name, table in ids.items()}
        fewer = {name: (old.ways, now) for name, (old, now) in ways.items() if old.kind == "dynamic" and old.ways < now}
        entries = self.entries() if fewer else []
        owners = [entry.name.split(".")[0].removesuffix(ID_MAP) for entry in entries]
        self.growing = [
            grown(entry, *fewer[owner]) if owner in fewer and not isinstance(entry, GrownEntry) else entry
            for owner, entry in zip(owners, entries, strict=True)
        ]

    @torch.no_grad()
    def hand_over(self, handed: Sequence[HandedOver]) -> None:
        """Gives rows to other ids: their initial vectors, and optimizer states of zero."""
        for each in handed:
            assert self.ids is not None
            for shard, states in zip(self.shards, self.states, strict=True):
                local_N = each.row_N - shard.row_offset
                own_N = (local_N >= 0) & (local_N < len(shard.weight)) & (each.table == shard.table)
                if own_N.any():
                    rows = local_N[own_N].to(shard.weight.device)
                    shard.weight[rows] = self.ids.initial.of_ids(shard, each.id_N[own_N]).to(shard.weight.dtype)
                    for state in states.values():
                        state[rows] = 0

    def flush(self) -> None:
        """Writes what caches of host memory hold to the weights of the shards."""
        for kernel in self._fused_kernels():
            kernel.emb_module.flush()

    def reload(self) -> None:
        """Has caches of host memory read the weights of the shards anew, which others have written to."""
        for kernel in self._fused_kernels():
            kernel.emb_module.reset_cache_states()

    def _fused_kernels(self) -> list[Kernel]:
        return list({id(shard.kernel): shard.kernel for shard in self.shards if shard.is_fused}.values())

    def entries(self) -> list[TableEntry | IdEntry | GrownEntry]:
        """Weights, states and the rows of dynamic ids as a checkpoint keeps them."""
        if self.growing:
            return self.growing
        self.flush()
        return [*table_entries(self.shards, self.states), *(self.ids.entries() if self.ids is not None else ())]

    @torch.no_grad()
    def step(self) -> None:
        """Applies and clears the gradients that dense kernels were left with. Collective."""
        self.steps += 1
        kernels = {id(shard.kernel): shard.gradients for shard in self.shards}
        # The shards of one kernel share its gradients.
        dense = [gradients for gradients in kernels.values() if gradients is not None]
        for gradients in dense:
            gradients.agree()
        for shard, config, states in zip(self.shards, self.configs, self.states, strict=True):
            if shard.gradients is not None and (rows := shard.gradients.take(shard.index)) is not None:
                rule, numbers = TABLE_OPTIMIZERS.target(config), config.fused_arguments()
                lr, rounding = config.lr * self.factor, self._rounding(shard)
                row_update(rule, shard.weight, states, *rows, rounding, lr=lr, steps=self.steps, **numbers)
        for gradients in dense:
            gradients.clear()

    def rounds(self, shard: TableShard) -> bool:
        """Whether updates of a shard are rounded stochastically."""
        return self.embeddings.rounding_of(shard.table) == "stochastic"

    def _rounding(self, shard: TableShard) -> StochasticRounding | None:
        if not self.rounds(shard):
            return None
        key = key_of(self.seed, f"rounding/{shard.table}")
        return StochasticRounding(key, self.steps, shard.row_offset, shard.column_offset, shard.shape[1])


def _dense_states(weight: Tensor, config: TableOptimizerConfig) -> dict[str, Tensor]:
    """The states of a dense kernel's shard, zero: float32 [r, c], or [r] where a row has one number."""
    states = {
        name: torch.zeros(weight.shape if shape == "element" else weight.shape[:1], device=weight.device)
        for name, shape in config.states.items()
    }
    for state in states.values():
        take_huge_pages(state)
    return states
