"""The causal language model: token vectors -> tower -> loss of the next token. Single device, no tables.

B pieces of documents, T packed tokens, D width, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gr.batch import TokenBatch
from gr.config.causal_lm import LOSS_CHUNK, CausalLMConfig
from gr.errors import ConfigError
from gr.ops.linear_cross_entropy import linear_cross_entropy
from gr.sequence import JaggedSequence
from gr.towers import build_tower
from gr.towers.llama import Llama

INIT_STD = 0.02


class VocabularyHead(nn.Linear):
    """[T, D] -> logits [T, V]; with targets, the loss of each token [T], in nats."""

    def forward(self, hidden_TD: Tensor, targets_T: Tensor | None = None) -> Tensor:
        if targets_T is None:
            return super().forward(hidden_TD)
        # The logits exist for a chunk of tokens at a time, in float32.
        return linear_cross_entropy(hidden_TD, self.weight.float(), targets_T, scale=1.0, chunk=LOSS_CHUNK)


class CausalLM(nn.Module):
    """p(next token | those before it in its document), trained at every token. Build it on meta."""

    fsdp_modules = ("tower", "embed_tokens", "lm_head")

    def __init__(self, config: CausalLMConfig, schema: Any) -> None:
        """schema: unused, since the configuration has every size."""
        super().__init__()
        self.max_length, self.precision = config.data.max_length, config.trainer.precision
        dim, vocabulary = config.model.dim, config.model.vocabulary
        self.embed_tokens = nn.Embedding(vocabulary, dim)
        self.tower = build_tower(config.model.tower, dim=dim, max_length=self.max_length)
        self.lm_head = VocabularyHead(dim, vocabulary, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for module in (self.embed_tokens, self.lm_head):
            nn.init.normal_(module.weight, std=INIT_STD)

    def forward(self, batch: TokenBatch) -> Tensor:
        """Sum of -log p(next token) over the scored tokens, a scalar in nats."""
        hidden_TD = self.hidden(batch.ids_T, batch.offsets_B1)[batch.scored_T].float()
        targets = batch.target_ids_T[batch.scored_T]
        return self.lm_head(hidden_TD, targets).sum()

    def hidden(self, ids_T: Tensor, offsets_B1: Tensor) -> Tensor:
        """The tower's output, [T, D]."""
        return self._autocast(self.tower, self._sequence(ids_T, offsets_B1)).values_TD

    def logits(self, ids_T: Tensor, offsets_B1: Tensor) -> Tensor:
        """[T, V], of the token that follows each. ids_T: int64. offsets_B1: int64, the pieces of documents."""
        return self.lm_head(self.hidden(ids_T, offsets_B1).to(self.lm_head.weight.dtype))

    @torch.no_grad()
    def generate(self, ids_T: Tensor, offsets_B1: Tensor, *, tokens: int, eos: int | None = None) -> list[list[int]]:
        """The most probable `tokens` tokens after each prompt, one after another, through a cache of keys and values.

        ids_T, offsets_B1: the prompts, none of them empty. eos: the id after which a prompt's tokens end; it is the
        last of them. Raises ConfigError for a tower without a cache, an empty prompt, or more tokens than
        data.max_length.
        """
        if not isinstance(self.tower, Llama):
            raise ConfigError("tokens are generated through a cache of keys and values: only tower.kind=llama has one")
        lengths_B = offsets_B1.diff()
        if not len(lengths_B) or int(lengths_B.min()) == 0:
            raise ConfigError("a prompt has no tokens: begin it with the tokenizer's first token, bos")
        longest = int(lengths_B.max())
        if longest + tokens > self.max_length:
            raise ConfigError(
                f"a prompt of {longest} tokens and {tokens} more are beyond data.max_length={self.max_length}"
            )
        sequence, cache = self._autocast(
            self.tower.prefill, self._sequence(ids_T, offsets_B1), capacity=self.max_length
        )
        newest_BD = sequence.values_TD[offsets_B1[1:] - 1]
        generated: list[list[int]] = [[] for _ in range(len(lengths_B))]
        for step in range(tokens):
            ids_B = self.lm_head(newest_BD.to(self.lm_head.weight.dtype)).argmax(dim=-1)
            for own, token in zip(generated, ids_B.tolist(), strict=True):
                if eos is None or not own or own[-1] != eos:
                    own.append(token)
            if step + 1 == tokens or (eos is not None and all(own[-1] == eos for own in generated)):
                break
            newest_BD, cache = self._autocast(self.tower.decode, F.embedding(ids_B, self.embed_tokens.weight), cache)
        return generated

    def _sequence(self, ids_T: Tensor, offsets_B1: Tensor) -> JaggedSequence:
        return JaggedSequence(self.embed_tokens(ids_T), offsets_B1, self.max_length)

    def _autocast(self, run: Any, *arguments: Any, **named: Any) -> Any:
        with torch.autocast(self.lm_head.weight.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            return run(*arguments, **named)
