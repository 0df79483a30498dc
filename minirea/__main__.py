"""`python -m minirea` and the `minirea` command: a process of its own."""

import os
import signal
import sys


def command() -> int:
    """Run the command line of this process."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # until there is something to finish: imports take long
    from minirea.cli import run_process

    return run_process()


if __name__ == "__main__":
    sys.exit(command())
