"""``chat``: turns, commands, interruption; in a real terminal and over a pipe."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nemotron4.cli.console import ask_word, read_line
from nemotron4.cli.conversation import Chat
from nemotron4.engine import SamplingParams
from nemotron4.errors import DataError, Nemotron4Error, RequestError, TemplateError
from nemotron4.inference.fake import FakeEngine
from nemotron4.records import Conversation, Message, read
from nemotron4.text.prompt import nemotron4

PARAMS = SamplingParams(max_new_tokens=40, temperature=0)


def _reply(prompt: str) -> str:
    """Says how many turns it saw and what the last one was."""
    turns = prompt.split("<extra_id_1>User\n")[1:]
    return f"{len(turns)}: {turns[-1].splitlines()[0].upper()}"


def _engine(**settings: object) -> FakeEngine:
    return FakeEngine(_reply, prompt_format=nemotron4(), **settings)  # type: ignore[arg-type]


def _talk(chat: Chat, *lines: str, is_interactive: bool = False) -> None:
    remaining = iter(lines)

    def read_line() -> str:
        try:
            return next(remaining)
        except StopIteration:
            raise EOFError from None

    chat.run(read_line, is_interactive=is_interactive)


def test_each_line_is_answered_with_the_turns_before_it() -> None:
    output = io.StringIO()
    chat = Chat(_engine(), PARAMS, output=output)
    _talk(chat, "hello", "", "and now")
    assert output.getvalue() == "1: HELLO\n2: AND NOW\n"
    assert chat.messages == (
        Message("user", "hello"),
        Message("assistant", "1: HELLO"),
        Message("user", "and now"),
        Message("assistant", "2: AND NOW"),
    )


def test_answer_is_written_as_it_comes() -> None:
    writes: list[str] = []

    class Output(io.StringIO):
        def write(self, text: str) -> int:
            writes.append(text)
            return len(text)

    _talk(Chat(_engine(), PARAMS, output=Output()), "hello")
    assert len([text for text in writes if text]) > 4


def test_saved_conversation_is_a_row_of_fine_tuning_and_loads_again(tmp_path: Path) -> None:
    path = tmp_path / "talk.jsonl"
    first = Chat(_engine(), PARAMS, system="Be short.", output=io.StringIO())
    _talk(first, "hello", f"/save {path}")
    (row,) = read(path, Conversation)
    assert row.messages == first.messages
    second = Chat(_engine(), PARAMS, output=io.StringIO())
    _talk(second, f"/load {path}", "again")
    assert second.messages[:3] == first.messages
    assert second.messages[-1] == Message("assistant", "2: AGAIN")


def test_reset_forgets_the_turns_and_keeps_the_system_message() -> None:
    chat = Chat(_engine(), PARAMS, output=io.StringIO())
    _talk(chat, "/system Be kind.", "hello", "/reset")
    assert chat.messages == (Message("system", "Be kind."),)
    _talk(chat, "/system")
    assert chat.messages == ()


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    _talk(Chat(_engine(), PARAMS), "/help")
    captured = capsys.readouterr()
    assert captured.out == ""
    for name in ("/save", "/load", "/system", "/reset", "Ctrl-C", "Ctrl-D"):
        assert name in captured.err


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/svae x", "did you mean '/save'?"),
        ("/save", "/save needs a file name"),
        ("/save x", "nothing to save yet"),
        ("/load", "/load needs a file name"),
        ("/load /absent/file", "cannot be read"),
    ],
)
def test_wrong_command_is_told_and_the_conversation_goes_on(
    line: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    output = io.StringIO()
    _talk(Chat(_engine(), PARAMS, output=output), line, "hello", is_interactive=True)
    assert words in capsys.readouterr().err
    assert output.getvalue() == "1: HELLO\n"


def test_error_over_a_pipe_ends_the_program() -> None:
    with pytest.raises(Nemotron4Error, match="unknown command"):
        _talk(Chat(_engine(), PARAMS, output=io.StringIO()), "/svae x", "hello")


def test_answer_never_exceeds_the_context() -> None:
    output = io.StringIO()
    _talk(Chat(_engine(context_length=60), PARAMS, output=output), "h" * 25)
    assert output.getvalue().startswith("1: HH")
    assert len(output.getvalue()) < 28


def test_conversation_longer_than_the_context_says_the_numbers_and_is_not_kept() -> None:
    chat = Chat(_engine(context_length=40), PARAMS, output=io.StringIO())
    with pytest.raises(RequestError, match=r"has \d+ tokens; the model reads 40"):
        _talk(chat, "h" * 100)
    assert chat.messages == ()


def test_model_without_a_template_is_refused() -> None:
    with pytest.raises(TemplateError, match="no chat template"):
        _talk(Chat(FakeEngine("x"), PARAMS), "hello")


PROGRAM = """
    import sys
    from types import SimpleNamespace
    from typing import Any
    from nemotron4.cli.commands import Command
    from nemotron4.cli.main import main
    from nemotron4.inference.fake import FakeEngine
    from nemotron4.text.prompt import nemotron4

    def fake_load(model: str, **settings: Any) -> FakeEngine:
        text = "slow " * 2000 if "slow" in sys.argv else "Hello to you."
        return FakeEngine(text, prompt_format=nemotron4(), context_length=20000, delay_s=0.005)

    sys.modules["nemotron4.inference.load"] = SimpleNamespace(load=fake_load)  # no torch in these tests
    table = {"chat": Command("nemotron4.cli.chat:chat", "Chat")}
    sys.exit(main(["chat", *[word for word in sys.argv[1:] if word != "slow"]], table))
"""


class Terminal:
    """The program on a pseudo-terminal, and what a person would see there."""

    def __init__(self, *arguments: str) -> None:
        self.pid, self._descriptor = pty.fork()
        if self.pid == 0:
            os.execv(sys.executable, [sys.executable, "-c", textwrap.dedent(PROGRAM), *arguments])
        self.shown = ""

    def type(self, text: str) -> None:
        os.write(self._descriptor, text.encode())

    def read_until(self, is_there: Callable[[str], bool]) -> None:
        deadline = time.monotonic() + 30
        while not is_there(self.shown):
            assert time.monotonic() < deadline, self.shown
            if select.select([self._descriptor], [], [], 0.2)[0]:
                try:
                    data = os.read(self._descriptor, 65536)
                except OSError:  # the program closed its side
                    data = b""
                assert data or is_there(self.shown), self.shown
                self.shown += data.decode(errors="replace").replace("\r\n", "\n")

    def wait_for(self, text: str, *, count: int = 1) -> None:
        self.read_until(lambda shown: shown.count(text) >= count)

    def interrupt_at_prompt(self) -> None:
        """Ctrl-C until a new prompt follows: one that comes before the line editor reads is lost."""
        num_prompts = self.shown.count("> ")
        for _ in range(20):
            self.type("\x03")
            until = time.monotonic() + 1
            while time.monotonic() < until:
                if select.select([self._descriptor], [], [], 0.1)[0]:
                    data = os.read(self._descriptor, 65536)
                    self.shown += data.decode(errors="replace").replace("\r\n", "\n")
                if self.shown.count("> ") > num_prompts:
                    return
        raise AssertionError(self.shown)

    def exit_status(self) -> int:
        _, status = os.waitpid(self.pid, 0)
        os.close(self._descriptor)
        return os.waitstatus_to_exitcode(status)


def test_in_a_terminal_answers_stream_ctrl_c_stops_one_and_ctrl_d_leaves(tmp_path: Path) -> None:
    path = tmp_path / "talk.jsonl"
    terminal = Terminal("tiny", "--max-new-tokens", "15000", "slow")
    terminal.wait_for("> ")
    assert "Ctrl-C stops an answer" in terminal.shown
    terminal.type("tell me\n")
    terminal.wait_for("slow slow")
    terminal.type("\x03")
    terminal.wait_for("(stopped; Ctrl-D leaves)")
    terminal.wait_for("> ", count=2)
    terminal.type(f"/save {path}\n")
    terminal.wait_for("saved 2 messages")
    terminal.wait_for("> ", count=3)
    terminal.type("\x04")
    assert terminal.exit_status() == 0
    assert "Traceback" not in terminal.shown
    (row,) = [json.loads(line) for line in path.read_text().splitlines()]
    assert row["messages"][1]["content"].startswith("slow slow")


def test_ctrl_c_at_the_prompt_leaves_the_chat_running() -> None:
    terminal = Terminal("tiny")
    terminal.wait_for("> ")
    terminal.interrupt_at_prompt()
    num_prompts = terminal.shown.count("> ")
    terminal.type("hi\n")
    terminal.wait_for("Hello to you.")
    terminal.wait_for("> ", count=num_prompts + 1)
    terminal.type("\x04")
    assert terminal.exit_status() == 0
    assert "Traceback" not in terminal.shown


def test_over_a_pipe_only_the_answers_reach_stdout() -> None:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM), "tiny"],
        input="hi\nand again",
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "Hello to you.\nHello to you.\n", "")


def test_interrupted_over_a_pipe_it_ends_with_130() -> None:
    command = [sys.executable, "-c", textwrap.dedent(PROGRAM), "tiny", "--max-new-tokens", "15000", "slow"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("hi\n")
        process.stdin.flush()
        assert process.stdout.read(4) == "slow"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in err


def test_a_message_of_several_lines_ends_with_its_mark() -> None:
    output = io.StringIO()
    chat = Chat(_engine(), PARAMS, output=output)
    _talk(chat, '"""one', "two", 'three"""', '"""alone"""')
    assert [message.content for message in chat.messages if message.role == "user"] == [
        "one\ntwo\nthree",
        "alone",
    ]


def test_piped_commands_leave_too_and_piped_words_are_messages() -> None:
    output = io.StringIO()
    _talk(Chat(_engine(), PARAMS, output=output), "bye", "/exit", "more")
    assert output.getvalue() == "1: BYE\n"


@pytest.mark.parametrize("word", ["/exit", "/quit", "/bye", "exit"])
def test_every_usual_word_leaves(word: str) -> None:
    chat = Chat(_engine(), PARAMS, output=io.StringIO())
    _talk(chat, "hello", word, "not read", is_interactive=True)
    assert len(chat.messages) == 2


def test_a_misspelt_command_never_leads_to_one_that_forgets(capsys: pytest.CaptureFixture[str]) -> None:
    chat = Chat(_engine(), PARAMS, output=io.StringIO())
    _talk(chat, "hello", "/rest", "/rset", "/systen", is_interactive=True)
    told = capsys.readouterr().err
    assert told.count("unknown command") == 3
    assert "/reset'" not in told
    assert "/system'" not in told


def test_a_file_that_cannot_be_written_costs_neither_the_chat_nor_the_conversation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = Chat(_engine(), PARAMS, output=io.StringIO())
    _talk(chat, "hello", f"/save {tmp_path}/absent/talk.jsonl", "again", is_interactive=True)
    assert "error: " in capsys.readouterr().err
    assert [message.content for message in chat.messages] == ["hello", "1: HELLO", "again", "2: AGAIN"]


def test_a_conversation_is_kept_after_each_turn_and_resumed(tmp_path: Path) -> None:
    kept = tmp_path / "chat.jsonl"
    _talk(Chat(_engine(), PARAMS, output=io.StringIO(), kept=kept), "hello")  # and never closed
    later = Chat(_engine(), PARAMS, output=io.StringIO(), kept=kept)
    _talk(later, "/resume", "again", is_interactive=True)
    assert [message.content for message in later.messages] == ["hello", "1: HELLO", "again", "2: AGAIN"]


def test_an_answer_is_given_again_and_the_old_one_stays_when_none_comes() -> None:
    answers = iter(["first", "second", ""])
    chat = Chat(FakeEngine(lambda _: next(answers), prompt_format=nemotron4()), PARAMS, output=io.StringIO())
    _talk(chat, "hello", "/regenerate", is_interactive=True)
    assert [message.content for message in chat.messages] == ["hello", "second"]
    _talk(chat, "/regenerate", is_interactive=True)
    assert [message.content for message in chat.messages] == ["hello", "second"]


def test_another_model_goes_on_with_the_conversation() -> None:
    opened: list[str] = []

    def open_model(name: str) -> FakeEngine:
        opened.append(name)
        return FakeEngine("from the other", prompt_format=nemotron4())

    chat = Chat(_engine(), PARAMS, output=io.StringIO(), open_model=open_model)
    _talk(chat, "hello", "/model other", "again", is_interactive=True)
    assert opened == ["other"]
    assert [message.content for message in chat.messages][1::2] == ["1: HELLO", "from the other"]


def test_input_of_another_encoding_and_digits_that_are_no_numbers_are_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8"))
    with pytest.raises(DataError, match="standard input is not UTF-8"):
        read_line("")
    with pytest.raises(Nemotron4Error, match="unknown word '²'"):
        ask_word("outcome", {"success": "", "failure": ""}, read=lambda prompt: "²")
