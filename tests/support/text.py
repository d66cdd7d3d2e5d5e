"""Small text folders, written by hand, and a small tokenizer."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gr.config.causal_lm import CausalLMConfig
from gr.schema import FORMAT_VERSION, TextSchema

VOCABULARY = 23
TOWER = {"kind": "llama", "layers": 2, "heads": 2, "kv_heads": 1, "ffn_dim": 12}


def write_text(
    folder: Path, documents: Sequence[Sequence[int]], *, prompts: Sequence[int] | None = None, rows_per_group: int = 3
) -> Path:
    """A text folder of these documents. prompts: tokens of each that are its prompt."""
    folder.mkdir(parents=True)
    columns = {"tokens": pa.array(documents, pa.list_(pa.int32())), "length": pa.array(list(map(len, documents)))}
    if prompts is not None:
        columns["prompt_length"] = pa.array(prompts)
    pq.write_table(pa.table(columns), folder / "part-00000.parquet", row_group_size=rows_per_group)
    TextSchema(
        format_version=FORMAT_VERSION,
        kind="text",
        name="tiny",
        vocabulary=VOCABULARY,
        documents=len(documents),
        tokens=sum(map(len, documents)),
        prompts=prompts is not None,
        source="test",
    ).save(folder)
    return folder


def tiny_causal(folder: Path, run_dir: Path, **sections: Any) -> CausalLMConfig:
    """A model of a few hundred parameters on a text folder."""
    whole: dict[str, Any] = {
        "run_dir": str(run_dir),
        "device": "cpu",
        "data": {"path": str(folder), "max_length": 8},
        "model": {"vocabulary": VOCABULARY, "dim": 8, "tower": TOWER},
        "task": {"kind": "causal_lm"},
        "trainer": {"steps": 2, "global_batch_size": 2, "writers": []},
    }
    for name, section in sections.items():
        whole[name] = {**whole.get(name, {}), **section}
    return CausalLMConfig.model_validate(whole)


def write_tokenizer(path: Path, words: Sequence[str]) -> Path:
    """A tokenizer.json of whole words, `<s>` and `</s>`."""
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers (extra `text`) is not installed")
    vocabulary = {word: index for index, word in enumerate(["<s>", "</s>", "<unk>", *words])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(path))
    return path
