"""torchrun in a process of its own, a child of launch.node, which reacts to USR1 of that node and to no other signal.

Slurm signals every process of a step. A second signal would end torchrun while its ranks save, so TERM has a handler
that does nothing. SIG_IGN would not do, since the ranks would inherit it.

exit code   2 if a rank left with 2 (gr's code for errors that another try will not cure), else torchrun's
"""

import ctypes
import signal
import socket
import sys

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.signal(signal.SIGHUP, lambda *_: None)
    # If launch.node is killed, the ranks save and leave instead of holding their GPUs.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGUSR1)
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError
    from torch.distributed.run import main as torchrun

    try:
        torchrun()
    except SignalException as end:  # launch.node sent the signal, and reports the outcome of the run
        return 128 + end.sigval
    except ChildFailedError as error:
        if any(failure.exitcode == 2 for failure in error.failures.values()):
            return 2
        sys.stderr.write(f"{error}\n")
        return 1
    except RendezvousError as error:  # without its traceback
        sys.stderr.write(
            f"error: {socket.gethostname()}: not all nodes came together: {error or type(error).__name__}\n"
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
