"""torchrun, whose end by a signal is no traceback: launch.node asked for it, and says what became of the run."""

import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.run import main

if __name__ == "__main__":
    try:
        main()
    except SignalException as end:
        sys.exit(128 + end.sigval)
