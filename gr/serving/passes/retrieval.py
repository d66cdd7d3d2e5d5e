"""The forward pass of a retrieval model for a package: one history in, the vector that items are compared with out.

One history a call, so that no shape depends on a value, and attention as plain matrix products; the last layer computes
its newest token only. T tokens, F features of an item, D width, H heads, G heads of keys and values, Q and V widths per
head, R rows of the output.
"""

import copy
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gr.errors import ServingError
from gr.models.retrieval import RetrievalModel
from gr.ops.hstu_attention.time_buckets import bucket_edges
from gr.ops.rope import rope_tables
from gr.towers.hstu import GENERATED_LENGTH, HSTU, HSTULayer
from gr.towers.hstu import NORM_EPS as HSTU_EPS
from gr.towers.llama import Llama, LlamaLayer
from gr.towers.sasrec import SASRec, SASRecLayer
from gr.towers.stu import STU, STULayer


class QueryPass(nn.Module):
    """A retrieval model's `user_vectors` for one history of at least one token, in fp32."""

    def __init__(self, model: RetrievalModel, tables: nn.Module, features: int) -> None:
        """tables: (ids, offsets), int32, to vectors [ids, D or wider]; ids are feature after feature. features: F,
        item_id too.

        Raises ServingError for a tower without such a pass.
        """
        super().__init__()
        self.tables, self.features, self.dim, self.scale = tables, features, model.dim, math.sqrt(model.dim)
        self.position = nn.Parameter(model.position.detach().clone(), requires_grad=False)
        self.similarity = model.similarity
        kind = type(model.tower)
        if kind not in _TOWERS:
            known = ", ".join(sorted(tower.__name__ for tower in _TOWERS))
            raise ServingError(f"retrieval with the tower {kind.__name__} cannot be exported; towers that can: {known}")
        self.tower = _TOWERS[kind](copy.deepcopy(model.tower).float().eval(), model.max_length)

    def forward(self, ids_FT: Tensor, times_T: Tensor) -> Tensor:
        """float32 [D]: its dot product with an item's vector is the score.

        ids_FT: int32, of the items, oldest first, and of their features; within their tables, which is not checked.
        times_T: int64 seconds of the events; a tower that reads no time ignores them.
        """
        T = ids_FT.shape[1]
        ids = ids_FT.reshape(-1)
        vectors = self.tables(ids, torch.arange(self.features * T + 1, dtype=torch.int32))
        x_TD = vectors[:, : self.dim].view(self.features, T, self.dim).sum(0) * self.scale + F.embedding(
            torch.arange(T), self.position
        )
        newest_1D = self.tower(x_TD, times_T)
        return (self.similarity.queries(newest_1D) * self.similarity.scale)[0]


class _HSTUQuery(nn.Module):
    """gr.towers.hstu on one history; the newest token's output, [1, D]."""

    edges: Tensor

    def __init__(self, tower: HSTU, max_length: int) -> None:
        super().__init__()
        self.config, self.layers, self.max_length = tower.config, tower.layers, max_length
        if self.config.time_bias:
            self.register_buffer("edges", torch.tensor(bucket_edges(self.config.time_buckets), dtype=torch.int64))

    def forward(self, x_TD: Tensor, times_T: Tensor) -> Tensor:
        T = x_TD.shape[0]
        place_T = torch.arange(T)
        hidden_TT = place_T[None, :] > place_T[:, None]
        distance_TT = self.max_length - 1 + place_T[None, :] - place_T[:, None]
        buckets_TT = distance_TT  # not read without time_bias
        if self.config.time_bias:
            # An event predicts its successor at the successor's time, and the newest one at its own.
            asked_T = times_T[(place_T + 1).clamp(max=T - 1)]
            buckets_TT = torch.bucketize((asked_T[:, None] - times_T[None, :]).abs(), self.edges, right=True)
        for index, layer in enumerate(self.layers):
            rows = _rows(index, len(self.layers))
            assert isinstance(layer, HSTULayer)
            x_TD = self._layer(layer, x_TD, rows, distance_TT[rows], buckets_TT[rows], hidden_TT[rows])
        return x_TD

    def _layer(
        self, layer: HSTULayer, x_TD: Tensor, rows: slice, distance_RT: Tensor, buckets_RT: Tensor, hidden_RT: Tensor
    ) -> Tensor:
        """The outputs of the tokens in `rows`, [R, D]."""
        config = self.config
        z = F.silu(F.layer_norm(x_TD, (x_TD.shape[1],), eps=HSTU_EPS) @ layer.uvqk)
        u, v, q, k = z.split(layer.splits, dim=-1)
        q_HRQ, k_HTQ, v_HTV = (t.unflatten(-1, (config.heads, -1)).transpose(0, 1) for t in (q[rows], k, v))
        scores_HRT = q_HRQ @ k_HTQ.transpose(1, 2)
        if config.attention == "softmax":
            weights_HRT = (scores_HRT * config.qk_dim**-0.5).masked_fill(hidden_RT, -torch.inf).softmax(-1)
        else:
            if layer.position_bias is not None:
                scores_HRT = scores_HRT + layer.position_bias[distance_RT]
            if layer.time_bias is not None:
                scores_HRT = scores_HRT + layer.time_bias[buckets_RT]
            weights_HRT = (F.silu(scores_HRT) / self._divisor(x_TD.shape[0])).masked_fill(hidden_RT, 0.0)
        a = (weights_HRT @ v_HTV).transpose(0, 1).flatten(1)
        normed, u = F.layer_norm(a, (a.shape[1],), eps=HSTU_EPS), u[rows]
        gated = torch.cat([u, normed, u * normed], dim=-1) if config.concat_ua else u * normed
        return x_TD[rows] + layer.output(gated)

    def _divisor(self, T: int) -> float:
        match self.config.divisor:
            case "constant":
                return self.config.divisor_value or self.max_length + GENERATED_LENGTH + 1
            case "max_len":
                return self.max_length
            case "actual_len":
                return T


class _SASRecQuery(nn.Module):
    """gr.towers.sasrec on one history; the newest token's output, [1, D]."""

    def __init__(self, tower: SASRec, max_length: int) -> None:
        super().__init__()
        self.layers, self.last_norm = tower.layers, tower.last_norm

    def forward(self, x_TD: Tensor, times_T: Tensor) -> Tensor:
        T = x_TD.shape[0]
        place_T = torch.arange(T)
        hidden_TT = place_T[None, :] > place_T[:, None]
        for index, layer in enumerate(self.layers):
            rows = _rows(index, len(self.layers))
            assert isinstance(layer, SASRecLayer)
            x_TD = self._layer(layer, x_TD, rows, hidden_TT[rows])
        return self.last_norm(x_TD)

    def _layer(self, layer: SASRecLayer, x_TD: Tensor, rows: slice, hidden_RT: Tensor) -> Tensor:
        """The outputs of the tokens in `rows`, [R, D]."""
        normed_RD = layer.attention_norm(x_TD[rows])
        q, (k, v) = layer.query(normed_RD), layer.key_value(x_TD).chunk(2, dim=-1)
        q_HRQ, k_HTQ, v_HTQ = (t.unflatten(-1, (layer.heads, -1)).transpose(0, 1) for t in (q, k, v))
        scores_HRT = q_HRQ @ k_HTQ.transpose(1, 2) * q_HRQ.shape[-1] ** -0.5
        a_HRQ = scores_HRT.masked_fill(hidden_RT, -torch.inf).softmax(-1) @ v_HTQ
        y_RD = layer.ffn_norm(normed_RD + layer.attention_output(a_HRQ.transpose(0, 1).flatten(1)))
        return y_RD + layer.ffn_out(F.relu(layer.ffn_in(y_RD)))


class _STUQuery(nn.Module):
    """gr.towers.stu on one history; the newest token's output, [1, D]."""

    def __init__(self, tower: STU, max_length: int) -> None:
        super().__init__()
        self.config, self.layers = tower.config, tower.layers
        self.mask, self.alpha, self.divisor = tower.mask(0), tower.alpha, tower.divisor

    def forward(self, x_TD: Tensor, times_T: Tensor) -> Tensor:
        T = x_TD.shape[0]
        seen_TT = self.mask.seen(T, times_T.new_full((), T))
        for index, layer in enumerate(self.layers):
            rows = _rows(index, len(self.layers))
            assert isinstance(layer, STULayer)
            x_TD = self._layer(layer, x_TD, rows, seen_TT[rows])
        return x_TD

    def _layer(self, layer: STULayer, x_TD: Tensor, rows: slice, seen_RT: Tensor) -> Tensor:
        """The outputs of the tokens in `rows`, [R, D]."""
        u, v, q, k = layer.uvqk(layer.input_norm(x_TD)).split(layer.splits, dim=-1)
        q_HRQ, k_HTQ, v_HTV = (t.unflatten(-1, (self.config.heads, -1)).transpose(0, 1) for t in (q[rows], k, v))
        weights_HRT = F.silu(self.alpha * (q_HRQ @ k_HTQ.transpose(1, 2))) / self.divisor * seen_RT
        a_RHV, u = (weights_HRT @ v_HTV).transpose(0, 1), F.silu(u[rows])
        # A group norm has one weight a head; a layer norm has one a column.
        normed = layer.output_norm(a_RHV if self.config.group_norm else a_RHV.flatten(1)).view(u.shape)
        return x_TD[rows] + layer.output(torch.cat([u, a_RHV.flatten(1), u * normed], dim=-1))


class _LlamaQuery(nn.Module):
    """gr.towers.llama on one history; the newest token's output, [1, D]."""

    def __init__(self, tower: Llama, max_length: int) -> None:
        super().__init__()
        self.config, self.width, self.layers, self.norm = tower.config, tower.width, tower.layers, tower.norm

    def forward(self, x_TD: Tensor, times_T: Tensor) -> Tensor:
        place_T = torch.arange(x_TD.shape[0])
        turn = rope_tables(place_T, self.width, self.config.rope_theta, x_TD.dtype)
        hidden_TT = place_T[None, :] > place_T[:, None]
        for index, layer in enumerate(self.layers):
            rows = _rows(index, len(self.layers))
            assert isinstance(layer, LlamaLayer)
            x_TD = self._layer(layer, x_TD, rows, turn, hidden_TT[rows])
        return _rms_norm(self.norm, x_TD)

    def _layer(
        self, layer: LlamaLayer, x_TD: Tensor, rows: slice, turn: tuple[Tensor, Tensor], hidden_RT: Tensor
    ) -> Tensor:
        """The outputs of the tokens in `rows`, [R, D]."""
        own, normed_TD = layer.self_attn, _rms_norm(layer.input_layernorm, x_TD)
        q_RHQ = _turned(own.q_proj(normed_TD[rows]), self.width, turn[0][rows], turn[1][rows])
        k_TGQ = _turned(own.k_proj(normed_TD), self.width, *turn)
        v_TGQ = own.v_proj(normed_TD).unflatten(-1, (-1, self.width))
        shared = self.config.heads // self.config.key_heads  # heads of queries that read one of keys and values
        k_HTQ, v_HTQ = (each.transpose(0, 1).repeat_interleave(shared, dim=0) for each in (k_TGQ, v_TGQ))
        scores_HRT = q_RHQ.transpose(0, 1) @ k_HTQ.transpose(1, 2) * self.width**-0.5
        a_HRQ = scores_HRT.masked_fill(hidden_RT, -torch.inf).softmax(-1) @ v_HTQ
        y_RD = x_TD[rows] + own.o_proj(a_HRQ.transpose(0, 1).flatten(1))
        normed_RD, mlp = _rms_norm(layer.post_attention_layernorm, y_RD), layer.mlp
        return y_RD + mlp.down_proj(F.silu(mlp.gate_proj(normed_RD)) * mlp.up_proj(normed_RD))


def _rms_norm(norm: nn.RMSNorm, x_TD: Tensor) -> Tensor:
    return F.rms_norm(x_TD, norm.normalized_shape, norm.weight, norm.eps)


def _turned(x_TC: Tensor, width: int, cos_T1P: Tensor, sin_T1P: Tensor) -> Tensor:
    """[T, heads, width], each token's pairs of columns turned by its angles, as gr.ops.rope.rotate does."""
    real, imaginary = x_TC.unflatten(-1, (-1, width)).chunk(2, dim=-1)
    return torch.cat([real * cos_T1P - imaginary * sin_T1P, imaginary * cos_T1P + real * sin_T1P], dim=-1)


def _rows(index: int, layers: int) -> slice:
    """The tokens whose output of a layer is read: of the last layer, the newest."""
    return slice(-1, None) if index == layers - 1 else slice(None)


_TOWERS: dict[type[nn.Module], Callable[..., nn.Module]] = {
    HSTU: _HSTUQuery,
    SASRec: _SASRecQuery,
    STU: _STUQuery,
    Llama: _LlamaQuery,
}
