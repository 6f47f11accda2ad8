from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemotron4.grading import code
from nemotron4.grading.sandbox import Sandbox, SandboxError, open_sandbox

PROMPT = 'from typing import List\n\n\ndef total(numbers: List[int]) -> int:\n    """ Sum. """\n'
BODY = "    result = 0\n    for number in numbers:\n        result += number\n    return result\n"
TEST = "def check(candidate):\n    assert candidate([1, 2]) == 3\n    assert candidate([]) == 0\n"


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    try:
        return open_sandbox()
    except SandboxError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(
    ("response", "value"),
    [
        (BODY, 1),
        (PROMPT + BODY, 1),
        (f"Here it is:\n```python\n{PROMPT}{BODY}```\nIt adds.", 1),
        # repeats the function without the import that its signature needs
        (f"```python\ndef total(numbers: List[int]) -> int:\n{BODY}```", 1),
        (f"```\ndef total(numbers):\n{BODY}```", 1),
        (f"```python\nprint('example')\n```\nand\n```python\ndef total(numbers):\n{BODY}```", 1),
        (f"Voilà la réponse :\n```python\ndef total(numbers):\n{BODY}\n", 1),  # fence never closed
        ("```python\ndef total(numbers):\n    return 3\n```", 0),
        ("```python\nimport sys\ndef total(numbers):\n    sys.exit(0)\n```", 0),
        ("    pass\n", 0),
        ("I cannot help with that.", 0),
        ("", 0),
    ],
)
def test_humaneval_answers(sandbox: Sandbox, response: str, value: int) -> None:
    assert code.humaneval(response, PROMPT, TEST, "total", sandbox).value == value


def test_the_raw_reading_does_not_look_for_a_code_block(sandbox: Sandbox) -> None:
    fenced = f"```python\n{PROMPT}{BODY}```"
    assert code.humaneval(fenced, PROMPT, TEST, "total", sandbox, extraction="raw").value == 0
    assert code.humaneval(BODY, PROMPT, TEST, "total", sandbox, extraction="raw").value == 1


@pytest.mark.parametrize(
    ("response", "extracted"),
    [
        ("```python\ndef f():\n    return 1\n\nassert f() == 1\n```", "def f():\n    return 1"),
        ("x\n```python\na = 1\n# Test it\n```", "a = 1"),
        ("def f(): return 1", "def f(): return 1"),
        ("# Your codes here\ndef f(): return 1\n```", "def f(): return 1"),
        ("", ""),
    ],
)
def test_mbpp_extraction(response: str, extracted: str) -> None:
    assert code.extract_mbpp(response) == extracted


def test_mbpp_setup_may_use_the_answers_classes(sandbox: Sandbox) -> None:
    answer = "class Node:\n    pass\ndef f(node):\n    return 1"
    assert code.mbpp(answer, ["assert f(root) == 1"], "root = Node()", sandbox).value == 1
    assert code.mbpp("x = 1", ["assert math.pi > x"], ["import math"], sandbox).value == 1
    assert code.mbpp("", ["assert f() == 1"], "", sandbox).value == 0


@given(st.text())
def test_extraction_never_raises_and_is_idempotent(response: str) -> None:
    once = code.extract_mbpp(response)
    assert code.extract_mbpp(once) == once.replace("# Your codes here\n", "").strip()
    body = code.extract_humaneval(response, "f")
    if "```" not in body:
        assert code.extract_humaneval(body, "f") == body


def _data() -> Path:
    if "NEMOTRON4_SHARED" not in os.environ:
        pytest.skip("set NEMOTRON4_SHARED to the folder that holds data/eval")
    return Path(os.environ["NEMOTRON4_SHARED"]) / "data" / "eval"


@pytest.mark.slow
def test_humaneval_reference_solutions_all_pass_and_stubs_all_fail(sandbox: Sandbox) -> None:
    with gzip.open(_data() / "humaneval/HumanEval.jsonl.gz", "rt") as lines:
        rows = [json.loads(line) for line in lines]
    assert len(rows) == 164
    for row in rows:
        given = (row["prompt"], row["test"], row["entry_point"], sandbox)
        fenced = f"```python\n{row['prompt']}{row['canonical_solution']}\n```"
        assert code.humaneval(fenced, *given).value == 1, row["task_id"]
        assert code.humaneval(row["canonical_solution"], *given).value == 1, row["task_id"]
        assert code.humaneval("    pass\n", *given).value == 0, row["task_id"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_mbpp_reference_solutions_all_pass_and_stubs_all_fail(sandbox: Sandbox) -> None:
    with gzip.open(_data() / "mbpp/mbpp.jsonl.gz", "rt") as lines:
        full = [json.loads(line) for line in lines]
    with gzip.open(_data() / "mbpp/sanitized-mbpp.json.gz", "rt") as text:
        sanitized = json.load(text)
    test_split = [row for row in full if 11 <= row["task_id"] <= 510]
    assert (len(test_split), len(sanitized)) == (500, 427)
    for row in [*test_split, *sanitized]:
        given = (row["test_list"], row.get("test_setup_code", row.get("test_imports")), sandbox)
        assert code.mbpp(f"```python\n{row['code']}\n```", *given).value == 1, row["task_id"]
    for row in test_split[:50]:
        stub = f"def {row['test_list'][0].split('(')[0].split()[-1]}(*arguments):\n    pass"
        assert code.mbpp(stub, row["test_list"], row["test_setup_code"], sandbox).value == 0


DEFINITION = "def f(x):\n    return x + 1\n"


@pytest.mark.parametrize(
    "response",
    [
        DEFINITION,
        f"```python\n{DEFINITION}```",
        f"```{DEFINITION}".replace("```def", "```\ndef"),  # never closed
        f"~~~\n{DEFINITION}~~~",
        "1. Here it is:\n\n   ```python\n   def f(x):\n       return x + 1\n   ```\n",
        "- ```py\n  def f(x):\n      return x + 1\n  ```",
        f"<think>```python\ndef f(x):\n    return 0\n```</think>\n~~~python\n{DEFINITION}~~~",
        f"I draft: def f(x): return 0\n</think>\n{DEFINITION}",
        f"Sure!\n\n{DEFINITION}\nThis adds one.",
        f"```\npip install x\n```\n```python\n{DEFINITION}```",
        f"```python\n{DEFINITION}\nassert f(1) == 3\n```",
    ],
)
def test_the_program_is_found_in_every_form_of_an_answer(response: str) -> None:
    assert code.find_program(response, "f").strip() == DEFINITION.strip()


def test_an_answer_that_is_only_the_body_stays_one() -> None:
    assert code.find_program("    return x + 1", "f") == "    return x + 1\n"
    assert code.find_program("<think>I never stop thinking ```python\ndef f(x): pass", "f") == "\n"


def test_the_function_that_the_first_assert_calls_is_found() -> None:
    assert code.called_function(["assert set(similar((3, 4), (5,))) == set()"]) == "similar"
    assert code.called_function(["assert len([]) == 0"]) is None


def test_a_text_in_quotes_keeps_the_line_ends_that_are_none_of_python() -> None:
    program = "def f():\n    return 'a\u2028b\x85'\n"
    assert code.find_program(f"```python\n{program}```", "f") == program
    assert code.find_program(program.replace("\n", "\r\n"), "f").strip() == program.strip()
