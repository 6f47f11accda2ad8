"""Finished rows survive everything, once each, and become one file in input order."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from nemotron4.cli.journal import Journal
from nemotron4.errors import DataError

RUN = {"model": "tiny", "sampling": {"seed": 0, "stop_strings": ("a", "b")}}


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "answers.jsonl"


def _partial(output: Path) -> Path:
    return output.with_name(output.name + ".partial")


def _lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_finished_file_is_in_input_order_and_alone(output: Path) -> None:
    with Journal(output, RUN) as journal:
        journal.append([(3, {"text": "c"})])
        journal.append([(1, {"text": "ä"}), (2, {"text": "b"})])
        assert not output.exists()
        journal.finish()
    assert _lines(output) == [{"text": "ä"}, {"text": "b"}, {"text": "c"}]
    assert not _partial(output).exists()
    assert json.loads(Path(f"{output}.run.json").read_text())["model"] == "tiny"


def test_same_run_continues(output: Path) -> None:
    with Journal(output, RUN) as journal:
        journal.append([(2, {"text": "b"})])
    with Journal(output, RUN) as journal:
        assert journal.rows_done == {2}
        journal.append([(1, {"text": "a"})])
        journal.finish()
    assert _lines(output) == [{"text": "a"}, {"text": "b"}]


@pytest.mark.parametrize(
    "torn", [b"", b"{", b'{"row": 9, "value": {}}', b"\0\0\0\n", b'{"row": 9\n{"row": 8}\n']
)
def test_torn_end_is_cut_off(output: Path, torn: bytes) -> None:
    with Journal(output, RUN) as journal:
        journal.append([(1, {"text": "a"})])
    with _partial(output).open("ab") as file:
        file.write(torn)
    with Journal(output, RUN) as journal:
        assert journal.rows_done == {1}
        assert journal.num_torn_bytes == len(torn)
        journal.append([(2, {"text": "b"})])
    with Journal(output, RUN) as journal:
        assert journal.rows_done == {1, 2}
        assert journal.num_torn_bytes == 0


@pytest.mark.parametrize("size", range(0, 120, 7))
def test_file_cut_anywhere_continues_with_the_whole_rows_before_the_cut(output: Path, size: int) -> None:
    with Journal(output, RUN) as journal:
        journal.append([(1, {"text": "first"}), (2, {"text": "second"})])
    os.truncate(_partial(output), size)
    whole = _partial(output).read_bytes().count(b"\n") - 1
    with Journal(output, RUN) as journal:
        assert journal.rows_done == set(range(1, whole + 1))


def test_another_run_is_refused_and_the_difference_named(output: Path) -> None:
    with Journal(output, RUN):
        pass
    with pytest.raises(DataError, match=r"another run: sampling\.seed was 0, is 7"):
        Journal(output, {"model": "tiny", "sampling": {"seed": 7, "stop_strings": ("a", "b")}})


def test_complete_output_of_the_same_run_is_complete(output: Path) -> None:
    with Journal(output, RUN) as journal:
        journal.finish()
    with Journal(output, RUN) as journal:
        assert journal.is_complete


def test_complete_output_of_another_run_is_not_overwritten(output: Path) -> None:
    with Journal(output, RUN) as journal:
        journal.finish()
    with pytest.raises(DataError, match="of another run: model was 'tiny', is 'other'"):
        Journal(output, {**RUN, "model": "other"})


def test_foreign_file_is_not_overwritten(output: Path) -> None:
    output.write_text("precious\n")
    with pytest.raises(DataError, match="exists already"):
        Journal(output, RUN)
    assert output.read_text() == "precious\n"


def test_foreign_partial_file_is_not_touched(output: Path) -> None:
    _partial(output).write_text('{"mine": 1}\n')
    with pytest.raises(DataError, match="is not a partial output"):
        Journal(output, RUN)
    assert _partial(output).read_text() == '{"mine": 1}\n'


def test_two_processes_cannot_write_one_output(output: Path) -> None:
    with Journal(output, RUN), pytest.raises(DataError, match="is in use"):
        Journal(output, RUN)


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No such file or directory"):
        Journal(tmp_path / "absent" / "out.jsonl", RUN)


def test_killed_between_the_two_renames_finishes_at_the_next_start(output: Path) -> None:
    with Journal(output, RUN) as journal:
        journal.append([(1, {"text": "a"})])
        kept = _partial(output).read_bytes()
        journal.finish()
    _partial(output).write_bytes(kept)
    with Journal(output, RUN) as journal:
        assert not journal.is_complete
        journal.finish()
    assert _lines(output) == [{"text": "a"}]


def test_rows_reported_before_a_kill_are_there_after_it(output: Path) -> None:
    program = """
        import sys
        from pathlib import Path
        from nemotron4.cli.journal import Journal
        with Journal(Path(sys.argv[1]), {"n": 1}) as journal:
            for number in range(1, 1_000_000):
                journal.append([(number, {"text": "x" * (number % 50)})])
                print(number, flush=True)
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(output)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        reported = [int(process.stdout.readline()) for _ in range(25)]
        process.send_signal(signal.SIGKILL)
        reported += [int(line) for line in process.stdout.read().splitlines()]
    with Journal(output, {"n": 1}) as journal:
        assert set(reported) <= journal.rows_done
        assert journal.rows_done <= set(range(1, reported[-1] + 2))
