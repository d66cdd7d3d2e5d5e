"""Records a few steps with torch.profiler: a Chrome trace and a table of operators under run_dir/profile."""

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from gr.config.run import ProfilerConfig
from gr.logging import get_logger
from gr.training.trainer import Callback, StepResult, Trainer

log = get_logger(__name__)
TABLE_ROWS = 30


class Profiler(Callback):
    """Records `steps` steps of this process from step `start` on, or from its first step where it resumes later."""

    def __init__(self, config: ProfilerConfig, run_dir: Path, rank: int) -> None:
        self.config, self.folder, self.rank = config, run_dir / "profile", rank
        self.recording: profile | None = None
        self.recorded = 0

    def on_start(self, trainer: Trainer) -> None:
        self._maybe_start(trainer)

    def on_step(self, trainer: Trainer, result: StepResult) -> None:
        if self.recording is None:
            self._maybe_start(trainer)
        else:
            self._count()

    def on_end(self, trainer: Trainer) -> None:
        if self.recording is not None:
            self._finish()

    def _maybe_start(self, trainer: Trainer) -> None:
        if self.recorded == 0 and trainer.step >= self.config.start:
            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(ProfilerActivity.CUDA)
            self.recording = profile(activities=activities)
            self.recording.start()

    def _count(self) -> None:
        self.recorded += 1
        if self.recorded == self.config.steps:
            self._finish()

    def _finish(self) -> None:
        assert self.recording is not None
        self.recording.stop()
        self.folder.mkdir(parents=True, exist_ok=True)
        trace = self.folder / f"rank-{self.rank}.trace.json.gz"
        self.recording.export_chrome_trace(str(trace))
        table = self.recording.key_averages().table(sort_by="self_cpu_time_total", row_limit=TABLE_ROWS)
        (self.folder / f"rank-{self.rank}.txt").write_text(table)
        self.recording = None
        log.info("profile of %d steps: %s", self.recorded, trace)
