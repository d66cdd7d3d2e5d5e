"""Embedding tables in packed rows on fbgemm's n-bit operator, for torch.export. B examples, F features, D width.

One buffer holds the rows of all tables; a row of int8, int4 or int2 begins with its fp16 scale and bias. The operator
compares ids with the padded number of rows, so of a table of 100 rows it serves 100 to 103 in silence: whoever calls
checks ids against the table, as the servables' `encode` does.
"""

from collections.abc import Iterable, Mapping, Sequence

import fbgemm_gpu  # noqa: F401  registers the operators
import torch
from torch import Tensor, nn

from gr.serving.package.layout import TablesLayout
from gr.serving.tables.quantize import RowKind, pack

_ROWS = "rows"
_PLACES = ("weights_placements", "weights_offsets", "weights_tys", "D_offsets")


class StoredTables(nn.Module):
    """Looks ids up in rows that are packed already: pooled by sum, or one vector an id."""

    rows: Tensor

    def __init__(self, layout: TablesLayout, tensors: Mapping[str, Tensor]) -> None:
        """tensors: what another one's state_dict() has."""
        super().__init__()
        self.layout = layout
        for name in (_ROWS, *_PLACES):
            self.register_buffer(name, tensors[name])
        self.features, self.widths = list(layout.features), list(layout.widths)

    def forward(self, ids: Tensor, offsets: Tensor) -> Tensor:
        """Pooled: float32 [B, sum of the features' D]. Else float32 [ids, D].

        ids: int32, feature after feature. offsets: int32 [F * B + 1], where each bag of ids begins. An id that is not
        in its table is not noticed.
        """
        return torch.ops.fbgemm.int_nbit_split_embedding_codegen_lookup_function(
            self.rows,
            # Rows in unified memory: none. As buffers, those of two modules would be one constant of the compiled code.
            self.rows[:0],
            self.weights_placements,
            self.weights_offsets,
            self.weights_tys,
            self.D_offsets,
            *self.layout.sizes,
            ids,
            offsets,
            self.layout.pooling,
            None,
            self.layout.output_dtype,
            None,
            None,
            self.layout.row_alignment,
        )


class PackedTables(StoredTables):
    """Packs tables, and looks ids up in them."""

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        kinds: Mapping[str, RowKind],
        features: Mapping[str, Sequence[str]],
        *,
        pooled: bool,
    ) -> None:
        """weights: float [E, D] by table. kinds: of its rows. features: that read each table, in the order of the ids.

        They lie where the weights are. Where these are on meta they lie on CPU, and `take_rows` fills them. Without
        pooling all tables have the same width.
        Raises ServingError, as gr.serving.tables.quantize.pack does.
        """
        # Imported here: reading a package needs the operator only, and not the classes that lay tables out.
        from fbgemm_gpu.split_embedding_configs import SparseType
        from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
        from fbgemm_gpu.split_table_batched_embeddings_ops_inference import IntNBitTableBatchedEmbeddingBagsCodegen

        names, empty = list(weights), any(weight.is_meta for weight in weights.values())
        device = torch.device("cpu") if empty else next(iter(weights.values())).device
        place = EmbeddingLocation.HOST if device.type == "cpu" else EmbeddingLocation.DEVICE
        packed = IntNBitTableBatchedEmbeddingBagsCodegen(
            [(name, *weight.shape, SparseType(kinds[name]), place) for name, weight in weights.items()],
            feature_table_map=[table for table, name in enumerate(names) for _ in features[name]],
            pooling_mode=PoolingMode.SUM if pooled else PoolingMode.NONE,
            output_dtype=SparseType.FP32,
            device=device,
        )
        packed.initialize_weights()
        if not empty:
            packed.assign_embedding_weights([pack(weight, kinds[name]) for name, weight in weights.items()])
        layout = TablesLayout(
            features=tuple(feature for name in names for feature in features[name]),
            widths=tuple(weights[name].shape[1] for name in names for _ in features[name]),
            sizes=(
                *(packed.total_D, packed.max_int2_D, packed.max_int4_D),
                *(packed.max_int8_D, packed.max_float16_D, packed.max_float32_D),
            ),
            pooling=int(packed.pooling_mode.value),
            output_dtype=packed.output_dtype,
            row_alignment=packed.row_alignment,
        )
        places = {name: getattr(packed, name).clone() for name in _PLACES}
        rows = packed.weights_host if device.type == "cpu" else packed.weights_dev
        super().__init__(layout, {_ROWS: rows, **places})
        self._kinds = kinds
        self._parts = dict(zip(names, packed.split_embedding_weights(), strict=True))  # views of the rows of each table

    def take_rows(self, stored: Tensor, changed: Mapping[str, Iterable[tuple[Tensor, Tensor]]]) -> None:
        """Takes the rows of another module of this layout, but for those that changed.

        stored: its buffer `rows`. changed: of each table, ids int64 [N] and weights, float [N, D]. Raises ServingError,
        as pack does.
        """
        self.rows.copy_(stored)
        for name, blocks in changed.items():
            for ids_N, weights_ND in blocks:
                for part, values in zip(self._parts[name], pack(weights_ND, self._kinds[name]), strict=True):
                    if values is not None:
                        part[ids_N] = values


class PackedFeatures(nn.Module):
    """One vector an id, of features that have equally many ids."""

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        kinds: Mapping[str, RowKind],
        columns: Mapping[str, Sequence[str]],
        features: Sequence[str],
        dim: int,
    ) -> None:
        """columns: the features of each table. features: those that are looked up, in this order. dim: D."""
        super().__init__()
        read = {table: [name for name in names if name in features] for table, names in columns.items()}
        read = {table: names for table, names in read.items() if names}
        self.packed = PackedTables({table: weights[table] for table in read}, kinds, read, pooled=False)
        self.order = [features.index(name) for name in self.packed.features]
        self.places = [self.packed.features.index(name) for name in features]
        self.dim = dim

    def forward(self, ids: Sequence[Tensor]) -> list[Tensor]:
        """ids: int32 [n] of each feature, within its table, which is not checked. Returns float32 [n, D] of each."""
        n = ids[0].shape[0]
        offsets = torch.arange(len(self.order) * n + 1, dtype=torch.int32)
        vectors = self.packed(torch.cat([ids[place] for place in self.order]), offsets)
        vectors_FnD = vectors.view(len(self.order), n, -1)[..., : self.dim]
        return [vectors_FnD[place] for place in self.places]
