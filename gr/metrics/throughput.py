"""Examples and tokens a second, over the time that steps took."""

from dataclasses import dataclass


@dataclass
class Throughput:
    """Sums of the examples and tokens of all ranks; read() returns rates and starts anew."""

    examples: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def add(self, examples: int, tokens: int, seconds: float) -> None:
        self.examples += examples
        self.tokens += tokens
        self.seconds += seconds

    def read(self) -> dict[str, float]:
        """Rates since the last reading, without the time between steps (evaluation, checkpoints)."""
        seconds = max(self.seconds, 1e-9)
        rates = {"examples_per_second": self.examples / seconds, "tokens_per_second": self.tokens / seconds}
        self.examples, self.tokens, self.seconds = 0, 0, 0.0
        return rates
