"""Examples and tokens a second, over the time since the last reading."""

import time
from dataclasses import dataclass, field


@dataclass
class Throughput:
    """Counts the examples and tokens of all ranks; read() gives rates over wall time and starts anew."""

    examples: int = 0
    tokens: int = 0
    since: float = field(default_factory=time.perf_counter)

    def add(self, examples: int, tokens: int) -> None:
        self.examples += examples
        self.tokens += tokens

    def read(self) -> dict[str, float]:
        now = time.perf_counter()
        seconds = max(now - self.since, 1e-9)
        rates = {"examples_per_second": self.examples / seconds, "tokens_per_second": self.tokens / seconds}
        self.examples, self.tokens, self.since = 0, 0, now
        return rates
