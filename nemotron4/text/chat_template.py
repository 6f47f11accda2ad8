"""A checkpoint's own chat template: Jinja written by strangers, rendered under limits, cut into segments.

A template returns one text in which the words of users and the template's markers are mixed. To tell them
apart, every marker inside a message is replaced by a private-use character before rendering, and put back
as plain text afterwards: a marker in the rendered text is then the template's.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from nemotron4.errors import TemplateError
from nemotron4.records import Message
from nemotron4.text.formats import Purpose, TextSegment
from nemotron4.text.tokenizer import Tokenizer

MAX_TEMPLATE_CHARACTERS = 256 * 1024
MAX_ADDED_CHARACTERS = (
    1024 * 1024
)  # what a template may write besides the messages' own text, which it may repeat
WALL_TIME_S = 20.0  # for a machine so busy that a second of processor time takes this long
MEMORY_BYTES = 1024 * 1024 * 1024

_WORKER = Path(__file__).with_name("template_worker.py")


class ChatTemplate:
    """One template and the process that renders it, started when first needed and after it was ended.

    Safe to use from any thread. The process ends with this object, and with this program.
    """

    def __init__(
        self, source: str, *, name: str = "chat template", cpu_time_s: float = 1.0, date: str | None = None
    ) -> None:
        if len(source) > MAX_TEMPLATE_CHARACTERS:
            raise TemplateError(
                f"{name}: {len(source)} characters; expected at most {MAX_TEMPLATE_CHARACTERS}"
            )
        self.source = source
        self.date = date
        self._name = name
        self._cpu_time_s = cpu_time_s
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._finalizer: weakref.finalize[..., Any] | None = None

    def render(self, variables: Mapping[str, Any]) -> str:
        """The text for ``messages``, ``add_generation_prompt`` and so on, which must be JSON values."""
        return self.render_marked(variables)[0]

    def render_marked(self, variables: Mapping[str, Any]) -> tuple[str, list[tuple[int, int]]]:
        """The text, and where the parts in ``{% generation %}`` are."""
        request = json.dumps({"variables": variables, "max_characters": _max_characters(variables)})
        with self._lock:
            # Ended by another's hand (a machine that stood still, the kernel short of memory) tells nothing
            # of the template, so that it is tried once more.
            result = self._ask(request) or self._ask(request)
        if result is None:
            raise TemplateError(
                f"{self._name}: the process that renders it was ended twice",
                hint="is the machine short of memory, or standing still? then repeat the request",
            )
        if "error" in result:
            where = f"{self._name}:{result['line']}" if result.get("line") else self._name
            raise TemplateError(f"{where}: {result['error']}")
        return str(result["text"]), [(start, end) for start, end in result.get("spans", ())]

    def __reduce__(self) -> tuple[Any, ...]:
        make = functools.partial(ChatTemplate, name=self._name, cpu_time_s=self._cpu_time_s, date=self.date)
        return make, (self.source,)

    def close(self) -> None:
        """End the process; a later rendering starts a new one."""
        with self._lock:
            self._drop()

    def _drop(self) -> None:
        if self._finalizer is not None:
            self._finalizer()
        self._process = self._finalizer = None

    def _start(self) -> subprocess.Popen[str]:
        # A session of its own keeps Ctrl-C in a terminal from ending it before the program does; -P keeps
        # the files next to the worker from being imported in place of a library.
        process = subprocess.Popen(
            [sys.executable, "-P", str(_WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="ascii",
            start_new_session=True,
        )
        self._process = process
        self._finalizer = weakref.finalize(self, _end, process)
        limits = {"cpu_time_s": self._cpu_time_s, "memory_bytes": MEMORY_BYTES}
        settings = {"template": self.source, "date": self.date, **limits}
        if _exchange(process, json.dumps(settings)) is None:
            self._drop()
            raise TemplateError(
                f"{self._name}: the process that renders templates did not start",
                hint=f"run: {sys.executable} -P {_WORKER}",
            )
        return process

    def _ask(self, request: str) -> dict[str, Any] | None:
        """The worker's answer, or None if something else ended it; TemplateError if the template did."""
        process = self._process or self._start()
        result = _exchange(process, request)
        if result is None:
            status = process.wait()
            self._drop()
            if status == -signal.SIGPROF:
                raise TemplateError(
                    f"{self._name}: rendering took more than {self._cpu_time_s:g} s of processor time",
                    hint="look for loops inside loops in the template",
                )
        return result


def _max_characters(variables: Mapping[str, Any]) -> int:
    return MAX_ADDED_CHARACTERS + 2 * len(json.dumps(variables, ensure_ascii=False))


def _exchange(process: subprocess.Popen[str], line: str) -> dict[str, Any] | None:
    """Send a line and return the answer, or None if the process ended or was ended for being slow."""
    stdin, stdout = _pipes(process)
    timer = threading.Timer(WALL_TIME_S, process.kill)
    timer.start()
    try:
        stdin.write(line + "\n")
        stdin.flush()
        answer = stdout.readline()
    except BrokenPipeError:
        return None
    finally:
        timer.cancel()
    return json.loads(answer) if answer.endswith("\n") else None


def _end(process: subprocess.Popen[str]) -> None:
    stdin, stdout = _pipes(process)
    with contextlib.suppress(BrokenPipeError):
        stdin.close()
    process.kill()
    process.wait()
    stdout.close()


def _pipes(process: subprocess.Popen[str]) -> tuple[IO[str], IO[str]]:
    assert process.stdin is not None
    assert process.stdout is not None
    return process.stdin, process.stdout


_PRIVATE_USE = range(0xE000, 0xF900)


@dataclass(frozen=True)
class JinjaWriter:
    """What trains is what the template marks by ``{% generation %}``, else found by the prefix method."""

    template: ChatTemplate
    names: Mapping[str, str | None]  # bos_token and eos_token, which templates write
    tools: tuple[Any, ...] = ()
    variables: Mapping[str, Any] = field(default_factory=dict)  # that a request sets

    def reads(self, name: str) -> bool:
        """Whether a request may set this variable: the template has the word, and it is not set by us."""
        fixed = {"messages", "tools", "add_generation_prompt", *self.names}
        return name not in fixed and name in re.findall(r"[^\W\d]\w*", self.template.source)

    @classmethod
    def of(cls, template: ChatTemplate, tokenizer: Tokenizer) -> JinjaWriter:
        ends = (("bos_token", tokenizer.bos_id), ("eos_token", tokenizer.eos_id))
        return cls(template, {name: None if i is None else tokenizer.piece(i) for name, i in ends})

    def segments(
        self, messages: Sequence[Message], *, purpose: Purpose, tokenizer: Tokenizer | None
    ) -> list[TextSegment]:
        rendering = _Rendering.of(self, messages, () if tokenizer is None else tokenizer.markers)
        text, marked = rendering.render_marked(len(messages), add_generation_prompt=purpose == "generate")
        spans: list[tuple[int, int]] = []
        if purpose == "train":
            spans = _marked_spans(messages, marked) or list(_trained_spans(rendering, text))
        return [segment for part in _cut(text, spans) for segment in rendering.segments(*part)]


@dataclass(frozen=True)
class _Rendering:
    """One conversation whose messages hold stand-ins for markers."""

    writer: JinjaWriter
    messages: Sequence[Message]
    marker_pattern: re.Pattern[str] | None
    originals: Mapping[int, str]  # code point of a stand-in -> the marker it stands for

    @classmethod
    def of(cls, writer: JinjaWriter, messages: Sequence[Message], markers: Sequence[str]) -> _Rendering:
        known = {*markers, *(name for name in writer.names.values() if name)} if markers else set()
        if not known:
            return cls(writer, messages, None, {})
        # The longest first: one marker may begin another.
        pattern = re.compile("|".join(re.escape(m) for m in sorted(known, key=len, reverse=True)))
        written = "\n".join(
            [
                *(part for message in messages for part in (message.role, message.content)),
                *_texts([dict(message.more) for message in messages]),
                *_texts([writer.tools, dict(writer.variables)]),
            ]
        )
        found, used = sorted(set(pattern.findall(written))), set(written)
        free = (code for code in _PRIVATE_USE if chr(code) not in used)
        stand_ins = dict(zip(found, free, strict=False))
        if len(stand_ins) < len(found):
            raise TemplateError("the messages use too many private-use characters to tell markers from text")

        def safe(text: str) -> str:
            return pattern.sub(lambda match: chr(stand_ins[match[0]]), text)

        safe_messages = [
            replace(m, role=safe(m.role), content=safe(m.content), more=_mapped(m.more, safe))
            for m in messages
        ]
        writer = replace(
            writer,
            tools=tuple(_mapped(writer.tools, safe)),
            variables=_mapped(writer.variables, safe),
        )
        return cls(writer, safe_messages, pattern, {code: marker for marker, code in stand_ins.items()})

    def render(self, num_messages: int, *, add_generation_prompt: bool) -> str:
        return self.render_marked(num_messages, add_generation_prompt=add_generation_prompt)[0]

    def render_marked(
        self, num_messages: int, *, add_generation_prompt: bool
    ) -> tuple[str, list[tuple[int, int]]]:
        return self.writer.template.render_marked(
            {
                "documents": None,
                **self.writer.variables,
                **self.writer.names,
                "messages": [_with_reasoning(m.to_json()) for m in self.messages[:num_messages]],
                "add_generation_prompt": add_generation_prompt,
                "tools": list(self.writer.tools) or None,
            }
        )

    def segments(self, text: str, is_trained: bool) -> Iterator[TextSegment]:
        """Markers and text apart, stand-ins turned back into what the user wrote."""
        at = 0
        for match in self.marker_pattern.finditer(text) if self.marker_pattern else ():
            yield TextSegment(text[at : match.start()].translate(self.originals), is_trained=is_trained)
            yield TextSegment(match[0], is_marker=True, is_trained=is_trained)
            at = match.end()
        yield TextSegment(text[at:].translate(self.originals), is_trained=is_trained)

    def markers(self, text: str, start: int, end: int) -> list[re.Match[str]]:
        return list(self.marker_pattern.finditer(text, start, end)) if self.marker_pattern else []


def _texts(value: Any) -> Iterator[str]:
    """Every text in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list | tuple):
        for entry in value.values() if isinstance(value, dict) else value:
            yield from _texts(entry)


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """A JSON value with every text in it changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {name: _mapped(entry, change) for name, entry in value.items()}
    return [_mapped(entry, change) for entry in value] if isinstance(value, list | tuple) else value


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """A model's thoughts under each name that templates read, as transformers gives them."""
    names = ("reasoning_content", "thinking", "reasoning")
    thoughts = next((message[name] for name in names if message.get(name) is not None), None)
    return message if thoughts is None else {"thinking": thoughts, **message, "reasoning_content": thoughts}


def _marked_spans(messages: Sequence[Message], marked: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The marked parts of the answers that train, one part an answer; () where they cannot be told apart."""
    answers = [message for message in messages if message.role.lower() == "assistant"]
    if all(answer.trains for answer in answers):
        return marked
    if len(answers) != len(marked):
        return []
    return [span for span, answer in zip(marked, answers, strict=True) if answer.trains]


def _trained_spans(rendering: _Rendering, text: str) -> Iterator[tuple[int, int]]:
    """Where in the text answers are, with the end of their turn.

    The prefix method: an answer is what is between the rendering of the messages before it, with the
    header of the next turn, and the rendering that ends with it. Both must be beginnings of the whole.
    An answer that no user's turn precedes does not train.
    """
    has_turn = False
    for place, message in enumerate(rendering.messages):
        if message.role.lower() != "assistant" or not has_turn or not message.trains:
            has_turn = has_turn or message.role.lower() != "system"
            continue
        before = rendering.render(place, add_generation_prompt=True)
        until = rendering.render(place + 1, add_generation_prompt=False)
        start, end = len(before), len(until)
        is_inside = text.startswith(until) and until.startswith(before)
        if not is_inside or message.content.strip() not in text[start:end]:
            raise TemplateError(
                f"messages[{place}]: the chat template writes this answer differently at the end of a "
                "conversation than inside one, so the tokens to train on cannot be told",
                hint="train on conversations that end with this answer, or name another prompt format",
            )
        yield start, _end_of_turn(rendering, text, start, end)


def _end_of_turn(rendering: _Rendering, text: str, start: int, end: int) -> int:
    """Behind the marker that ends the turn: the last in the span, or the one that follows it at once."""
    inside = rendering.markers(text, start, end)
    if inside and not text[inside[-1].end() : end].strip():
        return inside[-1].end()
    following = rendering.markers(text, end, len(text))
    return following[0].end() if following and following[0].start() == end else end


def _cut(text: str, spans: Sequence[tuple[int, int]]) -> Iterator[tuple[str, bool]]:
    at = 0
    for start, end in spans:
        yield text[at:start], False
        yield text[start:end], True
        at = end
    yield text[at:], False


def stop_strings(writer: JinjaWriter, tokenizer: Tokenizer) -> tuple[str, ...]:
    """The marker that the template puts after an answer; () if it puts none or refuses the question."""
    conversation = [Message("user", "question"), Message("assistant", "answer"), Message("user", "more")]
    try:
        segments = writer.segments(conversation, purpose="show", tokenizer=tokenizer)
    except TemplateError:
        return ()
    places = [i for i, segment in enumerate(segments) if "answer" in segment.text and not segment.is_marker]
    following = segments[places[0] + 1 :] if places else []
    return tuple(segment.text for segment in following if segment.is_marker)[:1]
