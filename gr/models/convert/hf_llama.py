"""Weights of Hugging Face's LlamaForCausalLM to gr's CausalLM and back, bit for bit, a tensor at a time.

The names are Hugging Face's own below `model.`. Meta's own files interleave the pairs of rotary positions, (0, 1),
(2, 3), ..., where Hugging Face and gr have (0, Q/2), (1, Q/2 + 1), ...: the rows of W_q and W_k change places.
Q width of a head.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from gr.config.causal_lm import CausalLMConfig
from gr.config.towers import LLAMA_SIZES, LlamaConfig
from gr.errors import CheckpointError, ConfigError
from gr.files import is_transient, read_json, write_json
from gr.schema import FORMAT_VERSION, TOKENIZER_FILE, TextSchema

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
TURNED = ("q_proj.weight", "k_proj.weight")
NOT_WEIGHTS = "rotary_emb.inv_freq"  # a constant that older releases saved
NAMES_SHOWN = 5
SOURCE = "name a folder of save_pretrained()"


def read_config(folder: Path) -> dict[str, Any]:
    """config.json. Raises CheckpointError where it is not there, or is of a model that gr's Llama is not."""
    fields = read_json(folder / CONFIG, CheckpointError, SOURCE)
    expected = {
        "model_type": ("llama", None),
        "hidden_act": ("silu", "silu"),
        "attention_bias": (False, False),
        "mlp_bias": (False, False),
    }
    for key, (value, default) in expected.items():
        if fields.get(key, default) != value:
            raise CheckpointError(f"{folder / CONFIG}: {key}={fields.get(key)!r}, and gr reads only {key}={value!r}")
    rope = fields.get("rope_parameters") or {}
    scaling = fields.get("rope_scaling") or rope
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind != "default":
        raise CheckpointError(f"{folder / CONFIG}: rotary positions are scaled ({kind}), which gr does not do")
    required = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    if absent := [key for key in required if type(fields.get(key)) is not int]:
        raise CheckpointError(f"{folder / CONFIG}: has no number {absent[0]}")
    width = fields["hidden_size"] // fields["num_attention_heads"]
    if fields.get("head_dim") not in (None, width):
        raise CheckpointError(
            f"{folder / CONFIG}: head_dim={fields['head_dim']}, and gr has hidden_size / heads = {width}"
        )
    return fields


def model_section(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The section `model` of gr's configuration, from config.json."""
    rope = fields.get("rope_parameters") or {}
    tower: dict[str, Any] = {
        "kind": "llama",
        "layers": fields["num_hidden_layers"],
        "heads": fields["num_attention_heads"],
        "kv_heads": fields.get("num_key_value_heads") or fields["num_attention_heads"],
        "ffn_dim": fields["intermediate_size"],
        "rope_theta": float(fields.get("rope_theta") or rope.get("rope_theta") or 10000.0),
        "norm_eps": float(fields.get("rms_norm_eps", 1e-6)),
    }
    shape = {key: tower[key] for key in ("layers", "heads", "kv_heads", "ffn_dim")}
    for size, published in LLAMA_SIZES.items():
        if published == {"dim": fields["hidden_size"], **shape}:
            tower["size"] = size
    return {"vocabulary": fields["vocab_size"], "dim": fields["hidden_size"], "tower": tower}


def hf_config(config: CausalLMConfig, schema: TextSchema, dtype: torch.dtype) -> dict[str, Any]:
    """config.json of a model. Raises ConfigError for another tower than Llama."""
    tower = config.model.tower
    if not isinstance(tower, LlamaConfig):
        raise ConfigError(
            f"Hugging Face has no tower {tower.kind}: only models with tower.kind=llama are written for it"
        )
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.model.vocabulary,
        "hidden_size": config.model.dim,
        "intermediate_size": tower.ffn_dim,
        "num_hidden_layers": tower.layers,
        "num_attention_heads": tower.heads,
        "num_key_value_heads": tower.key_heads,
        "rms_norm_eps": tower.norm_eps,
        "rope_theta": tower.rope_theta,
        "max_position_embeddings": config.data.max_length,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": schema.bos,
        "eos_token_id": schema.eos,
        "pad_token_id": None,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def hf_name(name: str) -> str:
    """Hugging Face's name of a parameter of CausalLM."""
    return name if name.startswith("lm_head.") else f"model.{name.removeprefix('tower.')}"


def from_interleaved(weight_OD: Tensor, width: int) -> Tensor:
    """W_q or W_k as gr and Hugging Face have it, from Meta's: row 2 i of a head goes to i, row 2 i + 1 to Q/2 + i."""
    return weight_OD.unflatten(0, (-1, width // 2, 2)).transpose(1, 2).reshape(weight_OD.shape)


def to_interleaved(weight_OD: Tensor, width: int) -> Tensor:
    """The inverse of from_interleaved."""
    return weight_OD.unflatten(0, (-1, 2, width // 2)).transpose(1, 2).reshape(weight_OD.shape)


@torch.no_grad()
def load_weights(folder: Path, model: nn.Module, *, tied: bool = False, interleaved: bool = False) -> int:
    """Fills a CausalLM from model.safetensors, or from the files of its index, and returns the bytes that were read.

    Memory beside the model: one tensor. tied: the vectors of what goes in are also those of what comes out.
    interleaved: W_q and W_k are Meta's. Raises CheckpointError where a file or tensor is missing, of another shape, or
    not known.
    """
    files = _weight_map(folder)
    parameters = {hf_name(name): parameter for name, parameter in model.named_parameters()}
    sources = {name: name for name in parameters}
    if tied and "lm_head.weight" not in files:
        sources["lm_head.weight"] = "model.embed_tokens.weight"
    unknown = [name for name in files if name not in parameters and not name.endswith(NOT_WEIGHTS)]
    missing = [name for name, source in sources.items() if source not in files]
    if missing or unknown:
        shown = [*(f"{name} is missing" for name in missing), *(f"{name} is unknown" for name in unknown)]
        raise CheckpointError(f"{folder}: does not fit the model: {_first(shown)}")
    read = 0
    with ExitStack() as stack:
        opened = {file: stack.enter_context(_opened(folder / file)) for file in sorted(set(files.values()))}
        for name, parameter in parameters.items():
            file = files[sources[name]]
            try:
                tensor = opened[file].get_tensor(sources[name])
            except SafetensorError as error:
                raise CheckpointError(f"{folder / file}: {sources[name]} cannot be read: {error}") from None
            if tensor.shape != parameter.shape:
                raise CheckpointError(
                    f"{folder / file}: {name} is {list(tensor.shape)}, by {CONFIG} it is {list(parameter.shape)}"
                )
            read += tensor.nbytes
            if interleaved and name.endswith(TURNED):
                tensor = from_interleaved(tensor, model.get_submodule("tower").width)  # type: ignore[arg-type]
            parameter.copy_(tensor)
    return read


def save_weights(model: nn.Module, folder: Path, *, dtype: torch.dtype, shard_bytes: int) -> int:
    """Writes model.safetensors, or files of at most `shard_bytes` (or one tensor) and their index; returns the bytes.

    Memory beside the model: one file. dtype: of the tensors written.
    """
    shards = list(_shards(dict(model.named_parameters()), dtype, shard_bytes))
    names: dict[str, str] = {}
    total = 0
    for number, names_of_shard in enumerate(shards, 1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {
            hf_name(name): model.get_parameter(name).detach().to("cpu", dtype).contiguous() for name in names_of_shard
        }
        total += sum(tensor.nbytes for tensor in tensors.values())
        names |= dict.fromkeys(tensors, file)
        save_file(tensors, folder / file, metadata={"format": "pt"})
    if len(shards) > 1:
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(names.items()))})
    return total


def text_schema(fields: Mapping[str, Any], folder: Path, tokenizer: str | None) -> TextSchema:
    """schema.json of an imported model: a text folder without documents. tokenizer: digest of its tokenizer.json."""
    bos, eos = fields.get("bos_token_id"), fields.get("eos_token_id")
    return TextSchema(
        format_version=FORMAT_VERSION,
        kind="text",
        name=folder.name or "imported",
        vocabulary=fields["vocab_size"],
        documents=0,
        tokens=0,
        bos=bos if isinstance(bos, int) else None,
        eos=eos if isinstance(eos, int) else None,
        tokenizer=tokenizer,
        source=f"{folder} ({CONFIG})",
    )


def tokenizer_of(folder: Path) -> bytes | None:
    """The content of tokenizer.json, None where there is none."""
    path = folder / TOKENIZER_FILE
    return path.read_bytes() if path.is_file() else None


def _weight_map(folder: Path) -> dict[str, str]:
    """The file of each tensor, by the tensor's name."""
    if (folder / INDEX).is_file():
        names = read_json(folder / INDEX, CheckpointError, SOURCE).get("weight_map")
        if not isinstance(names, dict) or not all(
            isinstance(file, str) and Path(file).name == file for file in names.values()
        ):
            raise CheckpointError(f"{folder / INDEX}: has no weight_map of tensors and files in its folder")
        return names
    if not (folder / SINGLE).is_file():
        raise CheckpointError(f"{folder}: has neither {INDEX} nor {SINGLE}: {SOURCE}")
    with _opened(folder / SINGLE) as file:
        return dict.fromkeys(file.keys(), SINGLE)


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise CheckpointError(f"{path}: is missing, and {INDEX} names it: copy the whole folder again") from None
    except (SafetensorError, OSError) as error:
        if is_transient(error):
            raise
        raise CheckpointError(f"{path}: is no whole safetensors file: {error}") from None


def _shards(parameters: Mapping[str, Tensor], dtype: torch.dtype, shard_bytes: int) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name, parameter in parameters.items():
        own = parameter.numel() * dtype.itemsize
        if names and size + own > shard_bytes:
            yield names
            names, size = [], 0
        names.append(name)
        size += own
    yield names


def _first(faults: list[str]) -> str:
    more = f" and {len(faults) - NAMES_SHOWN} more" if len(faults) > NAMES_SHOWN else ""
    return f"{'; '.join(faults[:NAMES_SHOWN])}{more}"
