"""A chat in the terminal or over a pipe: a line in, a streamed answer out, commands that start with ``/``."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TextIO

from nemotron4 import records
from nemotron4.cli.console import note
from nemotron4.engine import InferenceEngine, SamplingParams
from nemotron4.errors import DataError, Nemotron4Error, RequestError, unknown
from nemotron4.records import Conversation, Message
from nemotron4.text.answers import chat_request, run

HELP = """\
/regenerate   another answer to the last message
/save FILE    write the conversation to a file (one row, as fine-tuning reads it)
/load FILE    continue the conversation of a file
/resume       continue the conversation of the last chat
/system TEXT  set the system message; without TEXT, remove it
/model NAME   go on with another model
/reset        forget the conversation, keep the system message
/help         show this
/exit         leave (also /quit, /bye, Ctrl-D)
\"\"\"           a message of several lines, up to the next \"\"\"
Ctrl-C stops an answer."""
MANY_LINES = '"""'
LEAVING = ("/exit", "/quit", "/bye", "exit", "quit", "bye")
FORGETTING = ("/reset", "/system")  # never what a misspelt command is taken for


class Chat:
    """One conversation with one engine."""

    def __init__(
        self,
        engine: InferenceEngine,
        params: SamplingParams,
        *,
        system: str | None = None,
        output: TextIO | None = None,
        kept: Path | None = None,
        open_model: Callable[[str], InferenceEngine] | None = None,
    ) -> None:
        """``kept``: the file that holds the conversation after each turn, so that a crash loses none.

        ``open_model`` loads what /model names; the engine before is then closed.
        """
        self._engine = engine
        self._params = params
        self._output = output or sys.stdout
        self._system = system
        self._kept = kept
        self._open_model = open_model
        self._turns: list[Message] = []
        self._commands: dict[str, Callable[[str], None]] = {
            "/save": self._save,
            "/load": self._load,
            "/resume": self._resume,
            "/system": self._set_system,
            "/model": self._set_model,
            "/reset": lambda _: self._turns.clear(),
            "/help": lambda _: note(HELP),
        }

    @property
    def engine(self) -> InferenceEngine:
        """What answers now: /model may have changed it."""
        return self._engine

    @property
    def messages(self) -> tuple[Message, ...]:
        system = (Message("system", self._system),) if self._system else ()
        return (*system, *self._turns)

    def run(self, read_line: Callable[[], str], *, is_interactive: bool) -> None:
        """Answer line after line until ``read_line`` raises EOFError.

        Interactively an error is told, Ctrl-C stops the answer, and the conversation goes on; otherwise both
        end the program.
        """
        with asyncio.Runner() as runner:
            while True:
                try:
                    line = read_line()
                    while line.startswith(MANY_LINES) and not line.endswith(MANY_LINES, len(MANY_LINES)):
                        line += "\n" + read_line()
                    line = line.removeprefix(MANY_LINES).removesuffix(MANY_LINES)
                    if (word := line.strip()) in LEAVING and (is_interactive or word.startswith("/")):
                        return
                    self._turn(line, runner)
                except EOFError:
                    return
                except KeyboardInterrupt:
                    if not is_interactive:
                        raise
                    note("\n(stopped; Ctrl-D leaves)")
                except (Nemotron4Error, OSError) as error:
                    if not is_interactive:
                        raise
                    note(f"error: {error}")

    def _turn(self, line: str, runner: asyncio.Runner) -> None:
        if not line.strip():
            return
        if not line.startswith("/"):
            self._turns.append(Message("user", line))
            self._answer(runner)
            return
        name, _, rest = line.strip().partition(" ")
        if name == "/regenerate":
            self._answer_again(runner)
        elif name in self._commands:
            self._commands[name](rest.strip())
        else:
            harmless = {"/regenerate", "/exit", *self._commands}.difference(FORGETTING)
            raise unknown("command", name, harmless, RequestError)

    def _answer_again(self, runner: asyncio.Runner) -> None:
        if len(self._turns) < 2:
            raise RequestError("there is no answer yet to repeat")
        before = list(self._turns)
        self._turns.pop()
        if self._params.seed is not None:
            self._params = replace(self._params, seed=self._params.seed + 1)
        try:
            self._answer(runner)
        finally:
            if len(self._turns) < len(before):  # no answer came: the old one stays
                self._turns = before

    def _answer(self, runner: asyncio.Runner) -> None:
        """Stream the answer. Interrupted, the part that was shown stays in the conversation."""
        shown: list[str] = []
        try:
            runner.run(self._stream(shown))
        finally:
            if answer := "".join(shown).strip():
                self._turns.append(Message("assistant", answer))
            else:
                self._turns.pop()  # a question without an answer would be there twice when it is repeated
            self._keep()

    def _keep(self) -> None:
        if self._kept is not None and self._turns:
            records.write(self._kept, [Conversation(messages=self.messages)])

    async def _stream(self, shown: list[str]) -> None:
        request = chat_request(self._engine, self.messages, self._params)
        room = self._engine.info.context_length - len(request.prompt_ids)
        if room < 1:
            raise RequestError(
                f"the conversation has {len(request.prompt_ids)} tokens; the model reads "
                f"{self._engine.info.context_length}",
                hint="/reset starts a new one",
            )
        limit = min(request.params.max_new_tokens, room)
        request = replace(request, params=replace(request.params, max_new_tokens=limit))

        def show(text: str) -> None:
            shown.append(text)
            self._output.write(text)
            self._output.flush()

        answer = await run(self._engine, request, on_text=show)
        if answer.generation().finish_reason == "length":
            note(f"\n(cut after {limit} tokens)")
        self._output.write("\n")
        self._output.flush()

    def _save(self, name: str) -> None:
        if not name:
            raise RequestError("/save needs a file name", hint="/save talk.jsonl")
        if not self._turns:
            raise RequestError("there is nothing to save yet")
        records.write(Path(name).expanduser(), [Conversation(messages=self.messages)])
        note(f"saved {len(self.messages)} messages to {name}")

    def _load(self, name: str) -> None:
        if not name:
            raise RequestError("/load needs a file name", hint="/load talk.jsonl")
        self._read(Path(name).expanduser())

    def _resume(self, _: str) -> None:
        if self._kept is None or not self._kept.exists():
            raise RequestError("no conversation is kept yet")
        self._read(self._kept)

    def _read(self, path: Path) -> None:
        conversation = next(records.read(path, Conversation), None)
        if conversation is None:
            raise DataError(f"{path}: holds no conversation")
        first, *rest = conversation.messages
        self._system = first.content if first.role == "system" else None
        self._turns = rest if first.role == "system" else [first, *rest]
        note(f"loaded {len(conversation.messages)} messages from {path}")

    def _set_system(self, text: str) -> None:
        self._system = text or None

    def _set_model(self, name: str) -> None:
        if not name or self._open_model is None:
            raise RequestError("/model needs the name of a model", hint="/model smollm2")
        note(f"loading {name} ...")
        engine = self._open_model(name)
        self._engine.close()
        self._engine = engine
        note(f"{engine.info.name} goes on with the conversation")
