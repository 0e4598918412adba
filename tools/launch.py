#!/usr/bin/env python
"""torchrun that ends as the processes it started did: with their status, and without tracebacks of its own.

    python tools/launch.py [arguments of torchrun] SCRIPT [arguments of the script]

tools/dist_train.sh and tools/dist_test.sh use it. torchrun itself shows where in its own code it noticed that a process
has failed, below the one message that says what to do; and a traceback for SIGTERM, which is how Slurm ends a job.
"""

import logging
import signal
import sys

sys.path.pop(0)  # this folder, whose test.py, benchmark.py and the like are no modules

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

_SAID_IT = (2, 130)  # of a command that has shown one message: a mistake, Ctrl-C


def run() -> int:
    """Start the processes and wait for them.

    Returns:
        The status to end with: theirs, or 128 and the number of the signal that ended this process.
    """
    logging.getLogger('torch.distributed.elastic.multiprocessing.api').setLevel(logging.CRITICAL)
    try:
        main()
    except SignalException as stopped:
        if stopped.sigval != signal.SIGINT:  # Ctrl-C reaches the processes, too, which say it
            said = 'what was written stays, and a training goes on with --resume'
            print(f'stopped by {signal.Signals(stopped.sigval).name}; {said}', file=sys.stderr)
        return 128 + int(stopped.sigval)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode in _SAID_IT:
            return failure.exitcode
        how = f'ended with status {failure.exitcode}, see above'
        if failure.exitcode < 0:
            how = f'was ended by {signal.Signals(-failure.exitcode).name}'
            how += ', as the system does when memory runs out' if failure.exitcode == -signal.SIGKILL else ''
        print(f'error: process {rank} {how}; the others were stopped', file=sys.stderr)
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(run())
