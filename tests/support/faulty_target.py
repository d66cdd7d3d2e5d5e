"""A target of benchmarks.fuzz whose inputs end its process, raise, hang and change the result. For child processes."""

import os
import time
from pathlib import Path

import numpy as np

from benchmarks import fuzz

fuzz.WAITING = 0.2
RUNS = [lambda: os._exit(3), lambda: 1 // 0, lambda: time.sleep(60), lambda: 0]


@fuzz.target("faulty")
def faulty(random: np.random.Generator, folder: Path) -> fuzz.Trial:
    return fuzz.Trial("", RUNS[int(folder.name)], lambda: "other")
