"""The HTTP server, over sockets: routes, errors, limits on bodies, headers, connections and patience."""

import json
import re
import socket
import time

import numpy as np
import pytest

from gr.config.serving import ServeConfig
from gr.errors import ServingError
from gr.serving.http.event_loop import Lateness
from gr.serving.http.server import listen
from gr.serving.servable import Unavailable
from tests.support.toy_server import answer_of, exchange, get, post, running
from tests.support.toy_serving import ToyVersion

INFER = "/v2/models/toy/infer"


def question(*x, **more):
    return json.dumps(
        {"inputs": [{"name": "x", "datatype": "FP32", "shape": [len(x)], "data": list(x)}], **more}
    ).encode()


@pytest.fixture(scope="module")
def lines():
    return []


@pytest.fixture(scope="module")
def toy(lines):
    with running(ToyVersion(1, fails=13.0), lines, body_bytes=10_000, header_bytes=4096) as (served, address):
        yield served, address


@pytest.fixture
def address(toy):
    return toy[1]


def until(is_so, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def ask(address, request):
    status, headers, body = exchange(address, request)
    return status, json.loads(body) if headers.get("content-type") == "application/json" else body


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/v2/health/live", {"live": True}),
        ("/v2/health/ready", {"ready": True}),
        ("/v2/models/toy/ready", {"name": "toy", "ready": True}),
        ("/v2/models/toy/versions/step-1/ready", {"name": "toy", "ready": True}),
    ],
)
def test_health(address, path, expected):
    assert ask(address, get(path)) == (200, expected)


def test_metadata(address):
    status, server = ask(address, get("/v2"))
    assert status == 200 and server["name"] == "gr" and "binary_tensor_data" in server["extensions"]
    status, model = ask(address, get("/v2/models/toy"))
    assert status == 200 and (model["name"], model["versions"]) == ("toy", ["step-1"])
    assert model["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1]}]
    assert [each["name"] for each in model["outputs"]] == ["y", "before", "after"]


@pytest.mark.parametrize(("error", "status"), [(ServingError, 500), (Unavailable, 503)])
def test_a_fault_of_the_model_is_500_and_what_cannot_answer_now_is_503(error, status):
    version = ToyVersion(1, fails=13.0)
    version.servable.fault = error("the model's answer is not finite")
    with running(version) as (_, address):
        got, answer = ask(address, post(question(13)))
    assert got == status
    assert re.search("the server failed on request" if status == 500 else "is not finite", answer["error"])


def test_what_is_refused_is_refused_before_its_body_and_leaves_the_connection_open(lines):
    """Under overload; the request's id comes back, it is logged and counted, and the next one is answered."""
    version = ToyVersion(1)
    with running(version, lines) as (served, address):
        queue = served.engine._queues["score"]
        with socket.create_connection(address, 10) as connection, version.busy(served.engine):
            queue.time.add(1, 100.0)
            waiting = served.engine.submit("score", {"x": np.ones(1)})
            request = post(question(1), X_Request_ID="mine")
            connection.sendall(request[:-5])  # all of it but the end of the body
            status, headers, body = answer_of(connection)
            assert status == 503 and headers["x-request-id"] == "mine" and int(headers["retry-after"]) >= 1
            assert re.search("1 rows wait, so an answer takes about", json.loads(body)["error"])
            connection.sendall(request[-5:] + get("/v2/health/live"))
            assert answer_of(connection)[0] == 200
        assert waiting.result().version == "step-1"
        assert served.responses[503] == 1 and served.engine.metrics.verbs["score"].outcomes["overloaded"] == 1
    last = json.loads(lines[-2])
    assert (last["request"], last["route"], last["status"]) == ("mine", "infer", 503)


def test_a_lone_request_is_answered_however_late_it_was_read(monkeypatch):
    monkeypatch.setattr(Lateness, "seconds", lambda self, loop: 100.0)
    with running(ToyVersion(1)) as (_, address):
        assert exchange(address, post(question(1)))[0] == 200


def test_an_answer_in_json(address):
    status, answer = ask(address, post(question(1, 2.5, id="a", outputs=[{"name": "y"}])))
    assert status == 200
    assert (answer["model_name"], answer["model_version"], answer["id"]) == ("toy", "step-1", "a")
    assert answer["outputs"] == [{"name": "y", "datatype": "FP32", "shape": [2], "data": [2.0, 3.5]}]


def test_an_answer_in_binary(address):
    x = np.array([1, 2.5], np.float32)
    form = {"name": "x", "datatype": "FP32", "shape": [2], "parameters": {"binary_data_size": 8}}
    head = json.dumps({"inputs": [form], "parameters": {"binary_data_output": True}}).encode()
    status, headers, body = exchange(address, post(head + x.tobytes(), Inference_Header_Content_Length=str(len(head))))
    length = int(headers["inference-header-content-length"])
    assert status == 200 and np.frombuffer(body[length:], np.float32).tolist() == [2, 3.5, 1, 1]
    assert [each["parameters"]["binary_data_size"] for each in json.loads(body[:length])["outputs"]] == [8, 4, 4]


@pytest.mark.parametrize(
    ("request_bytes", "status", "message"),
    [
        (get("/v1"), 404, "GET /v1: not found"),
        (get(INFER), 405, "method not allowed, inference is a POST"),
        (get(INFER).replace(b"GET", b"PUT"), 405, "method not allowed"),
        (post(question(1), "/v2/models/toys/infer"), 404, "no model 'toys'; models: toy"),
        (post(question(1), "/v2/models/t%6Fy/versions/step-1/infer?a"), 200, ""),
        (get("/v2/models/toys"), 404, "no model 'toys'; models: toy"),
        (post(question(1), "/v2/models/toy/versions/step-7/infer"), 404, "'step-7' of toy is not served; step-1 is"),
        (post(b"{}"), 400, "inputs: Field required"),
        (post(b'{"inputs":[]}'), 400, "x: is missing"),
        (post(question()), 400, r"x: has shape \[0\]"),
        (post(question(1), Inference_Header_Content_Length="x"), 400, "Inference-Header-Content-Length: is 'x'"),
        (post(question(1), Inference_Header_Content_Length="999"), 400, "Inference-Header-Content-Length: is '999'"),
        (post(question(13)), 500, "the server failed on request"),
        (post(bytes(10_001)), 413, "Content-Length: 10001 bytes, at most 10,000"),
        (post(b"", length=10**17), 413, "at most 10,000"),
        (b"POST /v2/models/toy/infer HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n", 411, "is missing"),
        (post(b"", length=-1), 400, "no HTTP request"),
        (b"nonsense\r\n\r\n", 400, "no HTTP request"),
        (post(question(1), X="a" * 5000), 431, "longer than 4,096 bytes"),
        (b"GET / HTTP/1.1\r\nX: " + b"a" * 5000, 431, "longer than 4,096 bytes"),
    ],
)
def test_a_wrong_request(address, request_bytes, status, message):
    got, answer = ask(address, request_bytes)
    assert got == status and re.search(message, answer.get("error", "")), answer


def test_requests_of_one_connection(address):
    with socket.create_connection(address, 10) as connection:
        for number in range(3):
            connection.sendall(post(question(number)))
            assert answer_of(connection)[0] == 200
        connection.sendall(post(question(1)) + post(question(2)))  # pipelined
        status = connection.recv(1 << 16)
        while status.count(b"HTTP/1.1 200") < 2:
            status += connection.recv(1 << 16)


def test_answers_come_in_the_order_of_the_requests_of_a_connection():
    version = ToyVersion(1)
    with running(version) as (served, address), socket.create_connection(address, 10) as connection:
        with version.busy(served.engine):
            connection.sendall(post(question(1)) + get("/v2") + post(b"{}") + get("/v2/health/live"))
            until(lambda: served.engine.waiting()["score"])
        with connection.makefile("rb") as file:
            got = [answer_of(connection, file) for _ in range(4)]
    assert [status for status, _, _ in got] == [200, 200, 400, 200]
    assert b"outputs" in got[0][2] and b"extensions" in got[1][2] and b"inputs" in got[2][2] and b"live" in got[3][2]


def test_a_client_that_asks_first_is_told_to_send_the_body(address):
    with socket.create_connection(address, 10) as connection:
        head, body = post(question(1), Expect="100-continue").split(b"\r\n\r\n")
        connection.sendall(head + b"\r\n\r\n")
        assert connection.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(body)
        assert answer_of(connection)[0] == 200


def test_an_old_client_gets_one_answer(address):
    with socket.create_connection(address, 10) as connection:
        connection.sendall(post(question(1)).replace(b"HTTP/1.1", b"HTTP/1.0"))
        status, headers, _ = answer_of(connection)
        assert (status, headers["connection"]) == (200, "close") and connection.recv(1) == b""


def test_long_bodies_and_a_client_that_takes_its_answers_late():
    x = np.arange(300_000, dtype=np.float32)
    form = {"name": "x", "datatype": "FP32", "shape": [len(x)], "parameters": {"binary_data_size": x.nbytes}}
    head = json.dumps({"inputs": [form], "parameters": {"binary_data_output": True}}).encode()
    request = post(head + x.tobytes(), Inference_Header_Content_Length=str(len(head)))
    with (
        running(ToyVersion(1), request_rows=len(x)) as (served, address),
        socket.create_connection(address, 10) as connection,
    ):
        connection.sendall(request)
        until(lambda: served.responses[200] == 1)
        connection.sendall(request + get("/v2"))
        until(lambda: served.responses[200] >= 2)
        with connection.makefile("rb") as file:
            for _ in range(2):
                status, headers, body = answer_of(connection, file)
                y = np.frombuffer(body[int(headers["inference-header-content-length"]) :], np.float32)
                assert status == 200 and (y[: len(x)] == x + 1).all()
            assert answer_of(connection, file)[0] == 200


def test_the_access_log_has_no_data_of_the_user(address, lines):
    lines.clear()
    _, headers, _ = exchange(address, post(question(77.5), X_Request_ID="abc-1"))
    assert headers["x-request-id"] == "abc-1"
    _, headers, _ = exchange(address, post(question(77.5), X_Request_ID='a"b'))
    assert len(headers["x-request-id"]) == 32
    exchange(address, get("/secret?user=77.5"))
    first, _, last = map(json.loads, lines)
    assert (first["request"], first["route"], first["status"], first["version"]) == ("abc-1", "infer", 200, "step-1")
    assert first["run_ms"] >= 0 and first["queue_ms"] >= 0
    assert (last["route"], last["status"]) == ("unrouted", 404)
    assert "77.5" not in "".join(lines) and "secret" not in "".join(lines)


def test_metrics(address):
    exchange(address, post(question(1)))
    text = exchange(address, get("/metrics"))[2].decode()
    for name in ('gr_requests_total{outcome="ok",verb="score"}', 'gr_version_info{kind="click",version="step-1"} 1.0'):
        assert name in text
    assert 'gr_request_seconds_bucket{le="+Inf",verb="score"}' in text and 'status="200"' in text
    assert "gr_http_body_bytes 0.0" in text


def test_overload_says_when_to_come_back():
    version = ToyVersion(1)
    with running(version) as (served, address), version.busy(served.engine) as first:
        served.engine.submit("score", {"x": np.ones(1)})
        served.engine._queues["score"].time.add(1, 2.5)
        status, headers, body = exchange(address, post(question(1, parameters={"timeout": 1000})))
        assert (status, headers["retry-after"]) == (503, "3") and b"deadline" in body
    assert first.result().version == "step-1"


def test_patience_ends():
    with running(ToyVersion(1), read_seconds=0.3, idle_seconds=1) as (_, address):
        started = time.monotonic()
        assert exchange(address, b"POST /v2/mod")[0] == 408
        assert exchange(address, post(b"{", length=100))[0] == 408
        assert exchange(address, b"")[0] == 0
        assert time.monotonic() - started < 5
        with socket.create_connection(address, 10) as connection:  # kept alive, then idle
            connection.sendall(get("/v2"))
            assert answer_of(connection)[0] == 200
            assert connection.recv(1) == b""


def test_a_client_that_leaves_with_requests_under_way_is_no_fault(caplog):
    version = ToyVersion(1)
    with running(version) as (served, address):
        with version.busy(served.engine):
            with socket.create_connection(address, 10) as connection:
                connection.sendall(post(question(1)) * 2)
                until(lambda: served.engine.waiting()["score"])
            time.sleep(0.1)
        until(lambda: served.responses[200])
        assert exchange(address, get("/v2"))[0] == 200
    assert not [record for record in caplog.records if record.name.startswith("uvicorn")]


def test_connections_are_limited():
    with running(ToyVersion(1), idle_seconds=0.5) as (_, address):
        idle = [socket.create_connection(address, 10) for _ in range(200)]
        time.sleep(0.1)
        assert exchange(address, b"")[0] == 503
        time.sleep(0.7)
        assert exchange(address, get("/v2"))[0] == 200  # those that said nothing are gone
        for connection in idle:
            connection.close()


def test_bodies_together_are_limited():
    with running(ToyVersion(1), bodies_bytes=1000) as (served, address):
        slow = socket.create_connection(address, 10)
        slow.sendall(post(bytes(900), length=950))
        until(lambda: served.bodies == 900)
        status, _, body = exchange(address, post(question(*range(100))))
        assert status == 503 and b"bodies of 1,000 bytes" in body
        slow.close()
        until(lambda: served.bodies == 0)
        assert served.responses[499] == 1
        assert exchange(address, post(question(1)))[0] == 200


def test_an_address_that_is_taken(address):
    with pytest.raises(ServingError, match=r"cannot listen on .*: Address already in use; choose another port"):
        listen(ServeConfig(port=address[1]))
    with pytest.raises(ServingError, match=r"this process may have .* files open"):
        listen(ServeConfig(port=0, connections=2**40))
