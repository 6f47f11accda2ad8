"""Finished rows survive everything, once each; files are whole or absent; another run is refused by name."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
import time
from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest

from nemotron4.errors import ConfigError, DataError, import_optional
from nemotron4.runs import (
    RowLog,
    claim,
    differences,
    held,
    in_flight,
    read_rows,
    replacing,
    write_file,
    write_json,
)

SETTINGS = {"model": "tiny", "sampling": {"seed": 0, "stop_strings": ("a", "b")}}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "rows.jsonl"


def open_log(path: Path, settings: Any = SETTINGS) -> RowLog:
    return RowLog(path, key=itemgetter("row"), settings=settings)


def test_rows_are_read_again_and_of_equal_keys_the_last(path: Path) -> None:
    with open_log(path) as log:
        log.append({"row": 2, "text": "ä"}, {"row": 1})
        log.append({"row": 2, "text": "b"})
    with open_log(path) as log:
        assert log.keys == {1, 2}
        assert log[2] == {"row": 2, "text": "b"}
        assert [row["row"] for row in log.rows] == [2, 1]
    assert [row.get("text") for row in read_rows(path)[1:]] == ["ä", None, "b"]


@pytest.mark.parametrize("torn", [b"", b"{", b'{"row": 9}', b"\0\0\0\n", b'{"row": 9\n{"row": 8}\n'])
def test_a_torn_end_is_cut_off(path: Path, torn: bytes) -> None:
    with open_log(path) as log:
        log.append({"row": 1})
    with path.open("ab") as file:
        file.write(torn)
    assert read_rows(path)[1:] == [{"row": 1}]
    with open_log(path) as log:
        assert log.keys == {1}
        assert log.num_torn_bytes == len(torn)
        log.append({"row": 2})
    with open_log(path) as log:
        assert log.keys == {1, 2}
        assert log.num_torn_bytes == 0


@pytest.mark.parametrize("size", range(0, 120, 7))
def test_a_file_cut_anywhere_continues_with_the_whole_rows_before_the_cut(path: Path, size: int) -> None:
    with open_log(path) as log:
        log.append({"row": 1, "text": "first"}, {"row": 2, "text": "second"})
    os.truncate(path, size)
    whole = path.read_bytes().count(b"\n") - 1
    with open_log(path) as log:
        assert log.keys == set(range(1, whole + 1))


def test_another_run_is_refused_and_the_difference_named(path: Path) -> None:
    with open_log(path):
        pass
    with pytest.raises(ConfigError, match=r"another run: sampling\.seed was 0, is 7"):
        open_log(path, {"model": "tiny", "sampling": {"seed": 7, "stop_strings": ("a", "b")}})


def test_a_foreign_file_is_not_touched(path: Path) -> None:
    path.write_text('{"mine": 1}\n')
    with pytest.raises(DataError, match="is not a partial output"):
        open_log(path)
    with pytest.raises(DataError, match=r"rows\.jsonl:1: the row has no field 'row'"):
        open_log(path, None)
    assert path.read_text() == '{"mine": 1}\n'


def test_two_processes_cannot_write_one_log_or_hold_one_folder(path: Path) -> None:
    with open_log(path), pytest.raises(ConfigError, match="is in use"):
        open_log(path)
    with held(path.parent), pytest.raises(ConfigError, match="is in use"), held(path.parent):
        pass


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No such file or directory"):
        RowLog(tmp_path / "absent" / "rows.jsonl")


def test_a_full_disk_leaves_no_torn_row_for_the_next_one_to_hide_behind(path: Path) -> None:
    with RowLog(path) as log:
        log.append({"id": 1})
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        earlier = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (40, before[1]))
            with pytest.raises(OSError, match="File too large"):
                log.append({"id": 2, "text": "x" * 100})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            signal.signal(signal.SIGXFSZ, earlier)
        log.append({"id": 3})
    with RowLog(path) as log:
        assert log.keys == {1, 3}
        assert log.num_torn_bytes == 0


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    write_json(path, {"a": "ü"})

    def fail() -> None:
        with replacing(path) as stream:
            stream.write(b"half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": "ü"}
    write_file(path, "new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_claimed_folder_names_every_setting_that_differs(tmp_path: Path) -> None:
    claim(tmp_path, {"model": "a", "sampling": {"seed": 0}})
    claim(tmp_path, {"model": "a", "sampling": {"seed": 0}})
    with pytest.raises(ConfigError, match=r"model was 'a', is 'b'; sampling\.seed was 0, is 1"):
        claim(tmp_path, {"model": "b", "sampling": {"seed": 1}})


def test_a_setting_that_an_earlier_version_did_not_record_had_its_default() -> None:
    assert differences({"a": 1}, {"a": 1, "b": None, "s": {"k": 0}}, {"s": {"k": 0}}) == []
    assert differences({"a": 1}, {"a": 1, "s": {"k": 2}}, {"s": {"k": 0}}) == ["s.k was 0, is 2"]


# Work


def worked(
    items: list[float], *, limit: int, is_ordered: bool = False, fails_at: float | None = None
) -> tuple[list[float], int]:
    """What was kept, in order, and the most items that were under way at once."""
    kept: list[float] = []
    running = most = 0

    async def work(item: float) -> float:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(item / 1000)
        running -= 1
        if item == fails_at:
            raise ValueError(item)
        return item

    try:
        asyncio.run(in_flight(items, work, kept.extend, limit=limit, is_ordered=is_ordered))
    except ValueError:
        assert fails_at is not None
    return kept, most


def test_work_is_bounded_and_every_item_is_kept_once() -> None:
    kept, most = worked([3, 1, 2, 5, 4] * 4, limit=3)
    assert sorted(kept) == sorted([3, 1, 2, 5, 4] * 4)
    assert most == 3


def test_ordered_work_is_kept_in_the_items_order() -> None:
    assert worked([9, 1, 5, 2, 8, 0], limit=3, is_ordered=True)[0] == [9, 1, 5, 2, 8, 0]


def test_what_is_finished_when_an_item_fails_is_kept() -> None:
    kept, _ = worked([1, 2, 60, 900], limit=4, fails_at=60)
    assert sorted(kept) == [1, 2]


PROGRAM = """
    import asyncio, sys
    from pathlib import Path
    from nemotron4.cli.main import explained
    from nemotron4.progress import Progress
    from nemotron4.runs import RowLog, in_flight, run_stoppable

    def run():
        with RowLog(Path(sys.argv[1])) as log, Progress(10**6, len(log)) as progress:
            async def work(number):
                await asyncio.sleep(0.001 * (number % 5))
                return {"id": number, "text": "x" * (number % 50)}
            def keep(rows):
                log.append(*rows)
                progress.add(len(rows))
                for row in rows:
                    print(row["id"], flush=True)
            run_stoppable(in_flight((n for n in range(10**6) if n not in log), work, keep, limit=8))
        return 0
    sys.exit(explained(run))
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_rows_reported_before_a_signal_are_there_after_it(path: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-c", textwrap.dedent(PROGRAM), str(path)]
    reported: list[int] = []
    for _ in range(2):
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            reported += [int(process.stdout.readline()) for _ in range(25)]
            process.send_signal(number)
            reported += [int(line) for line in process.stdout.read().splitlines()]
            err = process.stderr.read()
        assert process.returncode == {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}[number]
        assert ("are kept; the same command continues" in err) == (number != signal.SIGKILL)
        assert "Traceback" not in err
    with RowLog(path) as log:
        assert set(reported) <= log.keys
        assert len(reported) == len(set(reported))


def test_a_run_in_the_background_that_ignores_ctrl_c_still_ends_on_sigterm(path: Path) -> None:
    program = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n" + textwrap.dedent(PROGRAM)
    with subprocess.Popen(
        [sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.05)
        process.terminate()
        process.stdout.read()
    assert process.returncode == 143


def test_a_package_that_is_not_there_is_an_error_with_the_command_that_gets_it() -> None:
    assert import_optional("json", "reading").loads("1") == 1
    with pytest.raises(
        ConfigError, match="plots needs the package wandbx, which cannot be imported"
    ) as error:
        import_optional("wandbx.figure", "plots")
    assert error.value.hint == "pip install 'wandbx'"


def test_an_error_names_the_file_that_was_meant_and_not_ours_in_between(tmp_path: Path) -> None:
    path = tmp_path / "absent" / "out.json"
    with pytest.raises(FileNotFoundError) as caught:
        write_file(path, "text")
    assert caught.value.filename == str(path)
