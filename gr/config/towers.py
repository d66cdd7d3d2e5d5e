"""Dense towers, as a user configures them; each states what it costs. No torch.

D model width, H heads, Q query and key width per head, V value width per head, N tokens of the longest sequence.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, NonNegativeInt, model_validator

from gr.config.base import Count, PositiveFloat, Probability, Registry, Section
from gr.errors import ConfigError

Layers = Annotated[Count, Field(description="Layers, one upon another.")]
Heads = Annotated[Count, Field(description="Attention heads of a layer.")]


@dataclass(frozen=True)
class TowerCost:
    """The cost of a stack of layers. One multiply-add is two FLOPs.

    parameters: exactly those of the module. token_flops: of a token, forward, in matrix products with parameters.
    score_flops: of a pair of a token and one before it (or itself), forward, in attention. kept_bytes: of a token,
    kept for the backward pass.
    """

    parameters: int
    token_flops: float
    score_flops: float
    kept_bytes: float


class TowerConfig(Section):
    """A tower: `Tower(JaggedSequence) -> JaggedSequence` of one width.

    masks_candidates: whether candidates at the end of a sequence can be kept from seeing one another.
    """

    kind: str
    layers: Layers = 2
    masks_candidates: ClassVar[bool] = False

    @abstractmethod
    def cost(self, dim: int, max_length: int, element_bytes: int) -> TowerCost:
        """dim: D. max_length: N. element_bytes: of an activation (4 in fp32, 2 in bf16)."""

    def check_width(self, dim: int) -> None:
        """Raises ValueError where the tower cannot be `dim` wide."""

    @property
    def uses_time(self) -> bool:
        """True where the tower reads timestamps."""
        return False

    @property
    def tensor_parallel_sizes(self) -> dict[str, int]:
        """The settings that the number of tensor parallel ranks has to divide; empty for a tower that is not split."""
        return {}

    @property
    def length_leak(self) -> str:
        """The setting through which a token learns how many tokens come after it; empty where none does."""
        return ""


class HSTUConfig(TowerConfig):
    """HSTU, research form (arXiv 2402.17152, Eq. 1-3)."""

    kind: Literal["hstu"] = "hstu"
    layers: Layers = 2
    heads: Heads = 1
    qk_dim: Count = Field(50, description="Query and key width per head.")
    v_dim: Count = Field(50, description="Value and gate width per head.")
    dropout: Probability = Field(0.2, description="Of the input of the output projection.")
    attention: Literal["pointwise", "softmax"] = Field("pointwise", description="softmax is the paper's ablation.")
    divisor: Literal["constant", "max_len", "actual_len"] = Field(
        "constant",
        description="What SiLU attention is divided by: divisor_value, the longest sequence there can be, or the "
        "sequence's own length, in tokens.",
    )
    divisor_value: PositiveFloat | None = Field(
        None,
        description="Used when divisor is constant; unset: the longest sequence + 11, as the published code has it.",
    )
    concat_ua: bool = Field(False, description="Feed [u, a, u*a] to the output projection instead of u*a.")
    position_bias: bool = Field(True, description="Learn a bias for each distance of two tokens.")
    time_bias: bool = Field(False, description="Learn a bias for each bucket of the time between two tokens.")
    time_buckets: Annotated[int, Field(ge=1, le=255)] = Field(128, description="Buckets of floor(ln(dt)/0.301).")

    @model_validator(mode="after")
    def _softmax_has_no_bias(self):
        if self.attention == "softmax" and (self.position_bias or self.time_bias):
            raise ValueError("attention=softmax takes no relative bias; set position_bias and time_bias to false")
        return self

    @property
    def uses_time(self) -> bool:
        return self.time_bias

    @property
    def length_leak(self) -> str:
        return "divisor=actual_len" if self.divisor == "actual_len" else ""

    def cost(self, dim: int, max_length: int, element_bytes: int) -> TowerCost:
        """W_uvqk [D, 2 H (V + Q)], W_o [H V or 3 H V, D] and its bias, relative biases (Eq. 1-3)."""
        HQ, HV = self.heads * self.qk_dim, self.heads * self.v_dim
        gated = HV * (3 if self.concat_ua else 1)
        matrices = dim * (2 * HV + 2 * HQ) + gated * dim
        biases = (2 * max_length - 1) * self.position_bias + (self.time_buckets + 1) * self.time_bias
        # The input, U V Q K before and after SiLU, attention's output. Where W_o reads three parts, also the norm of
        # that output, what enters W_o, and dropout's mask, a byte an element on CUDA.
        activations = element_bytes * (dim + 2 * (2 * HQ + 2 * HV) + HV)
        if self.concat_ua:
            activations += element_bytes * (HV + gated) + gated
        return TowerCost(
            parameters=self.layers * (matrices + dim + biases),
            token_flops=self.layers * 2 * matrices,
            score_flops=self.layers * 2 * (HQ + HV),
            kept_bytes=self.layers * activations,
        )


class SASRecConfig(TowerConfig):
    """SASRec (arXiv 1808.09781), the softmax-attention baseline."""

    kind: Literal["sasrec"] = "sasrec"
    layers: Layers = 2
    heads: Heads = 1
    ffn_dim: Count = Field(50, description="Hidden width of the feed-forward part.")
    dropout: Probability = Field(
        0.2, description="Of attention's weights and output, and of both halves of the feed-forward part."
    )

    def check_width(self, dim: int) -> None:
        if dim % self.heads:
            raise ValueError(f"dim={dim} is not divisible by tower.heads={self.heads}")

    def cost(self, dim: int, max_length: int, element_bytes: int) -> TowerCost:
        """Four D x D matrices of attention, two of the feed-forward; biases; two norms a layer and one at the end."""
        D, F = dim, self.ffn_dim
        matrices = 4 * D * D + 2 * D * F
        # 33 d in bf16 for F = 4 D, as arXiv 2402.17152 counts: input and its norm, q k v, attention's output, the
        # feed-forward's input and its norm (2 bytes each), a dropout mask (1), two hidden states of the feed-forward.
        activations = element_bytes * (8 * D + 2 * F) + D
        return TowerCost(
            parameters=self.layers * (matrices + 5 * D + F + 4 * D) + 2 * D,
            token_flops=self.layers * 2 * matrices,
            score_flops=self.layers * 4 * D,
            kept_bytes=self.layers * activations,
        )


class STUConfig(TowerConfig):
    """HSTU, production form (STULayer of meta-recsys/generative-recommenders)."""

    masks_candidates: ClassVar[bool] = True

    kind: Literal["stu"] = "stu"
    layers: Layers = 3
    heads: Heads = 4
    qk_dim: Count = Field(64, description="Query and key width per head.")
    v_dim: Count = Field(64, description="Value and gate width per head.")
    dropout: Probability = Field(0.3, description="Of the input of the output projection.")
    group_norm: bool = Field(False, description="Normalise the attention of each head by itself.")
    divisor: PositiveFloat | None = Field(
        None,
        description="What SiLU attention is divided by, for every sequence; unset: the longest sequence the tower is "
        "built for. Never the longest of a batch: an example's output does not depend on its batch mates.",
    )
    max_attn_len: NonNegativeInt = Field(0, description="Tokens before itself that a token sees; 0 is all.")
    min_full_attn_seq_len: NonNegativeInt = Field(
        0, description="Newest tokens of the history, beside the candidates, that see everything despite max_attn_len."
    )
    recompute: Literal["gate", "layer"] = Field(
        "gate",
        description="What the backward pass builds again instead of keeping: the normalised input and the input of the "
        "output projection; or those and u, v, q, k. Attention itself is never computed twice.",
    )

    @model_validator(mode="after")
    def _full_attention_widens_a_window(self):
        if self.min_full_attn_seq_len and not self.max_attn_len:
            raise ValueError(
                f"min_full_attn_seq_len={self.min_full_attn_seq_len} widens the window of max_attn_len, which is 0: "
                "set max_attn_len, or drop both"
            )
        return self

    @property
    def length_leak(self) -> str:
        return "min_full_attn_seq_len" if self.min_full_attn_seq_len else ""

    def cost(self, dim: int, max_length: int, element_bytes: int) -> TowerCost:
        """W_uvqk [D, 2 H (V + Q)] and its bias, W_o [3 H V, D], two norms."""
        HQ, HV = self.heads * self.qk_dim, self.heads * self.v_dim
        matrices = dim * (2 * HV + 2 * HQ) + 3 * HV * dim
        norms = 2 * dim + 2 * (self.heads if self.group_norm else HV)
        # arXiv 2402.17152, section 3.4: 2d + 2d + 4 h d_qk + 4 h d_v + 2 h d_v bytes in bf16 for the input, its norm,
        # U V Q K and attention's output; with recompute=layer, U V Q K and the norm are built again.
        activations = 2 * dim + 2 * HQ + 3 * HV if self.recompute == "gate" else dim + HV
        return TowerCost(
            parameters=self.layers * (matrices + 2 * HV + 2 * HQ + norms),
            token_flops=self.layers * 2 * matrices,
            score_flops=self.layers * 2 * (HQ + HV),
            kept_bytes=self.layers * element_bytes * activations,
        )


# Layers, heads, key and value heads, feed-forward width, of arXiv 2307.09288 (Table 1) and the published checkpoints.
LLAMA_SIZES: dict[str, dict[str, int]] = {
    "7b": {"dim": 4096, "layers": 32, "heads": 32, "kv_heads": 32, "ffn_dim": 11008},
    "13b": {"dim": 5120, "layers": 40, "heads": 40, "kv_heads": 40, "ffn_dim": 13824},
    "34b": {"dim": 8192, "layers": 48, "heads": 64, "kv_heads": 8, "ffn_dim": 22016},
    "70b": {"dim": 8192, "layers": 80, "heads": 64, "kv_heads": 8, "ffn_dim": 28672},
}


class LlamaConfig(TowerConfig):
    """The Transformer of Llama 2 (arXiv 2307.09288, section 2.2): RMSNorm, rotary positions, SwiGLU, shared keys."""

    masks_candidates: ClassVar[bool] = True

    kind: Literal["llama"] = "llama"
    size: Literal["7b", "13b", "34b", "70b"] | None = Field(
        None, description="Sets layers, heads, kv_heads and ffn_dim to those of a published model; model.dim must fit."
    )
    layers: Layers = 2
    heads: Heads = 2
    kv_heads: Count | None = Field(
        None, description="Heads of keys and values, each shared by heads / kv_heads heads of queries; unset: heads."
    )
    ffn_dim: Count = Field(128, description="Hidden width of the gated feed-forward part.")
    rope_theta: PositiveFloat = Field(10000.0, description="Base of the frequencies of rotary positions.")
    norm_eps: PositiveFloat = Field(1e-5, description="Added to the mean square in RMSNorm.")
    dropout: Probability = Field(
        0.0, description="Of what attention and the feed-forward part add to a token; the published models have none."
    )

    @model_validator(mode="before")
    @classmethod
    def _filled_by_size(cls, given: Any) -> Any:
        sizes = LLAMA_SIZES.get(given.get("size") or "") if isinstance(given, dict) else None
        if sizes is None:
            return given
        filled = {key: value for key, value in sizes.items() if key != "dim"}
        if differing := [key for key in filled if key in given and given[key] != filled[key]]:
            key = differing[0]
            raise ValueError(f"size={given['size']} has {key}={filled[key]}, not {given[key]}: unset one of the two")
        return {**given, **filled}

    @model_validator(mode="after")
    def _keys_are_shared_evenly(self):
        if self.heads % self.key_heads:
            raise ValueError(f"kv_heads={self.kv_heads} does not divide heads={self.heads}")
        return self

    @property
    def key_heads(self) -> int:
        """G: heads of keys and values."""
        return self.kv_heads or self.heads

    @property
    def tensor_parallel_sizes(self) -> dict[str, int]:
        return {"heads": self.heads, "kv_heads": self.key_heads, "ffn_dim": self.ffn_dim}

    def check_width(self, dim: int) -> None:
        if self.size is not None and dim != LLAMA_SIZES[self.size]["dim"]:
            raise ValueError(f"dim={dim} is not that of tower.size={self.size}, {LLAMA_SIZES[self.size]['dim']}")
        if dim % (2 * self.heads):
            raise ValueError(
                f"dim={dim} is not divisible by twice tower.heads={self.heads}: rotary positions take pairs"
            )

    def cost(self, dim: int, max_length: int, element_bytes: int) -> TowerCost:
        """W_q and W_o [D, D], W_k and W_v [D, G Q], three matrices [D, F]; two norms a layer and one at the end.

        kept_bytes: as torch composes a layer. The C++ of float32 on CPU keeps 5 D + 3 G Q + 2 F elements.
        """
        D, F = dim, self.ffn_dim
        GQ = D // self.heads * self.key_heads
        matrices = 2 * D * D + 2 * D * GQ + 3 * D * F
        # The inputs of two norms and their outputs, q and k turned, v, attention's output, what enters and leaves SiLU,
        # what it is multiplied with, and the product; the masks of two dropouts, a byte an element on CUDA.
        activations = element_bytes * (4 * D + 2 * D + 2 * GQ + 4 * F) + 2 * D * (self.dropout > 0)
        return TowerCost(
            parameters=self.layers * (matrices + 2 * D) + D,
            token_flops=self.layers * 2 * matrices,
            score_flops=self.layers * 4 * D,
            kept_bytes=self.layers * activations,
        )


# kind -> its config and the module that it configures: `Module(config, dim=, max_length=)`.
TOWERS = Registry("tower")
TOWERS.add(HSTUConfig, "gr.towers.hstu:HSTU")
TOWERS.add(SASRecConfig, "gr.towers.sasrec:SASRec")
TOWERS.add(STUConfig, "gr.towers.stu:STU")
TOWERS.add(LlamaConfig, "gr.towers.llama:Llama")


def check_split(tower: TowerConfig | None, ranks: int) -> None:
    """Raises ConfigError where tensor parallelism over `ranks` cannot split the tower. None: a model without one."""
    sizes = {} if tower is None else tower.tensor_parallel_sizes
    if not sizes:
        raise ConfigError(f"dense.tensor_parallel={ranks}: only tower.kind=llama can be split; set it to 1")
    for name, size in sizes.items():
        if size % ranks:
            raise ConfigError(
                f"dense.tensor_parallel={ranks} does not divide tower.{name}={size}: set it to a common divisor of "
                + ", ".join(f"{name}={size}" for name, size in sizes.items())
            )
