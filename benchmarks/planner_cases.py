"""The lists of tables that benchmarks/planner.py plans, seeded."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from gr.config.inventory import InventoryConfig, TableConfig

GIB = 2**30
SEED = 0
# Criteo 1TB as MLPerf DLRM-v2 caps it: 204,184,588 rows.
# fmt: off
CRITEO_ROWS = (
    40_000_000, 39_060, 17_295, 7_424, 20_265, 3, 7_122, 1_543, 63, 40_000_000, 3_067_956, 405_282, 10, 2_209, 11_938,
    155, 4, 976, 14, 40_000_000, 40_000_000, 40_000_000, 590_152, 12_973, 108, 36,
)
# fmt: on


@dataclass(frozen=True)
class Limits:
    """Limits for gr's planner, from a list of tables to a plan."""

    process_cpu_seconds: float | None  # imports, reading, planning and estimate
    planning_cpu_seconds: float | None
    gap: float
    peak_bytes: int = GIB


@dataclass(frozen=True)
class Case:
    """parameters: of all tables; None: as drawn. giant: parameters of the first table, whatever those of the others.

    limits: None where only TorchRec's costs are compared.
    """

    sizes: Literal["criteo", "zipf", "lognormal"]
    tables: int
    ranks: int
    rank_batch_size: int
    dims: tuple[int, ...]
    parameters: float | None = None
    limits: Limits | None = None
    torchrec_costs: bool = True
    giant: float | None = None


_SMALL = Limits(process_cpu_seconds=None, planning_cpu_seconds=1.0, gap=0.02)
_WIDE, _NARROW = (64, 128, 256), (16, 32, 64, 128, 256)
CASES = {
    "26x8": Case("criteo", 26, 8, 8192, (128,)),
    "100x16": Case("zipf", 100, 16, 2048, _WIDE, 0.05e12),
    "200x32": Case("zipf", 200, 32, 2048, _WIDE, 0.2e12),
    "100x64": Case("zipf", 100, 64, 2048, _WIDE, 0.2e12),
    "100x256": Case("zipf", 100, 256, 2048, _WIDE, 1e12, _SMALL),
    "856x128": Case("lognormal", 856, 128, 1024, _NARROW, None, _SMALL),
    "1000x1024": Case("lognormal", 1000, 1024, 1024, _WIDE, 1.5e12, Limits(5.0, None, gap=0.05), torchrec_costs=False),
    # Memory nearly full; one table that only all ranks together can hold; many tables and ranks.
    "200x128": Case("lognormal", 200, 128, 1024, _WIDE, 2.1e12, Limits(None, 2.0, gap=0.1), torchrec_costs=False),
    "20x4096": Case("lognormal", 20, 4096, 1024, _WIDE, None, Limits(None, 5.0, gap=0.02), False, giant=1e13),
    "5000x4096": Case("lognormal", 5000, 4096, 1024, _WIDE, 5e12, Limits(60.0, None, gap=0.05), torchrec_costs=False),
}


def inventory(name: str) -> InventoryConfig:
    """The tables of a case, seeded.

    criteo: the published cardinalities, one id an example, fp32. zipf: parameters of the i-th largest table as i^-1.2,
    fp16. lognormal: rows exp(N(12.5, 2.5)) within 1e3..2e8 as in a production ranking model, scaled where the case
    states its parameters, fp32. Ids an example exp(N(1.2, 1.2)) within 1..200; widths drawn, the middle ones most
    often; ids follow Zipf's law with exponent 1.05, which TorchRec's costs do not know.
    """
    case = CASES[name]
    rng = np.random.default_rng(SEED)
    rows_T: np.ndarray
    if case.sizes == "criteo":
        rows_T, dims_T, ids_T = np.array(CRITEO_ROWS), np.full(case.tables, case.dims[0]), np.ones(case.tables)
    else:
        drawn_T = np.clip(np.exp(rng.normal(12.5, 2.5, case.tables)), 1e3, 2e8)
        odds = {_NARROW: (0.1, 0.2, 0.35, 0.25, 0.1), _WIDE: (0.3, 0.5, 0.2)}[case.dims]
        dims_T = rng.choice(case.dims, case.tables, p=odds)
        ids_T = np.clip(np.exp(rng.normal(1.2, 1.2, case.tables)), 1, 200).round(2)
        parameters_T = drawn_T * dims_T if case.sizes == "lognormal" else np.arange(1, case.tables + 1) ** -1.2
        if case.parameters is not None:
            parameters_T = parameters_T * (case.parameters / parameters_T.sum())
        if case.giant is not None:
            parameters_T[0] = case.giant
        rows_T = np.maximum(parameters_T / dims_T, 1)
    tables = tuple(
        TableConfig(
            name=f"t{index}",
            rows=int(rows),
            dim=int(dim),
            dtype="fp16" if case.sizes == "zipf" else "fp32",
            ids_per_example=float(ids),
            skew=1.05,
        )
        for index, (rows, dim, ids) in enumerate(zip(rows_T, dims_T, ids_T, strict=True))
    )
    return InventoryConfig(name=name, rank_batch_size=case.rank_batch_size, tables=tables)
