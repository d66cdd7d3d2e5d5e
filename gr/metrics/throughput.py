"""Examples, tokens and FLOPs a second, over the time that steps took."""

from dataclasses import dataclass


@dataclass
class Throughput:
    """Sums of the examples, tokens and FLOPs of all ranks; read() returns rates and starts anew.

    peak: FLOP/s of all ranks by the devices' data sheet; None: not known, and so no MFU.
    """

    peak: float | None = None
    examples: int = 0
    tokens: int = 0
    seconds: float = 0.0
    flops: int = 0

    def add(self, examples: int, tokens: int, seconds: float, flops: int = 0) -> None:
        self.examples += examples
        self.tokens += tokens
        self.seconds += seconds
        self.flops += flops

    def read(self) -> dict[str, float]:
        """Rates since the last reading, without the time between steps (evaluation, checkpoints)."""
        seconds = max(self.seconds, 1e-9)
        rates = {"examples_per_second": self.examples / seconds, "tokens_per_second": self.tokens / seconds}
        if self.flops:
            rates["flops_per_second"] = self.flops / seconds
            if self.peak is not None:
                rates["mfu"] = rates["flops_per_second"] / self.peak
        self.examples, self.tokens, self.seconds, self.flops = 0, 0, 0.0, 0
        return rates
