"""Tensors in safetensors files whose data begin at multiples of 64 bytes, mapped into memory and never copied.

safetensors aligns to 4 or 8 bytes and lets no byte between two tensors unnamed. So the header ends with blanks, as its
format allows, and the bytes before a tensor are a tensor of their own, padding.N: any reader of safetensors reads it.
"""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gr.errors import ServingError

ALIGNMENT = 64  # bytes: a cache line, and the widest vector
_PADDING = "padding."
_DTYPES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int32: "I32",
    torch.int64: "I64",
}


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes a new file, and waits until it is on disk."""
    header: dict[str, object] = {}
    end = 0
    blocks: list[Tensor | int] = []  # a tensor, or so many bytes of padding
    for name, tensor in tensors.items():
        if gap := -end % ALIGNMENT:
            header[f"{_PADDING}{len(header)}"] = {"dtype": "U8", "shape": [gap], "data_offsets": [end, end + gap]}
            blocks.append(gap)
            end += gap
        offsets = [end, end + tensor.nbytes]
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        blocks.append(tensor)
        end += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for block in blocks:
            file.write(bytes(block) if isinstance(block, int) else _bytes_of(block))
        file.flush()
        os.fsync(file.fileno())


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def map_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, mapped: their pages come in as they are read. Raises ServingError for any other file."""
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys() if not name.startswith(_PADDING)}  # noqa: SIM118
    except SafetensorError as error:
        raise ServingError(f"{path}: is no safetensors file ({error})") from None
    for name in _unaligned(tensors):
        raise ServingError(
            f"{path}: tensor {name} is not at a multiple of {ALIGNMENT} bytes: gr did not write the file"
        )
    return tensors


def _unaligned(tensors: Mapping[str, Tensor]) -> Iterator[str]:
    return (name for name, tensor in tensors.items() if tensor.numel() and tensor.data_ptr() % ALIGNMENT)
