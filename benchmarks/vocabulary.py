"""CPU seconds to look batches of values up in a vocabulary: Vocabulary.lookup beside pyarrow's index_in.

    python -m benchmarks.vocabulary --values 1000000 --batches 1000 --rows 512

index_in, which looked values up before, makes a table of the whole vocabulary at every call; it is given a fiftieth of
the batches. Results must be equal.
"""

import argparse
import time
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gr.data.vocabulary import Vocabulary


def seconds(look_up: Callable[[pa.Array], np.ndarray], batches: list[pa.Array]) -> tuple[float, list[np.ndarray]]:
    """CPU seconds a batch, and what was found."""
    began = time.process_time()
    found = [look_up(batch) for batch in batches]
    return (time.process_time() - began) / len(batches), found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--values", type=int, default=1_000_000)
    parser.add_argument("--batches", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=512)
    options = parser.parse_args()
    random, size = np.random.default_rng(0), options.values
    numbers = np.sort(random.choice(1 << 40, size, replace=False))
    print("| values | search, CPU-s | index_in, CPU-s, of a fiftieth | ratio |\n|---|---|---|---|")
    for kind, values in (("int64", pa.array(numbers)), ("text", pa.array(sorted(f"user-{n:x}" for n in numbers)))):
        vocabulary = Vocabulary("x", np.arange(1, size + 1), values)
        batches = [values.take(pa.array(random.integers(0, size, options.rows))) for _ in range(options.batches)]
        few = batches[: -(-options.batches // 50)]
        own, found = seconds(vocabulary.ids, batches)
        other, expected = seconds(lambda batch: pc.index_in(batch, value_set=values).to_numpy() + 1, few)  # noqa: B023
        assert all(np.array_equal(*pair) for pair in zip(found, expected, strict=False))
        print(f"| {kind} | {own * options.batches:.2f} | {other * options.batches:.0f} | {other / own:.0f} |")


if __name__ == "__main__":
    main()
