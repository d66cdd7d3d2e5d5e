"""STU, the production form of the HSTU layer, as a user configures it. No torch."""

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from gr.config.section import PositiveFloat, Probability, Section


class STUConfig(Section):
    """HSTU, production form (STULayer of meta-recsys/generative-recommenders)."""

    kind: Literal["stu"] = "stu"
    layers: PositiveInt = 3
    heads: PositiveInt = 4
    qk_dim: PositiveInt = Field(64, description="Query and key width per head.")
    v_dim: PositiveInt = Field(64, description="Value and gate width per head.")
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
