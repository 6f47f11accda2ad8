"""HumanEval and MBPP: from a chat answer to a program, and from a program to pass or fail.

MBPP extraction is that of NVIDIA's packaged alignment prompt (nvidia-bigcode-eval 26.3, ``mbppplus_nemo``);
tests are the original asserts. HumanEval follows the packaged idea (the code block, below the signature) and
keeps what a function needs when the answer repeats it whole: the prompt's imports and helper functions.
"""

from __future__ import annotations

import ast
import builtins
import re
import textwrap
from collections.abc import Sequence
from typing import Literal

from nemotron4.grading.sandbox import Execution, Sandbox
from nemotron4.grading.score import Score

TIMEOUT_S = 10.0
Extraction = Literal["extracted", "found", "raw"]

_FENCED = re.compile(r"```[ \t]*(?:[A-Za-z0-9_+-]*)[ \t]*\r?\n(.*?)(?:\n[ \t]*```|\Z)", re.DOTALL)


def extract_mbpp(response: str) -> str:
    """The first ```` ```python ```` block, cut before its first assert or test comment.

    Without such a block: the text before the first fence, less the template's placeholder comment.
    """
    _, fence, after = response.partition("```python\n")
    if fence:
        code = after.split("```")[0]
        for cut in ("assert", "# Test", "# Unit"):
            code = code.split(cut)[0]
        return code.strip()
    return response.replace("# Your codes here\n", "").split("```")[0].strip()


def extract_humaneval(response: str, entry_point: str) -> str:
    """The fenced block that defines the function, else the first block, else the whole reply."""
    blocks = [match.group(1) for match in _FENCED.finditer(response)]
    defining = [block for block in blocks if _defines(block, entry_point)]
    if defining or blocks:
        return (defining or blocks)[0].rstrip() + "\n"
    return response.rstrip() + "\n"


def find_program(response: str, function: str | None) -> str:
    """The program of an answer, whatever its form: thoughts removed, out of any fence, or without one.

    Of several blocks the first that defines the function, else the first. Without a fence the text between
    the first and the last line that reads as a program. Asserts at the top level are the answer's own tests.
    """
    text = re.sub(r"<think>.*?(</think>|\Z)", "", response, flags=re.DOTALL)
    text = text.rpartition("</think>")[2]  # some servers leave the opening mark in the prompt
    blocks = _fenced_blocks(text)
    defining = [block for block in blocks if function and _defines(block, function)]
    if not blocks:
        blocks = [_unfenced(text)]
    lines = _lines((defining or blocks)[0])
    return "\n".join(line for line in lines if not line.startswith("assert ")).rstrip() + "\n"


def _lines(text: str) -> list[str]:
    """Python's own line ends alone: a text in quotes may hold others, such as U+2028."""
    return re.split(r"\r\n|\r|\n", text)


def _fenced_blocks(text: str) -> list[str]:
    """Blocks of Markdown (CommonMark 4.5): at least three backticks or tildes, at any indentation."""
    blocks: list[list[str]] = []
    fence = ""
    for line in _lines(text):
        mark = re.match(r"[ \t]*(?:[-*+]|\d+[.)])?[ \t]*(`{3,}|~{3,})(.*)", line)
        if fence:
            closes = mark is not None and mark[1].startswith(fence) and not mark[2].strip()
            fence = "" if closes else fence
            if not closes:
                blocks[-1].append(line)
        elif mark is not None and "`" not in mark[2]:
            fence = mark[1]
            blocks.append([])
    return [textwrap.dedent("\n".join(block)) for block in blocks if any(line.strip() for line in block)]


_CODE_LINE = re.compile(r"(?:async def|def|class|import|from|@)\b|@\w")


def _unfenced(text: str) -> str:
    """From the first line that opens a program to the last at which it still parses; else the whole text."""
    lines = _lines(text)
    start = next((n for n, line in enumerate(lines) if _CODE_LINE.match(line)), None)
    if start is None:
        return text
    for end in range(len(lines), start, -1):
        program = "\n".join(lines[start:end])
        try:
            ast.parse(program)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue
        return program
    return text


def called_function(tests: Sequence[str]) -> str | None:
    """The function that the first assert calls: ``assert set(f(1)) == ...`` calls ``f``."""
    names = re.findall(r"\b([A-Za-z_]\w*)\(", tests[0]) if tests else []
    own = [name for name in names if not hasattr(builtins, name)]
    return own[0] if own else None


def _defines(code: str, function: str) -> bool:
    return (
        re.search(rf"^[ \t]*(?:async[ \t]+)?def[ \t]+{re.escape(function)}\b", code, re.MULTILINE) is not None
    )


def humaneval_program(code: str, prompt: str, test: str, entry_point: str) -> str:
    """Prompt, completion, test, call. A completion that repeats the function replaces the prompt's stub."""
    if _defines(code, entry_point):
        head = re.split(rf"^def[ \t]+{re.escape(entry_point)}\b", prompt, maxsplit=1, flags=re.MULTILINE)[0]
        code = head + "\n" + code
    else:
        code = prompt + code
    return f"{code}\n{test}\ncheck({entry_point})\n"


def mbpp_program(code: str, tests: Sequence[str], setup: str | Sequence[str]) -> str:
    """Code, setup (``test_setup_code``, which may use the code's classes, or ``test_imports``), asserts."""
    return "\n".join([code, *([setup] if isinstance(setup, str) else setup), *tests]) + "\n"


def run_program(program: str, sandbox: Sandbox, *, timeout_s: float = TIMEOUT_S) -> Score:
    """1 if the program reaches its end in time. A sandbox that fails raises: it is no wrong answer."""
    return _as_score(sandbox.run(program, timeout_s=timeout_s))


def _as_score(execution: Execution) -> Score:
    return Score(value=float(execution.is_passed), reason=execution.reason)


def humaneval(
    response: str,
    prompt: str,
    test: str,
    entry_point: str,
    sandbox: Sandbox,
    *,
    extraction: Extraction = "extracted",
    timeout_s: float = TIMEOUT_S,
) -> Score:
    code = response if extraction == "raw" else extract_humaneval(response, entry_point)
    program = humaneval_program(code, prompt, test, entry_point)
    return run_program(program, sandbox, timeout_s=timeout_s)


def mbpp(
    response: str,
    tests: Sequence[str],
    setup: str | Sequence[str],
    sandbox: Sandbox,
    *,
    extraction: Extraction = "extracted",
    timeout_s: float = TIMEOUT_S,
) -> Score:
    code = response if extraction == "raw" else extract_mbpp(response)
    return run_program(mbpp_program(code, tests, setup), sandbox, timeout_s=timeout_s)
