"""Bodies of the Open Inference Protocol: what is read, what is refused and by which name, what is written."""

import json
import struct

import numpy as np
import pytest

from gr.errors import ServingError
from gr.serving import RequestError, TensorSpec
from gr.serving.http.open_inference import DATATYPES, read_request, write_request, write_response

INPUTS = [TensorSpec(datatype.lower(), datatype, (-1,)) for datatype in DATATYPES]
INPUTS += [TensorSpec("m", "INT64", (-1, 3)), TensorSpec("s", "FP32", ())]
OUTPUTS = [TensorSpec("y", "FP32", (-1,)), TensorSpec("t", "BYTES", (-1,))]
VALUES = {
    "BOOL": np.array([True, False]),
    "INT32": np.array([-(2**31), 7], np.int32),
    "INT64": np.array([2**63 - 1, -(2**63)]),
    "FP32": np.array([0.1, -2.5], np.float32),
    "FP64": np.array([0.1, 1e300]),
    "BYTES": np.array(["ä", ""], object),
}


def tensor(name="int64", datatype="INT64", shape=(2,), **more):
    return {"name": name, "datatype": datatype, "shape": list(shape), **more}


def read(*tensors, binary=b"", **more):
    text = json.dumps({"inputs": tensors, **more}).encode()
    return read_request(text + binary, len(text), INPUTS, OUTPUTS)


def bytes_of(array):
    if array.dtype == object:
        texts = [text.encode() for text in array]
        return b"".join(struct.pack("<I", len(text)) + text for text in texts)
    return array.tobytes()


@pytest.mark.parametrize("datatype", DATATYPES)
def test_json_and_binary_tensors_are_the_same(datatype):
    values, binary = VALUES[datatype], bytes_of(VALUES[datatype])
    name = datatype.lower()
    columns = [
        read(tensor(name, datatype, data=values.tolist())).columns[name],
        read(tensor(name, datatype, parameters={"binary_data_size": len(binary)}), binary=binary).columns[name],
    ]
    for column in columns:
        assert column.dtype == values.dtype and column.tolist() == values.tolist()


def test_binary_tensors_lie_in_the_order_of_the_inputs():
    first, last = np.array([1, 2]), np.array([3.5], np.float32)
    got = read(
        tensor(parameters={"binary_data_size": 16}),
        tensor("s", "FP32", (), data=[1]),
        tensor("fp32", "FP32", (1,), parameters={"binary_data_size": 4}),
        binary=first.tobytes() + last.tobytes(),
    ).columns
    assert got["int64"].tolist() == [1, 2] and got["fp32"].tolist() == [3.5] and got["s"] == 1


@pytest.mark.parametrize("data", [[1, 2, 3, 4, 5, 6], [[1, 2, 3], [4, 5, 6]]])
def test_json_data_may_be_flat_or_nested(data):
    assert read(tensor("m", shape=(2, 3), data=data)).columns["m"].tolist() == [[1, 2, 3], [4, 5, 6]]


def test_the_rest_of_a_request():
    asked = read(id="7", parameters={"timeout": 1500, "binary_data_output": True, "priority": 1})
    assert (asked.id, asked.deadline_ms, asked.outputs) == ("7", 1.5, {"y": True, "t": True})
    asked = read(outputs=[{"name": "y", "parameters": {"binary_data": True}}])
    assert (asked.id, asked.deadline_ms, asked.outputs) == (None, None, {"y": True})


SIZED = {"binary_data_size": 16}


@pytest.mark.parametrize(
    ("tensors", "binary", "field", "message"),
    [
        ([tensor("int46", data=[1, 2])], b"", "inputs[0].name", "no 'int46'; did you mean 'int64'"),
        ([tensor(data=[1, 2])] * 2, b"", "int64", "twice"),
        ([tensor(datatype="FP32", data=[1, 2])], b"", "int64", "'FP32', expected INT64"),
        ([tensor(shape=(1, 2), data=[1, 2])], b"", "int64", r"\[1, 2\], expected \[-1\]"),
        ([tensor("m", shape=(1, 2), data=[1, 2])], b"", "m", r"\[1, 2\], expected \[-1, 3\]"),
        ([tensor(shape=(-1,), data=[1])], b"", "inputs[0].shape[0]", "greater than or equal to 0"),
        ([tensor(shape=(2**31,), data=[1])], b"", "inputs[0].shape[0]", "less than"),
        ([tensor(shape=(2**31 - 1,), data=[1])], b"", "int64", "has 1 elements, and its shape .* 2,147,483,647"),
        ([tensor(shape=[1] * 9, data=[1])], b"", "inputs[0].shape", "at most 8"),
        ([tensor(data=[1, 2.5])], b"", "int64", "has float"),
        ([tensor(data=[1, True])], b"", "int64", "has bool"),
        ([tensor(data=[1, None])], b"", "int64", "has NoneType"),
        ([tensor(data=[1, {}])], b"", "int64", "has dict"),
        ([tensor(data=[2**63, 1])], b"", "int64", "no INT64"),
        ([tensor("fp32", "FP32", data=[1, 1e39])], b"", "fp32", "element 1 is no finite"),
        ([tensor("fp32", "FP32", data=[1, 10**400])], b"", "fp32", "no FP32"),
        ([tensor("fp32", "FP32", data=[float("nan"), 1])], b"", "fp32", "element 0 is no finite"),
        ([tensor("bytes", "BYTES", data=["a", 1])], b"", "bytes", "has int"),
        ([tensor("m", shape=(2, 3), data=[[1, 2, 3], [4, 5]])], b"", "m", "differ in length"),
        ([tensor("m", shape=(2, 3), data=[[1, 2, 3], 4])], b"", "m", "beside numbers"),
        ([tensor("m", shape=(2, 3), data=[[1, 2], [3, 4], [5, 6]])], b"", "m", "not nested"),
        ([tensor()], b"", "int64", "either data or"),
        ([tensor(data=[1, 2], parameters=SIZED)], bytes(16), "int64", "either data or"),
        ([tensor(parameters=SIZED)], bytes(15), "int64", "is 16 bytes, and 15 are left"),
        ([tensor(parameters={"binary_data_size": 12})], bytes(12), "int64", "no multiple of 8"),
        ([tensor(shape=(3,), parameters=SIZED)], bytes(16), "int64", "has 2 elements, and its shape"),
        ([tensor(parameters=SIZED)], bytes(17), "binary_data_size", "1 bytes at the end"),
        ([tensor("fp64", "FP64", parameters=SIZED)], np.array([1, np.inf]).tobytes(), "fp64", "element 1"),
        ([tensor("bool", "BOOL", (1,), parameters={"binary_data_size": 1})], b"\x02", "bool", "neither 0 nor 1"),
        ([tensor("bytes", "BYTES", (2**30,), parameters=SIZED)], bytes(16), "bytes", "too few"),
        ([tensor("bytes", "BYTES", (1,), parameters=SIZED)], b"\xff" * 16, "bytes", "ends behind"),
        ([tensor("bytes", "BYTES", (1,), parameters={"binary_data_size": 5})], b"\1\0\0\0\xff", "bytes", "no UTF-8"),
        ([tensor("bytes", "BYTES", (1,), parameters=SIZED)], bytes(16), "bytes", "12 bytes are left"),
        ([tensor("x" * 300, data=[1, 2])], b"", "inputs[0].name", "at most 256"),
        ([{"name": "int64"}], b"", "inputs[0].datatype", "required"),
        ([5], b"", "inputs[0]", "an object"),
    ],
)
def test_a_wrong_tensor_is_refused_by_name(tensors, binary, field, message):
    with pytest.raises(RequestError, match=message) as caught:
        read(*tensors, binary=binary)
    assert caught.value.field == field


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"[" * 100_000, b"\xff", b'{"inputs":' * 1000])
def test_what_is_no_request(body):
    with pytest.raises(RequestError):
        read_request(body, len(body), INPUTS, OUTPUTS)


def test_unknown_outputs_are_refused():
    with pytest.raises(RequestError, match=r"outputs\[0\].name: there is no 'z'"):
        read(outputs=[{"name": "z"}])


def test_many_faults_cost_little():
    body = json.dumps({"inputs": [5] * 200_000}).encode()
    with pytest.raises(RequestError, match=r"inputs\[0\]"):
        read_request(body, len(body), INPUTS, OUTPUTS)


def test_answers():
    outputs = {"y": np.array([0.5, 1], np.float32), "t": np.array(["ä", "b"], object)}
    text, length = write_response({"id": "1"}, outputs, OUTPUTS, {"y": False, "t": False})
    assert length is None and json.loads(text) == {
        "id": "1",
        "outputs": [
            {"name": "y", "datatype": "FP32", "shape": [2], "data": [0.5, 1.0]},
            {"name": "t", "datatype": "BYTES", "shape": [2], "data": ["ä", "b"]},
        ],
    }
    body, length = write_response({}, outputs, OUTPUTS, {"y": True, "t": True})
    assert body[length:] == outputs["y"].tobytes() + bytes_of(outputs["t"])
    sizes = [each["parameters"]["binary_data_size"] for each in json.loads(body[:length])["outputs"]]
    assert sizes == [8, 11]
    none = {"y": np.array([0.5, np.nan], np.float32)}
    text, _ = write_response({}, none, OUTPUTS, {"y": False})
    assert json.loads(text)["outputs"][0]["data"] == [0.5, None]
    with pytest.raises(ServingError, match="not finite"):
        write_response({}, {"y": np.array([np.inf], np.float32)}, OUTPUTS, {"y": False})


SPECS = [TensorSpec("a", "FP32", (-1,)), TensorSpec("b", "FP32", (-1,)), TensorSpec("c", "INT64", (-1, 2))]


def body_of(a, b, c):
    return write_request({"a": np.float32(a), "b": np.float32(b), "c": np.int64(c)}, SPECS)


def test_json_that_is_repeated_is_compared_with_the_inputs_of_each_version():
    body, json_bytes = body_of([1, 2], [3, 4], [[5, 6], [7, 8]])
    for _ in range(3):
        columns = read_request(body, json_bytes, SPECS, []).columns
        assert columns["b"].tolist() == [3, 4] and columns["c"].tolist() == [[5, 6], [7, 8]]
        assert all(each.flags.aligned and each.flags.writeable for each in columns.values())
    with pytest.raises(RequestError, match=r"c: datatype is 'INT64', expected INT32"):
        read_request(body, json_bytes, [*SPECS[:2], TensorSpec("c", "INT32", (-1, 2))], [])
    with pytest.raises(RequestError, match=r"inputs\[2\].name: there is no 'c'"):
        read_request(body, json_bytes, SPECS[:2], [])


def test_numbers_in_repeated_json_are_checked_each_time():
    read_request(*body_of([1, 2], [3, 4], [[5, 6], [7, 8]]), SPECS, [])
    body, json_bytes = body_of([1, 2], [3, np.inf], [[5, 6], [7, 8]])
    with pytest.raises(RequestError, match="b: element 1 is no finite FP32"):
        read_request(body, json_bytes, SPECS, [])
    with pytest.raises(RequestError, match="c: binary_data_size is 32 bytes, and 31 are left"):
        read_request(body_of([1, 2], [3, 4], [[5, 6], [7, 8]])[0][:-1], json_bytes, SPECS, [])
