"""A checkpoint of weights that came from elsewhere, as gr.load, `checkpoint.load_from` and `gr export-hf` read it."""

import hashlib
import warnings
from pathlib import Path

from gr.checkpoint import CheckpointStore, ModelState
from gr.checkpoint.layout import CHECKPOINTS, CheckpointFolder
from gr.config import dump_config
from gr.config.causal_lm import CausalLMConfig
from gr.embeddings import TableOptimizer
from gr.errors import ConfigError
from gr.models import build_model
from gr.models.convert import hf_llama
from gr.models.dense import dense_parameters
from gr.models.saved import ALONE
from gr.schema import SCHEMA_FILE, TOKENIZER_FILE


def import_llama(folder: Path, run_dir: Path, *, interleaved: bool = False) -> tuple[Path, int]:
    """Reads a Llama of Hugging Face into run_dir/checkpoints/step-00000000; returns that folder and the bytes read.

    The optimizer's state is not there: a run that starts from it with checkpoint.load_from begins at step 0.
    Raises CheckpointError where the folder is not whole, ConfigError where run_dir has a checkpoint.
    """
    checkpoints = CheckpointFolder(run_dir / CHECKPOINTS)
    if checkpoints.steps():
        raise ConfigError(f"{run_dir}: has a checkpoint already; name another folder with --out")
    fields = hf_llama.read_config(folder)
    path = checkpoints.final(0)
    config = CausalLMConfig.model_validate(
        {
            "run_dir": str(run_dir),
            "data": {"path": str(path), "max_length": fields.get("max_position_embeddings") or 4096},
            "model": hf_llama.model_section(fields),
            "task": {"kind": "causal_lm"},
            "trainer": {"epochs": 1},
        }
    )
    tokenizer = hf_llama.tokenizer_of(folder)
    schema = hf_llama.text_schema(fields, folder, None if tokenizer is None else hashlib.sha256(tokenizer).hexdigest())
    model = build_model(config, schema).to_empty(device="cpu")
    read = hf_llama.load_weights(folder, model, tied=bool(fields.get("tie_word_embeddings")), interleaved=interleaved)
    state = ModelState(dense_parameters(model), None, TableOptimizer(model, config.embeddings, config.seed))
    artifacts = {SCHEMA_FILE: (schema.model_dump_json(indent=2) + "\n").encode()}
    if tokenizer is not None:
        artifacts[TOKENIZER_FILE] = tokenizer
    store = CheckpointStore(
        checkpoints.path, state, dump_config(config), ALONE, asynchronous=False, artifacts=artifacts
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as it is meant here
        store.save({"step": 0, "data": {}}, keep_last=1)
    return path, read
