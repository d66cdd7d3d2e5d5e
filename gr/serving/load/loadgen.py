"""Load by MLPerf's LoadGen (the extra `loadgen`) in its scenario Server: when requests arrive, and how long each took.

LoadGen draws a Poisson process, and counts a latency from the moment at which its request was due. Its verdict, which
wants minutes of a run, is not looked at.
"""

import re
import tempfile
from functools import partial
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from gr.serving.load.load_test import Run
from gr.serving.load.targets import EngineTarget, ask

# Of its trace: microseconds at which a request was due, its number in the order of arrival, and nanoseconds to its end.
_SAMPLE = re.compile(r'"ph":"b".*"ts":([\d.]+),.*"sample_seq":(\d+),.*"complete_ns":(\d+)')


def installed() -> bool:
    return find_spec("mlperf_loadgen") is not None


class LoadGenTarget(EngineTarget):
    """An engine in this process. LoadGen says which of the requests is asked, and when."""

    def run(self, arrivals: np.ndarray) -> Run:
        """As many requests as `arrivals` has, at their mean rate and at times of LoadGen's own."""
        import mlperf_loadgen as loadgen

        numbers, outcomes = count(), np.full(len(arrivals), "refused")

        def end(number: int, sample: int, outcome: str) -> None:
            outcomes[number] = outcome
            loadgen.QuerySamplesComplete([loadgen.QuerySampleResponse(sample, 0, 0)])

        def issue(samples: list[Any]) -> None:
            for each in samples:
                ask(self._engine, self._verb, self._requests[each.index], partial(end, next(numbers), each.id))

        settings, logs, files = loadgen.TestSettings(), loadgen.LogSettings(), loadgen.LogOutputSettings()
        settings.scenario, settings.mode = loadgen.TestScenario.Server, loadgen.TestMode.PerformanceOnly
        settings.server_target_qps, settings.min_duration_ms = len(arrivals) / float(arrivals[-1]), 0
        settings.min_query_count = settings.max_query_count = len(arrivals)
        system = loadgen.ConstructSUT(issue, lambda: None)
        library = loadgen.ConstructQSL(len(self._requests), len(self._requests), lambda _: None, lambda _: None)
        with tempfile.TemporaryDirectory() as folder:
            files.outdir, files.copy_summary_to_stdout = folder, False
            logs.log_output, logs.enable_trace = files, True
            loadgen.StartTestWithLogSettings(system, library, settings, logs)
            trace = Path(folder, "mlperf_log_trace.json").read_text()
        loadgen.DestroyQSL(library)
        loadgen.DestroySUT(system)
        due, number, nanoseconds = np.array(_SAMPLE.findall(trace), dtype=np.float64).T
        order = number.argsort()
        due, seconds = due[order] / 1e6, nanoseconds[order] / 1e9
        refused, failed = outcomes == "refused", outcomes == "failed"
        latencies = np.where(refused | failed, np.inf, seconds)
        offered, lasted = (len(due) - 1) / (due[-1] - due[0]), (due + seconds).max() - due[0]
        return Run(float(offered), latencies, int(refused.sum()), int(failed.sum()), float(lasted))
