"""Says when requests are due. It is run as a script, in a process of its own, and so needs nothing but Python.

A load generator inside the process that answers falls behind when that is busy, and then offers less than it says. As
the boundary between MLPerf's LoadGen and the system under test, only the numbers of requests pass through a pipe.

stdin: the times of all requests in seconds from the start, float64, ascending. stdout: the start by time.monotonic(),
float64, then, whenever a request is due, how many have been due so far, uint32.
"""

import array
import os
import sys
import time


def main() -> None:
    arrivals = array.array("d", sys.stdin.buffer.read())
    started = time.monotonic()
    os.write(1, array.array("d", [started]).tobytes())
    due, count = 0, len(arrivals)
    while due < count:
        if (wait := started + arrivals[due] - time.monotonic()) > 0:
            time.sleep(wait)
        passed = time.monotonic() - started
        while due < count and arrivals[due] <= passed:
            due += 1
        os.write(1, due.to_bytes(4, sys.byteorder))


if __name__ == "__main__":
    main()
