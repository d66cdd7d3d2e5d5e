"""Bodies of the Open Inference Protocol, version 2: JSON tensors, and the extension for binary tensors behind the JSON.

https://github.com/open-inference/open-inference-protocol; the extension is that of NVIDIA Triton, OpenVINO and KServe.
A binary tensor is little-endian and row by row; of BYTES, each element is its length as uint32, then its UTF-8.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gr.errors import ServingError, nearest
from gr.serving.servable import RequestError, TensorSpec

DTYPES: dict[str, type] = {
    **{"BOOL": np.bool_, "INT32": np.int32, "INT64": np.int64, "FP32": np.float32, "FP64": np.float64},
    "BYTES": np.object_,
}
JSON_LENGTH = "Inference-Header-Content-Length"  # the header that says how many bytes of a body are JSON
_INTEGER: set[type] = {int}
_NUMBER: set[type] = {int, float}
_JSON_TYPES: dict[str, set[type]] = {
    **{"BOOL": {bool}, "INT32": _INTEGER, "INT64": _INTEGER},
    **{"FP32": _NUMBER, "FP64": _NUMBER, "BYTES": {str}},
}
DATATYPES = tuple(_JSON_TYPES)
_LENGTH = np.dtype("<u4")
_LITTLE = {name: np.dtype(kind).newbyteorder("<") for name, kind in DTYPES.items()}
# Binary tensors of these are read where they lie; truth values and text are checked byte by byte.
_ALIGNED = {name: kind for name, kind in _LITTLE.items() if kind.kind in "if" and kind.isnative}
_REPEATED_BYTES = 4096  # of JSON that is kept, at most
# Faults are counted in the memory of the server, so each list ends at its first, and names are short enough to quote.
_Shape = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(max_length=8, fail_fast=True)]
_Name = Annotated[str, Field(max_length=256)]
_TENSORS = Field(max_length=4096, fail_fast=True)


class _Part(BaseModel):
    model_config = ConfigDict(strict=True)  # and open: clients send parameters of other servers too


class _InputParameters(_Part):
    binary_data_size: Annotated[int | None, Field(ge=0)] = None


class _Input(_Part):
    name: _Name
    datatype: _Name
    shape: _Shape
    parameters: _InputParameters = _InputParameters()
    data: list[Any] | None = None


class _OutputParameters(_Part):
    binary_data: bool | None = None


class _Output(_Part):
    name: _Name
    parameters: _OutputParameters = _OutputParameters()


class _RequestParameters(_Part):
    binary_data_output: bool = False
    timeout: Annotated[int | None, Field(gt=0)] = None


class _Request(_Part):
    id: _Name | None = None
    parameters: _RequestParameters = _RequestParameters()
    inputs: Annotated[list[_Input], _TENSORS]
    outputs: Annotated[list[_Output], _TENSORS] | None = None


@dataclass(frozen=True)
class InferRequest:
    """id: of the client's. deadline_ms: from the parameter `timeout`, microseconds as in Triton. outputs: asked for,
    name -> whether binary. columns: the input tensors by name; elements of BYTES are str."""

    id: str | None
    deadline_ms: float | None
    columns: dict[str, np.ndarray]
    outputs: dict[str, bool]


def read_request(
    body: bytes, json_bytes: int, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]
) -> InferRequest:
    """json_bytes: of `body`, the rest is binary tensors. Raises RequestError, which names the field that is wrong."""
    # A client that sends binary tensors says the same of them every time: where they lie is worked out once.
    is_repeated = json_bytes <= _REPEATED_BYTES and json_bytes < len(body)
    if is_repeated:
        repeated = _repeated(body[:json_bytes])
        compared, layout = repeated.layout
        if compared is not inputs:
            layout = _layout_of(repeated.request, inputs, outputs)
            repeated.layout = inputs, layout
        if layout is not None and (columns := layout.columns(body, json_bytes)) is not None:
            return InferRequest(layout.id, layout.deadline_ms, columns, layout.asked)
        request = repeated.request
    else:
        request = _parsed(body[:json_bytes])
    columns = _columns(request.inputs, memoryview(body)[json_bytes:], {spec.name: spec for spec in inputs})
    return InferRequest(request.id, _deadline_ms(request), columns, _asked(request, outputs))


def _parsed(text: bytes) -> _Request:
    try:
        return _Request.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        raise RequestError(_path(first["loc"]) or "the body", first["msg"]) from None


def _deadline_ms(request: _Request) -> float | None:
    timeout = request.parameters.timeout
    return None if timeout is None else timeout / 1e3


def _asked(request: _Request, outputs: Sequence[TensorSpec]) -> dict[str, bool]:
    """The outputs that are asked for, and whether each is to be binary. Raises RequestError."""
    known = [spec.name for spec in outputs]
    default = request.parameters.binary_data_output
    asked = {name: default for name in known} if request.outputs is None else {}
    for number, output in enumerate(request.outputs or ()):
        if output.name not in known:
            hint = nearest(output.name, known, "outputs")
            raise RequestError(f"outputs[{number}].name", f"there is no {output.name!r}; {hint}")
        asked[output.name] = default if output.parameters.binary_data is None else output.parameters.binary_data
    return asked


@dataclass(frozen=True)
class _Layout:
    """Where the tensors of a request lie in its binary part, for requests without a fault.

    tensors: name, type, first byte and shape of each. floats: first byte, type and count of numbers that lie side by
    side. size: bytes of all tensors together.
    """

    id: str | None
    deadline_ms: float | None
    asked: dict[str, bool]
    tensors: tuple[tuple[str, np.dtype, int, tuple[int, ...]], ...]
    floats: tuple[tuple[int, np.dtype, int], ...]
    size: int

    def columns(self, body: bytes, json_bytes: int) -> dict[str, np.ndarray] | None:
        """The tensors of a body, without a copy of each; None where one has a fault, which is then looked for."""
        if len(body) - json_bytes != self.size:
            return None
        binary = np.frombuffer(body, np.uint8, offset=json_bytes).copy()  # aligned, and the body can go
        for start, dtype, count in self.floats:
            if not np.isfinite(np.ndarray(count, dtype, binary, start)).all():
                return None
        return {name: np.ndarray(shape, dtype, binary, start) for name, dtype, start, shape in self.tensors}


def _layout_of(request: _Request, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> _Layout | None:
    """None for a request with text, truth values, data in JSON, a number that is not aligned or a fault."""
    specs, at = {spec.name: spec for spec in inputs}, 0
    tensors: dict[str, tuple[str, np.dtype, int, tuple[int, ...]]] = {}
    floats: list[tuple[int, np.dtype, int]] = []
    for tensor in request.inputs:
        size, spec, count = tensor.parameters.binary_data_size, specs.get(tensor.name), math.prod(tensor.shape)
        if size is None or spec is None or tensor.data is not None or tensor.name in tensors:
            return None
        if tensor.datatype not in _ALIGNED or size != count * (dtype := _ALIGNED[tensor.datatype]).itemsize or not size:
            return None
        if at % dtype.itemsize:
            return None
        _check_form(tensor, spec)
        tensors[tensor.name] = (tensor.name, dtype, at, tuple(tensor.shape))
        if dtype.kind == "f":
            if floats and floats[-1][1] is dtype and floats[-1][0] + floats[-1][2] * dtype.itemsize == at:
                floats[-1] = (floats[-1][0], dtype, floats[-1][2] + count)
            else:
                floats.append((at, dtype, count))
        at += size
    deadline_ms, asked = _deadline_ms(request), _asked(request, outputs)
    return _Layout(request.id, deadline_ms, asked, tuple(tensors.values()), tuple(floats), at)


@dataclass
class _Repeated:
    """JSON that clients repeat. layout: the inputs that it was last compared with, and what came of it."""

    request: _Request
    layout: tuple[Sequence[TensorSpec] | None, _Layout | None] = (None, None)


@lru_cache(128)
def _repeated(text: bytes) -> _Repeated:
    """Raises RequestError."""
    return _Repeated(_parsed(text))


def _path(location: tuple[int | str, ...]) -> str:
    return "".join(f"[{each}]" if isinstance(each, int) else f".{each}" for each in location).lstrip(".")


def _columns(tensors: Sequence[_Input], binary: memoryview, specs: Mapping[str, TensorSpec]) -> dict[str, np.ndarray]:
    columns: dict[str, np.ndarray] = {}
    for number, tensor in enumerate(tensors):
        name = tensor.name
        if name not in specs:
            hint = nearest(name, list(specs), "inputs")
            raise RequestError(f"inputs[{number}].name", f"there is no {name!r}; {hint}")
        if name in columns:
            raise RequestError(name, "is there twice")
        _check_form(tensor, specs[name])
        size = tensor.parameters.binary_data_size
        if (size is None) == (tensor.data is None):
            raise RequestError(name, "needs either data or the parameter binary_data_size")
        if size is None:
            columns[name] = _from_json(tensor)
        elif size > len(binary):
            raise RequestError(name, f"binary_data_size is {size:,} bytes, and {len(binary):,} are left in the body")
        else:
            columns[name] = _from_binary(tensor, binary[:size])
            binary = binary[size:]
    if len(binary):
        raise RequestError("binary_data_size", f"{len(binary):,} bytes at the end of the body belong to no input")
    return columns


def _check_form(tensor: _Input, spec: TensorSpec) -> None:
    if tensor.datatype != spec.datatype:
        raise RequestError(tensor.name, f"datatype is {tensor.datatype!r}, expected {spec.datatype}")
    fits = len(tensor.shape) == len(spec.shape)
    for size, expected in zip(tensor.shape, spec.shape, strict=False):
        fits &= expected in (-1, size)
    if not fits:
        raise RequestError(tensor.name, f"shape is {tensor.shape}, expected {list(spec.shape)} (-1: any size)")


def _from_json(tensor: _Input) -> np.ndarray:
    values, nested = tensor.data or [], list[int]()
    while values and list in (types := set(map(type, values))):
        sizes = set(map(len, values)) if types == {list} else set()
        if len(sizes) != 1:
            raise RequestError(tensor.name, "lists inside its data differ in length or stand beside numbers")
        nested.append(len(values) // math.prod(nested))
        values = list(chain.from_iterable(values))
    if nested and [*nested, len(values) // math.prod(nested)] != tensor.shape:
        raise RequestError(tensor.name, f"its data is not nested as its shape {tensor.shape} says")
    _check_count(tensor, len(values))
    if wrong := set(map(type, values)) - _JSON_TYPES[tensor.datatype]:
        names = ", ".join(sorted(each.__name__ for each in wrong))
        raise RequestError(tensor.name, f"has {names} in its data, expected {tensor.datatype}")
    if tensor.datatype == "BYTES":
        array = np.empty(len(values), object)
        array[:] = values
    else:
        try:
            array = np.array(values, np.float64 if tensor.datatype == "FP32" else DTYPES[tensor.datatype])
        except OverflowError:
            raise RequestError(tensor.name, f"has a number that is no {tensor.datatype}") from None
    return _finite(tensor, array)


def _from_binary(tensor: _Input, data: memoryview) -> np.ndarray:
    if tensor.datatype == "BYTES":
        return _finite(tensor, _texts(tensor, data))
    dtype = _LITTLE[tensor.datatype]
    if len(data) % dtype.itemsize:
        raise RequestError(tensor.name, f"has {len(data):,} bytes, which is no multiple of {dtype.itemsize}")
    _check_count(tensor, len(data) // dtype.itemsize)
    if tensor.datatype == "BOOL" and np.frombuffer(data, np.uint8).max(initial=0) > 1:
        raise RequestError(tensor.name, "has a byte that is neither 0 nor 1, expected BOOL")
    return _finite(tensor, np.frombuffer(data, dtype).copy())  # aligned, and the body can go


def _texts(tensor: _Input, data: memoryview) -> np.ndarray:
    count, at = math.prod(tensor.shape), 0
    if count > len(data) // _LENGTH.itemsize:
        raise RequestError(tensor.name, f"{len(data):,} bytes are too few for the elements of shape {tensor.shape}")
    array = np.empty(count, object)
    for number in range(count):
        start = at + _LENGTH.itemsize
        at = start + int.from_bytes(data[at:start], "little")
        if at > len(data):
            raise RequestError(tensor.name, f"element {number} ends behind its {len(data):,} bytes")
        try:
            array[number] = str(data[start:at], "utf-8")
        except UnicodeDecodeError:
            raise RequestError(tensor.name, f"element {number} is no UTF-8") from None
    if at != len(data):
        raise RequestError(tensor.name, f"{len(data) - at:,} bytes are left behind its {count:,} elements")
    return array


def _check_count(tensor: _Input, count: int) -> None:
    if count != (expected := math.prod(tensor.shape)):
        raise RequestError(tensor.name, f"has {count:,} elements, and its shape {tensor.shape} says {expected:,}")


def _finite(tensor: _Input, array: np.ndarray) -> np.ndarray:
    """`array` in its type and shape; a number that is not finite there is a fault, and no model takes one."""
    if array.dtype.kind == "f":
        if array.dtype != DTYPES[tensor.datatype]:
            with np.errstate(over="ignore"):
                array = array.astype(DTYPES[tensor.datatype])
        if not np.isfinite(array).all():
            at = int(np.flatnonzero(~np.isfinite(array))[0])
            raise RequestError(tensor.name, f"element {at} is no finite {tensor.datatype}")
    try:
        return array.reshape(tensor.shape)
    except ValueError:  # [0, 2147483647, 2147483647, 2147483647]
        raise RequestError(tensor.name, f"shape {tensor.shape} is too large") from None


def write_response(
    head: Mapping[str, Any], outputs: Mapping[str, np.ndarray], specs: Sequence[TensorSpec], asked: Mapping[str, bool]
) -> tuple[bytes, int | None]:
    """The body and, where it has binary tensors, the bytes of its JSON. head: what comes before `outputs`.

    A number that there is none of is NaN in binary tensors and null in JSON. Raises ServingError for an infinite one.
    """
    tensors, binary = [], []
    for spec in specs:
        if spec.name not in asked:
            continue
        array = outputs[spec.name]
        tensor: dict[str, Any] = {"name": spec.name, "datatype": spec.datatype, "shape": list(array.shape)}
        if asked[spec.name]:
            binary.append(_to_binary(array, spec))
            tensor["parameters"] = {"binary_data_size": len(binary[-1])}
        else:
            values = array.ravel().tolist()
            has_nan = array.dtype.kind == "f" and np.isnan(array).any()
            tensor["data"] = [None if math.isnan(each) else each for each in values] if has_nan else values
        tensors.append(tensor)
    try:
        text = json.dumps({**head, "outputs": tensors}, allow_nan=False, separators=(",", ":")).encode()
    except ValueError:
        raise ServingError("the model's answer is not finite") from None
    return b"".join([text, *binary]), len(text) if binary else None


def write_request(columns: Mapping[str, np.ndarray], specs: Sequence[TensorSpec]) -> tuple[bytes, int]:
    """The body of a request with binary tensors both ways, and the bytes of its JSON; as a client writes it."""
    tensors, binary = [], []
    for spec in specs:
        if spec.name in columns:
            array = columns[spec.name]
            binary.append(_to_binary(array, spec))
            size = {"binary_data_size": len(binary[-1])}
            form = {"name": spec.name, "datatype": spec.datatype, "shape": list(array.shape), "parameters": size}
            tensors.append(form)
    text = json.dumps({"inputs": tensors, "parameters": {"binary_data_output": True}}).encode()
    return b"".join([text, *binary]), len(text)


def _to_binary(array: np.ndarray, spec: TensorSpec) -> bytes:
    if spec.datatype == "BYTES":
        texts = [str(each).encode() for each in array.ravel()]
        return b"".join(chain.from_iterable((len(text).to_bytes(4, "little"), text) for text in texts))
    return np.ascontiguousarray(array, _LITTLE[spec.datatype]).tobytes()
