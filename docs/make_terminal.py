"""Writes docs/terminal.svg: a still picture of a real conversation with the demo model in a terminal.

.venv/bin/python docs/make_terminal.py ["QUESTION" [OPTIONS OF nemotron4 chat smollm2]]
"""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import tempfile
import textwrap
from html import escape
from pathlib import Path

PICTURE = Path(__file__).with_name("terminal.svg")
OPTIONS = ["--temperature", "0", "--max-new-tokens", "120"]
# Waiting, times (which say nothing of a busy machine) and the path of the cache.
WAITING = re.compile(
    r"(loading the model|generating up to .* tokens)( \.\.\.|: .*)|ready after .*|\d+ tokens in .*|/.*|"
    r"(real|user|sys)\t.*"
)
PROMPT = "\n> "
COLUMNS = 88
CHARACTER, LINE, MARGIN, BAR = 8.4, 20, 18, 34  # pixels


def demo() -> str:
    """What scripts/demo shows, without the lines about waiting and time."""
    command = [sys.executable, "-m", "nemotron4.cli.demo", "--port", "1424"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stdout)
    return without_waiting(done.stdout)


def without_waiting(text: str) -> str:
    kept = [line for line in text.splitlines() if not WAITING.fullmatch(line)]
    return "$ scripts/demo\n" + re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).strip()


def record(question: str, options: list[str]) -> str:
    """What a terminal shows from the command to the end of the answer."""
    child, terminal = pty.fork()
    if child == 0:
        # A folder of its own, so that no earlier conversation is offered.
        os.environ |= {"XDG_STATE_HOME": tempfile.mkdtemp(), "TERM": "dumb", "COLUMNS": str(COLUMNS)}
        os.execv(sys.executable, [sys.executable, "-m", "nemotron4", "chat", "smollm2", *options])
    shown = ""
    try:
        shown = _read_until(terminal, shown, PROMPT)
        os.write(terminal, f"{question}\n".encode())
        shown = _read_until(terminal, shown + "\0", PROMPT)
        os.write(terminal, b"/exit\n")
    finally:
        os.close(terminal)
        os.waitpid(child, 0)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown).replace("\0", "")
    return f"$ nemotron4 chat smollm2 {' '.join(options)}\n{plain.removesuffix(PROMPT).rstrip()}"


def _read_until(terminal: int, shown: str, end: str) -> str:
    """All output up to ``end``, which must come after what was there."""
    start = len(shown)
    while end not in shown[start:] or not shown.endswith(end):
        try:
            data = os.read(terminal, 4096)
        except OSError:  # the command has ended
            data = b""
        if not data:
            raise SystemExit(f"the command ended early:\n{shown}")
        shown += data.decode(errors="replace").replace("\r", "")
    return shown


def svg(text: str) -> str:
    """The text as a window of a terminal; a question is bold."""
    lines = [part for line in text.splitlines() for part in textwrap.wrap(line, COLUMNS) or [""]]
    width = round(2 * MARGIN + COLUMNS * CHARACTER)
    height = BAR + 2 * MARGIN + LINE * len(lines)
    rows = []
    for number, line in enumerate(lines):
        style = ' font-weight="bold" fill="#9be28f"' if line.startswith(("$ ", "> ", "--- ")) else ""
        y = BAR + MARGIN + LINE * number + 14
        rows.append(f'<text x="{MARGIN}" y="{y}" xml:space="preserve"{style}>{escape(line)}</text>')
    dots = "".join(f'<circle cx="{20 + 18 * n}" cy="17" r="5.5" fill="#5c6370"/>' for n in range(3))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" role="img"><title>{escape(lines[0])}</title>'
        f'<rect width="{width}" height="{height}" rx="8" fill="#16181d"/>{dots}'
        f'<g font-family="ui-monospace, Menlo, Consolas, monospace" font-size="14" fill="#d7dae0">\n'
        + "\n".join(rows)
        + "\n</g></svg>\n"
    )


if __name__ == "__main__":
    shown = record(sys.argv[1], sys.argv[2:] or OPTIONS) if sys.argv[1:] else demo()
    PICTURE.write_text(svg(shown), encoding="utf-8")
