"""``python -m nemotron4.cli.lifeline COMMAND ...``: a nemotron4 command that ends when its parent does.

The parent holds the writing end of this process's standard input. Whatever ends the parent, kill -9 included,
closes it, on every system.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

from nemotron4.cli.main import main

GRACE_S = 5.0


def end_with_standard_input() -> None:
    """Watch standard input from a thread; at its end ask this process to stop, then insist."""

    def watch() -> None:
        while os.read(sys.stdin.fileno(), 1024):
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE_S)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    end_with_standard_input()
    sys.exit(main())
