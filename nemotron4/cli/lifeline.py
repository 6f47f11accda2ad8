"""``python -m nemotron4.cli.lifeline COMMAND ...``: a nemotron4 command that ends when its parent does.

``python SCRIPT ...`` runs a script in the same way.

The parent holds the writing end of this process's standard input. Whatever ends the parent, kill -9 included,
closes it, on every system.
"""

from __future__ import annotations

import os
import runpy
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
    if sys.argv[1:2] == ["python"]:
        del sys.argv[:2]
        sys.path.insert(0, os.path.dirname(sys.argv[0]))
        runpy.run_path(sys.argv[0], run_name="__main__")
    else:
        sys.exit(main())
