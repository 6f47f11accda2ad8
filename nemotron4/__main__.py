"""``python -m nemotron4``: the command without the installed script."""

from __future__ import annotations

import sys

from nemotron4.cli.main import main

sys.exit(main())
