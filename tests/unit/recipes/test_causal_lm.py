"""A causal language model from text to generated tokens, by the commands that a user types."""

from pathlib import Path

import pytest

import gr
from gr.cli import main
from gr.config import dump_config
from gr.models.imported import import_llama
from tests.support.llama import hf_llama
from tests.support.text import tiny_causal, write_text, write_tokenizer

COLOURS = ["red", "green", "blue", "pink", "grey"]


@pytest.mark.slow
def test_from_text_to_the_text_that_follows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """After 60 steps on a circle of five words, the model goes on with it."""
    tokenizer = write_tokenizer(tmp_path / "tokenizer.json", COLOURS)
    (tmp_path / "circle.txt").write_text(f"{' '.join(COLOURS * 3)}\n" * 40)
    data = tmp_path / "data"
    arguments = ["--source", str(tmp_path / "circle.txt"), "--tokenizer", str(tokenizer), "--bos", "<s>"]
    assert main(["prepare", "text", *arguments, "--out", str(data)]) == 0
    assert "40 documents, 640 tokens of 8 ids" in capsys.readouterr().out
    config = tiny_causal(
        data,
        tmp_path / "run",
        model={"vocabulary": 8, "dim": 16},
        optimizer={"kind": "adamw", "lr": 2e-2, "schedule": {"kind": "cosine", "warmup_steps": 5}},
        trainer={"steps": 60, "global_batch_size": 4},
        data={"path": str(data), "max_length": 16},
        evaluation={"path": str(data), "every": 30, "global_batch_size": 4},
    )
    config = config.model_copy(update={"trainer": config.trainer.model_copy(update={"steps": None, "epochs": 7})})
    (tmp_path / "run.yaml").write_text(dump_config(config))
    assert main(["train", str(tmp_path / "run.yaml")]) == 0
    assert "perplexity" in capsys.readouterr().out
    saved = gr.load(tmp_path / "run")
    assert saved.write("red green blue", 5) == "pink grey red green blue"


@pytest.mark.slow
def test_training_goes_on_from_imported_weights(tmp_path: Path) -> None:
    hf_llama(dim=16, heads=2, kv_heads=1, vocab_size=23).save_pretrained(tmp_path / "theirs")
    import_llama(tmp_path / "theirs", tmp_path / "imported")
    saved = gr.load(tmp_path / "imported")
    folder = write_text(tmp_path / "data", [[1, 2, 3, 4, 5, 6, 7, 8, 9]] * 8)
    config = tiny_causal(
        folder,
        tmp_path / "run",
        model=saved.config.model.model_dump(),  # type: ignore[attr-defined]
        optimizer={"kind": "adamw", "lr": 1e-9},
        checkpoint={"load_from": str(tmp_path / "imported")},
    )
    assert gr.train(config) is not None
    own, imported = (gr.load(tmp_path / name).model.state_dict() for name in ("run", "imported"))
    assert max(float((own[name] - weight).abs().max()) for name, weight in imported.items()) < 1e-6
