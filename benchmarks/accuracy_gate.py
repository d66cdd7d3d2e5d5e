"""The accuracy gate on trained models: `python -m benchmarks.accuracy_gate RUN [RUN ...] [--data FOLDER] [--rows N]`.

For each run: all tables in fp16, int8, int4 and int2 rows, with the changes of NE (or of HR@10 and NDCG@10), of AUC and
of the logits, and the gate's verdict; each table's sensitivity; and the dtypes that `auto` chooses, with the bytes.
--data: the rows to measure on, in place of those that the run names. --pictures: a folder for each table's sensitivity.
"""

import argparse
import time
from pathlib import Path

import torch

import gr
from benchmarks.compare import print_machine
from gr.embeddings import table_weights
from gr.serving.gate.accuracy_gate import GateReport, Limits
from gr.serving.gate.calibration import ROWS, calibration
from gr.serving.gate.dense_layers import dense_layers
from gr.serving.gate.dtypes import bytes_by_part, choose, measure
from gr.serving.tables.quantize import ROW_KINDS, RowKind, has_kind

DENSE = ("fp32", "bf16")


def row(name: str, share: float, report: GateReport) -> str:
    """One line of the table: every measure of the first task with its standard error."""
    task = report.tasks[0]
    cells = []
    for each in task.measures:
        scale, unit = (1, "") if each.name == "auc" else (100, " %")
        digits = 6 if each.name == "auc" else 4
        cells.append(f"{scale * each.change:+.{digits}f}{unit} ({scale * each.error:.{digits}f})")
    needed = f", {report.rows_needed:,} needed" if report.rows_needed else ""
    cells += [f"{task.mean:.2g}, {task.largest:.2g}"]
    if task.calibration is not None:
        cells.append(f"{task.calibration[1]:.4f}")
    return " | ".join([f"| {name}", f"{share:.3f}", *cells, f"{report.verdict}{needed} |"])


def measure_run(run: Path, limits: Limits, options: argparse.Namespace) -> None:
    saved = gr.load(run)
    rows = calibration(saved, data=options.data, rows=options.rows)
    weights = table_weights(saved.model)
    kinds: list[RowKind] = [kind for kind in ROW_KINDS if all(has_kind(w.shape[1], kind) for w in weights.values())]
    fp32 = sum(bytes_by_part(saved.model, dict.fromkeys(weights, "fp32")).values())
    for kind in kinds:
        every = dict.fromkeys(weights, kind)
        report = measure(rows, every, limits)
        if kind == "fp32":
            first, name = report.tasks[0], Path(run).name
            values = ", ".join(f"{each.name} {each.reference:.6f}" for each in first.measures if each.reference)
            print(f"\n{name}: {first.rows:,} rows of {first.units:,} units, {values}, calibration {first.calibration}")
            columns = [f"{each.name} (s.e.)" for each in first.measures] + ["outputs: mean, largest change"]
            columns += ["calibration"] * (first.calibration is not None) + ["verdict"]
            print("| tables | bytes / fp32 | " + " | ".join(columns) + " |")
            print("|---" * (len(columns) + 2) + "|")
        else:
            print(row(kind, sum(bytes_by_part(saved.model, every).values()) / fp32, report))
    began = time.process_time()
    layers = dict.fromkeys(dense_layers(saved.model), DENSE if options.dense else ("fp32",))
    choice = choose(rows, limits, {**dict.fromkeys(weights, kinds), **layers})
    seconds = time.process_time() - began
    print(row("auto", choice.bytes / choice.fp32_bytes, choice.gate))
    print(f"auto: {', '.join(f'{part} {kind}' for part, kind in choice.kinds.items())}; {seconds:.1f} CPU-s")
    for each in choice.sensitivities:
        change = f"{each.measure} {100 * each.change:+.4f} % ({100 * each.error:.4f})"
        print(f"  {each.part:16s} {each.kind}  sensitivity {100 * each.sensitivity:.2e} %  {change}  {each.verdict}")
    if options.pictures is not None:
        from gr.serving.gate.pictures import draw_sensitivities

        draw_sensitivities(choice, options.pictures / f"{Path(run).name}-sensitivities.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--ne", type=float, default=Limits.ne)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--pictures", type=Path)
    parser.add_argument("--dense", action="store_true", help="choose the types of dense layers too")
    options = parser.parse_args()
    print_machine()
    torch.set_num_threads(1)
    for run in options.runs:
        measure_run(run, Limits(ne=options.ne), options)


if __name__ == "__main__":
    main()
