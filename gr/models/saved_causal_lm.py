"""A saved causal language model, asked in ids of tokens or, where its tokenizer was kept, in text."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from gr.errors import ConfigError, DataError, InstallError
from gr.models.saved import Saved
from gr.schema import TOKENIZER_FILE


class SavedCausalLM(Saved):
    """Continues prompts."""

    @torch.no_grad()
    def logits(self, ids: Sequence[int]) -> Tensor:
        """float32 [T, V] of the token that follows each of T."""
        model: Any = self.model
        return model.logits(*self._packed([ids])).float().cpu()

    def generate(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
        """The most probable tokens after each prompt, at most `tokens`; they end with the schema's eos, if it has one.

        Raises ConfigError for a prompt that is empty or too long, or an id that is none.
        """
        model: Any = self.model
        return model.generate(*self._packed(prompts), tokens=tokens, eos=self.schema.eos)

    def write(self, prompt: str, tokens: int) -> str:
        """The text of at most `tokens` tokens after `prompt`. Raises DataError where the tokenizer was not kept."""
        first = [] if self.schema.bos is None else [self.schema.bos]
        ids = [*first, *self.tokenizer.encode(prompt, add_special_tokens=False).ids]
        return self.tokenizer.decode(self.generate([ids], tokens)[0])

    @cached_property
    def tokenizer(self) -> Any:
        path = self.folder / TOKENIZER_FILE
        if not path.is_file():
            raise DataError(f"{self.folder} has no {TOKENIZER_FILE}: its text was not prepared by `gr prepare text`")
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise InstallError("tokenizers is not installed: pip install 'gr[text]'") from None
        return Tokenizer.from_file(str(path))

    def _packed(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        for prompt in prompts:
            if wrong := [token for token in prompt if not 0 <= token < self.schema.vocabulary]:
                raise ConfigError(f"id {wrong[0]} is no token: there are 0 to {self.schema.vocabulary - 1}")
        ids = [token for prompt in prompts for token in prompt]
        lengths = torch.tensor([0, *map(len, prompts)], dtype=torch.int64)
        return torch.tensor(ids, dtype=torch.int64, device=self.device), lengths.cumsum(0).to(self.device)
