"""The pass of a click package on a device, for benchmarks/serving.py: latency and rows a second, beside eager torch.

The same tables in the same types and the same dense part, packed and compiled for that device: a package as it lies on
disk has code for the CPU. Inputs of a call are in the host's memory, and its logits at its end, as of a server.
"""

import os
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import gr
from benchmarks.compare import compare, cpu_model
from gr.embeddings import table_weights
from gr.models.dlrm import DLRM
from gr.models.saved_click import SavedClick
from gr.serving.export import _compile
from gr.serving.gate.dense_layers import dense_layers, put_in_bf16
from gr.serving.package.layout import read_current, read_manifest
from gr.serving.package.version import CompiledPass
from gr.serving.passes.build import Pass
from gr.serving.passes.click import ClickPass, DensePass
from gr.serving.tables.packed import PackedTables

BATCHES = (1, 8, 64, 512, 4096)
SECONDS = 2.0  # of calls one after the other, for the p99


def click_pass(saved: SavedClick, package: Path, device: str) -> ClickPass:
    """The pass of a package on a device."""
    manifest, model = read_manifest(package, read_current(package)), saved.model
    assert isinstance(model, DLRM)
    for name, layer in dense_layers(model).items():
        if manifest.dense[name] == "bf16":
            put_in_bf16(layer)
    kinds = {name: table.dtype for name, table in manifest.tables.items()}
    weights = {name: weight.detach().to(device) for name, weight in table_weights(model).items()}
    tables = PackedTables(weights, kinds, model.columns, pooled=not model.config.row_weights)
    columns = [(column.name, column.hots) for column in saved.schema.sparse]
    return ClickPass(model, tables, columns, DensePass(model)).to(device).eval()


def rows_at_random(saved: SavedClick, rows: int) -> tuple[Tensor, Tensor]:
    """Dense numbers, float32 [B, N], and ids, int32 [B, H], in the host's memory."""
    random = torch.Generator().manual_seed(rows)
    ids = [
        torch.randint(column.cardinality, (rows, column.hots), generator=random, dtype=torch.int32)
        for column in saved.schema.sparse
    ]
    return torch.randn(rows, len(saved.schema.dense), generator=random), torch.cat(ids, dim=1)


@torch.inference_mode(False)  # torch.export takes no tensors of that mode
@torch.no_grad()
def measure(package: Path, checkpoint: str, device: str, rounds: int) -> None:
    saved = gr.load(checkpoint)
    assert isinstance(saved, SavedClick), "a click model"
    name = torch.cuda.get_device_name() if device == "cuda" else f"{cpu_model()}: this was not run on a GPU"
    print(f"{name}; torch {torch.__version__}, load {os.getloadavg()[0]:.1f}", flush=True)
    with torch.device(device), tempfile.TemporaryDirectory() as folder:
        eager, path = click_pass(saved, package, device), Path(folder, "score.pt2")
        golden = tuple(each.to(device) for each in rows_at_random(saved, 32))
        began = time.perf_counter()
        _compile(Pass(eager, golden, ({0: "rows"}, {0: "rows"})), path)
        compiled = CompiledPass(path, eager.state_dict(), 1)
        print(f"compiled in {time.perf_counter() - began:.0f} s")
        difference = float((compiled(*golden)[0] - eager(*golden)).abs().max())
        print(f"largest difference of a logit from eager: {difference:.2g}")

        def answer(run: ClickPass | CompiledPass, dense_BN: Tensor, ids_BH: Tensor) -> Tensor:
            output = run(dense_BN.to(device), ids_BH.to(device))
            return (output if isinstance(output, Tensor) else output[0]).cpu()

        print("| rows | compiled ms | eager ms | ratio | p50 ms | p99 ms | rows a second |")
        print("|---|---|---|---|---|---|---|")
        for rows in BATCHES:
            inputs = rows_at_random(saved, rows)
            variants = {"compiled": partial(answer, compiled, *inputs), "eager": partial(answer, eager, *inputs)}
            timings = compare(variants, rounds=rounds, round_seconds=0.1, device=device)
            ours, theirs = (1e3 * timings[each].median for each in variants)
            times = sorted(_walls(variants["compiled"]))
            p50, p99 = (1e3 * times[int(share * (len(times) - 1))] for share in (0.5, 0.99))
            rate = rows * len(times) / sum(times)
            cells = (f"{each:.3f}" for each in (ours, theirs, theirs / ours, p50, p99))
            print(f"| {rows} | {' | '.join(cells)} | {rate:,.0f} |", flush=True)


def _walls(call: "partial[Tensor]") -> list[float]:
    """Seconds of calls, one after the other."""
    times, end = [], time.perf_counter() + SECONDS
    while (began := time.perf_counter()) < end:
        call()
        times.append(time.perf_counter() - began)
    return times
