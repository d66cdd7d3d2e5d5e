"""`gr serve` and `gr bench`: what they refuse, and a package from the first request to SIGTERM."""

import json
import re
import signal
import socket
import subprocess
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from gr.cli import main
from gr.serving import Engine
from gr.serving.http.open_inference import write_request
from tests.support.served_click import as_rows, click_columns
from tests.support.toy_server import exchange, post


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serve", "nowhere", "--port=0"], r"nowhere"),
        (["serve", "nowhere", "deadline=5"], r"deadline: .*did you mean 'deadline_ms'"),
        (["serve", "nowhere", "--port=70000"], r"port: .*65535"),
        (["serve", "nowhere", "--name=a/b"], r"--name=a/b: expected a name without /"),
        (["serve", "nowhere", "--host=192.0.2.1"], r"cannot listen on 192.0.2.1:8000: .*choose another"),
        (["bench", "nowhere", "--input=x", "--against=eager"], r"--against eager and --checkpoint go together"),
        (["bench", "nowhere", "--input=x", "--http", "--scenario=offline"], r"--http measures the scenario server"),
        (["bench", "nowhere", "--input=x"], r"nowhere"),
    ],
)
def test_what_is_refused(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    shown = capsys.readouterr().err
    assert len(shown.splitlines()) == 1 and re.search(message, shown), shown


@pytest.mark.slow
def test_a_package_over_http(click_package: Path, python: Path):
    arguments = [python, "-m", "gr", "serve", str(click_package), "--port=0", "--name=clicks", "--watch"]
    limits = ["deadline_ms=10000", "connections=100"]
    with subprocess.Popen([*arguments, *limits], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            line = process.stderr.readline()
            address = re.search(r"clicks of click version (\S+) at http://127.0.0.1:(\d+)/v2", line)
            port = ("127.0.0.1", int(address[2]))
            columns = click_columns(5)
            with Engine.open(click_package) as engine:
                assert engine.version.name == address[1]
                expected = engine.score(columns)["score"]
                body, json_bytes = write_request(columns, engine.servable("score").inputs)
            request = post(body, "/v2/models/clicks/infer", Inference_Header_Content_Length=str(json_bytes))
            with socket.create_connection(port, 20) as kept:  # an idle connection holds the end up for no time
                status, headers, answer = exchange(port, request, 20)
                assert status == 200, answer
                length = int(headers["inference-header-content-length"])
                np.testing.assert_array_equal(np.frombuffer(answer[length:], np.float32), expected)
                status, _, answer = exchange(port, request.replace(b'"c2"', b'"c9"'), 20)
                assert status == 400 and b"c9" in answer
                process.send_signal(signal.SIGTERM)
                assert process.wait(20) == 0
                assert kept.recv(1) == b""
        finally:
            process.kill()
        first, second = map(json.loads, process.stdout)
    assert (first["status"], first["version"], second["status"]) == (200, address[1], 400)


@pytest.mark.slow
def test_bench_measures_a_package(click_package: Path, served_run: Path, tmp_path, capsys):
    pq.write_table(as_rows(click_columns(64)), tmp_path / "rows.parquet")
    options = ["--input", str(tmp_path / "rows.parquet"), "--rows=4", "--scenario=offline", "--json"]
    assert main(["bench", str(click_package), *options, "--against=eager", f"--checkpoint={served_run}"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert set(results) == {"package", "eager"} and all(each["requests_per_second"] > 0 for each in results.values())
