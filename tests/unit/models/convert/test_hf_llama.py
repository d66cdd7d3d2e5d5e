"""Llamas of Hugging Face in and out: bit for bit, and every fault in one line."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import gr
from gr.cli import main
from gr.config.causal_lm import CausalLMConfig
from gr.errors import CheckpointError, ConfigError
from gr.models.convert.hf_llama import INDEX, from_interleaved, model_section, to_interleaved
from gr.models.imported import import_llama
from tests.support.llama import hf_llama, transformers

IDS = [3, 1, 4, 1, 5, 9, 2, 6]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A model of Hugging Face's, and its folder of 17 files or more."""
    model = hf_llama(dim=64, heads=4, kv_heads=2, bos_token_id=0, eos_token_id=None)
    folder = tmp_path_factory.mktemp("theirs")
    model.save_pretrained(folder, max_shard_size="8KB")
    assert len(list(folder.glob("*.safetensors"))) >= 17
    return model, folder


@pytest.mark.slow
def test_there_and_back_has_the_same_bits(theirs: tuple[Any, Path], tmp_path: Path) -> None:
    model, folder = theirs
    assert main(["import-hf", str(folder), "--out", str(tmp_path / "run")]) == 0
    saved = gr.load(tmp_path / "run")
    expected = model(torch.tensor([IDS])).logits[0].detach()
    assert float((saved.logits(IDS) - expected).abs().max()) <= 5e-7 * float(expected.abs().max())
    assert main(["export-hf", str(tmp_path / "run"), "--out", str(tmp_path / "hf"), "--shard-mb", "1"]) == 0
    again = transformers().LlamaForCausalLM.from_pretrained(tmp_path / "hf").eval()
    assert torch.equal(again(torch.tensor([IDS])).logits, model(torch.tensor([IDS])).logits)
    assert all(torch.equal(own, model.state_dict()[name]) for name, own in again.state_dict().items())
    greedy = again.generate(torch.tensor([IDS]), max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert saved.generate([IDS], 12)[0] == greedy[0, len(IDS) :].tolist()


def test_reading_takes_the_bytes_of_the_tensors(theirs: tuple[Any, Path], tmp_path: Path) -> None:
    model, folder = theirs
    _, read = import_llama(folder, tmp_path / "run")
    assert read == sum(parameter.nbytes for parameter in model.parameters())
    with pytest.raises(ConfigError, match="has a checkpoint already"):
        import_llama(folder, tmp_path / "run")


def test_interleaved_rows_are_put_apart(theirs: tuple[Any, Path], tmp_path: Path) -> None:
    weight_OD = torch.arange(8.0)[:, None]  # two heads of width 4
    assert from_interleaved(weight_OD, 4).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert torch.equal(to_interleaved(from_interleaved(weight_OD, 4), 4), weight_OD)
    model, _ = theirs
    metas = hf_llama(dim=64, heads=4, kv_heads=2)
    metas.load_state_dict(
        {
            name: to_interleaved(weight, 16) if name.endswith(("q_proj.weight", "k_proj.weight")) else weight
            for name, weight in model.state_dict().items()
        }
    )
    metas.save_pretrained(tmp_path / "metas")
    import_llama(tmp_path / "metas", tmp_path / "run", interleaved=True)
    state = gr.load(tmp_path / "run").model.state_dict()
    name = "layers.1.self_attn.k_proj.weight"
    assert torch.equal(state[f"tower.{name}"], model.state_dict()[f"model.{name}"])


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("shard", r"model-00003-of-\d+.safetensors: is missing, and model.safetensors.index.json names it"),
        ("cut", r"model-00003-of-\d+.safetensors: is no whole safetensors file"),
        ("shape", r"model.embed_tokens.weight is \[91, 64\], by config.json it is \[92, 64\]"),
        ("layers", r"does not fit the model: model.layers.2.input_layernorm.weight is missing.* and 4 more"),
        ("fewer", r"does not fit the model: model.layers.1.*is unknown"),
        ("kind", r"config.json: model_type='mistral', and gr reads only model_type='llama'"),
        ("rope", r"rotary positions are scaled \(yarn\)"),
        ("no index", r"has neither model.safetensors.index.json nor model.safetensors"),
        ("no config", r"config.json: cannot be read"),
        ("path", r"has no weight_map of tensors and files in its folder"),
    ],
)
def test_faults_are_one_line(theirs: tuple[Any, Path], tmp_path: Path, fault: str, message: str) -> None:
    folder = tmp_path / "theirs"
    shutil.copytree(theirs[1], folder)
    third = next(folder.glob("model-00003-of-*.safetensors"))
    fields = json.loads((folder / "config.json").read_text())
    changes = {
        "shape": {"vocab_size": 92},
        "layers": {"num_hidden_layers": 3},
        "fewer": {"num_hidden_layers": 1},
        "kind": {"model_type": "mistral"},
        "rope": {"rope_parameters": {"rope_type": "yarn"}},
    }
    (folder / "config.json").write_text(json.dumps(fields | changes.get(fault, {})))
    match fault:
        case "shard":
            third.unlink()
        case "cut":
            third.write_bytes(third.read_bytes()[:-8])
        case "no index":
            (folder / INDEX).unlink()
        case "no config":
            (folder / "config.json").unlink()
        case "path":
            (folder / INDEX).write_text('{"weight_map": {"lm_head.weight": "../x.safetensors"}}')
    with pytest.raises(CheckpointError, match=message) as error:
        import_llama(folder, tmp_path / "run")
    assert "\n" not in str(error.value)


def test_a_published_size_is_known_by_its_shape() -> None:
    fields = {
        "vocab_size": 32000,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
    }
    whole = {
        "run_dir": "runs",
        "data": {"path": "data"},
        "task": {"kind": "causal_lm"},
        "trainer": {"epochs": 1},
        "model": model_section(fields),
    }
    assert CausalLMConfig.model_validate(whole).model.tower.size == "70b"  # type: ignore[attr-defined]
