"""Requests of the Open Inference Protocol that are right until a mutation makes one field wrong."""

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

Tensor = dict[str, Any]
_FIXED = {"INT32": "<i", "INT64": "<q", "FP32": "<f", "FP64": "<d", "BOOL": "<?"}
MUTATIONS: dict[str, Callable[["Draft"], str | None]] = {}


@dataclass
class Draft:
    """A request that is right until a mutation changes it. lengths: of the JSON, of the body; None: as they are."""

    random: Random
    path: str
    tensors: list[Tensor]
    body: dict[str, Any]
    headers: dict[str, str]
    binary: bytes = b""
    text: bytes | None = None
    length: int | None = None
    method: str = "POST"

    @property
    def tensor(self) -> Tensor:
        """The tensor that a mutation makes wrong."""
        return self.tensors[self.random.randrange(len(self.tensors))]

    def to_binary(self, tensor: Tensor, data: bytes) -> str:
        """Only `tensor` is left in binary form, with `data`; returns its name."""
        tensor.pop("data")
        tensor["parameters"] = {"binary_data_size": len(data)}
        self.binary = data
        return tensor["name"]

    def bytes(self) -> bytes:
        text = json.dumps(self.body).encode() if self.text is None else self.text
        if self.binary:
            self.headers.setdefault("Inference-Header-Content-Length", str(len(text)))
        content = text + self.binary
        length = len(content) if self.length is None else self.length
        lines = [f"{self.method} {self.path} HTTP/1.1", "Host: localhost", f"Content-Length: {length}"]
        lines += [f"{name}: {value}" for name, value in self.headers.items()]
        return "\r\n".join([*lines, "", ""]).encode() + content


def mutation(change: Callable[[Draft], str | None]) -> Callable[[Draft], str | None]:
    """Registers a change of a draft, which returns the field that is wrong then; None: it may still be right."""
    MUTATIONS[change.__name__] = change
    return change


@mutation
def another_datatype(draft: Draft) -> str:
    tensor = draft.tensor
    others = [*_FIXED, "BYTES", "FP16", "UINT8", "int64", ""]
    tensor["datatype"] = draft.random.choice([each for each in others if each != tensor["datatype"]])
    return tensor["name"]


@mutation
def negative_shape(draft: Draft) -> str:
    tensor = draft.tensor
    tensor["shape"][0] = -draft.random.randint(1, 2**70)
    return "shape"


@mutation
def huge_shape(draft: Draft) -> str:
    tensor = draft.tensor
    tensor["shape"][0] = draft.random.choice([2**31 - 1, 2**31, 2**63, 2**64, 10**30])
    return "shape"


@mutation
def many_dims(draft: Draft) -> str:
    draft.tensor["shape"] = [draft.random.choice([1, 2**31 - 1])] * draft.random.randint(3, 10_000)
    return "shape"


@mutation
def shape_of_text(draft: Draft) -> str:
    draft.tensor["shape"] = draft.random.choice(["1", [1.5], [None], ["1"], {}, None, [[1]]])
    return "shape"


@mutation
def other_count(draft: Draft) -> str:
    tensor = draft.tensor
    tensor["data"] = tensor["data"][: draft.random.randint(0, len(tensor["data"]) - 1)]
    return tensor["name"]


@mutation
def other_elements(draft: Draft) -> str:
    tensor = draft.tensor
    wrong: list[Any] = [None, {}, {"a": 1}, [], [1]]
    wrong += [1, 1.5, True] if tensor["datatype"] == "BYTES" else ["1", "", "NaN"]
    tensor["data"][draft.random.randrange(len(tensor["data"]))] = draft.random.choice(wrong)
    return tensor["name"]


@mutation
def number_out_of_range(draft: Draft) -> str:
    numbers = [tensor for tensor in draft.tensors if tensor["datatype"] not in ("BYTES", "BOOL")]
    tensor = draft.random.choice(numbers)
    tensor["data"][0] = draft.random.choice([float("nan"), float("inf"), -float("inf"), 10**400, -(10**400)])
    return tensor["name"]


@mutation
def ragged_data(draft: Draft) -> str:
    tensor = draft.tensor
    tensor["data"] = [tensor["data"], tensor["data"][:1], []]
    return tensor["name"]


@mutation
def deep_data(draft: Draft) -> str:
    depth = draft.random.choice([300, 10_000, 100_000])
    draft.text = b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1],"data":' + b"[" * depth + b"]" * depth + b"}]}"
    return ""


@mutation
def unknown_input(draft: Draft) -> str:
    draft.tensor["name"] = draft.random.choice(["", "no such", "\0", "\x1b[31m", "é" * 200, "a" * 100_000, "../x"])
    return "name"


@mutation
def input_twice(draft: Draft) -> str:
    tensor = draft.tensor
    draft.body["inputs"] = [*draft.tensors, dict(tensor)]
    return tensor["name"]


@mutation
def no_inputs(draft: Draft) -> str:
    draft.body["inputs"] = draft.random.choice([[], None, {}, "x", 1, [None], [[]], [1] * 50_000])
    return ""


@mutation
def many_inputs(draft: Draft) -> str:
    draft.body["inputs"] = [{"name": str(n), "datatype": "FP32", "shape": [1], "data": [1]} for n in range(5000)]
    return "inputs"


@mutation
def without_a_key(draft: Draft) -> str:
    tensor, key = draft.tensor, draft.random.choice(["name", "datatype", "shape", "data"])
    del tensor[key]
    return tensor["name"] if key == "data" else key


@mutation
def unknown_output(draft: Draft) -> str:
    draft.body["outputs"] = draft.random.choice([[{"name": "no such"}], [{}], [1], "y", {}])
    return "outputs"


@mutation
def wrong_parameters(draft: Draft) -> str:
    draft.body["parameters"] = draft.random.choice([{"timeout": -1}, {"timeout": "1"}, {"timeout": 0}, 1, [], "x"])
    return "parameters"


@mutation
def binary_cut_off(draft: Draft) -> str:
    name = draft.to_binary(draft.tensor, bytes(64))
    draft.binary = draft.binary[: draft.random.randint(1, 63)]
    return name


@mutation
def binary_of_another_size(draft: Draft) -> str:
    return draft.to_binary(draft.tensor, draft.random.randbytes(draft.random.choice([1, 3, 17, 65, 1001])))


@mutation
def binary_left_over(draft: Draft) -> str:
    draft.binary = draft.random.randbytes(draft.random.randint(1, 100))
    return "binary_data_size"


@mutation
def binary_size_and_data(draft: Draft) -> str:
    tensor = draft.tensor
    tensor["parameters"] = {"binary_data_size": draft.random.choice([0, 4, -1, 2**63, 1.5, "8"])}
    return ""


@mutation
def text_with_wrong_lengths(draft: Draft) -> str | None:
    texts = [tensor for tensor in draft.tensors if tensor["datatype"] == "BYTES"]
    if not texts:
        return None
    data = struct.pack("<I", draft.random.choice([2**32 - 1, 100, 7])) + draft.random.choice([b"", b"ab", b"\xff" * 8])
    return draft.to_binary(texts[0], data)


@mutation
def not_finite_in_binary(draft: Draft) -> str | None:
    floats = [tensor for tensor in draft.tensors if tensor["datatype"] in ("FP32", "FP64")]
    if not floats:
        return None
    form = _FIXED[floats[0]["datatype"]]
    return draft.to_binary(floats[0], struct.pack(form, float("nan")) * len(floats[0]["data"]))


@mutation
def json_length_wrong(draft: Draft) -> str:
    wrong = ["-1", "x", "", "1e3", "9" * 30, "0", "3", str(2**63)]
    draft.headers["Inference-Header-Content-Length"] = draft.random.choice(wrong)
    return ""


@mutation
def body_cut_off(draft: Draft) -> str:
    text = json.dumps(draft.body).encode()
    draft.text = text[: draft.random.randrange(len(text))]
    return "body"


@mutation
def content_length_wrong(draft: Draft) -> str:
    draft.length = draft.random.choice([0, 1, 5, -1, 2**62, 10**30])
    return ""


@mutation
def no_length(draft: Draft) -> str:
    draft.headers["Transfer-Encoding"] = draft.random.choice(["chunked", "gzip", "chunked, chunked"])
    return ""


@mutation
def another_path(draft: Draft) -> str:
    paths = [
        "/",
        "/v2/models",
        "/v2/models//infer",
        draft.path + "/",
        draft.path * 100,
        "/v2/models/%00/infer",
        "*",
        "//",
    ]
    draft.path = draft.random.choice([*paths, draft.path.replace("/infer", "/versions/none/infer")])
    return ""


@mutation
def another_method(draft: Draft) -> str:
    draft.method = draft.random.choice(["PUT", "DELETE", "PATCH", "TRACE", "CONNECT", "PRI", "post", "A" * 50])
    return ""


@mutation
def wrong_headers(draft: Draft) -> str | None:
    wrong = [("a" * 20_000, "1"), ("X", "a" * 100_000), ("X:", "\0"), ("", ""), ("X Y", "1"), ("X", "\x80\xff")]
    name, value = draft.random.choice([*wrong, ("Upgrade", "websocket\r\nConnection: Upgrade"), ("Expect", "x")])
    draft.headers[name] = value
    return None


@mutation
def bytes_at_random(draft: Draft) -> str | None:
    text = bytearray(json.dumps(draft.body).encode())
    for _ in range(draft.random.randint(1, 8)):
        text[draft.random.randrange(len(text))] = draft.random.randrange(256)
    draft.text = bytes(text)
    return None
