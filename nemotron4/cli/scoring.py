"""``--score``: a reward model behind an address, or loaded next to the model that answers."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from nemotron4.client.remote import JUDGE_KEY_VARIABLE, connect, is_address

if TYPE_CHECKING:
    from nemotron4.client.interface import ChatModel


@contextmanager
def open_judge(source: str | None, *, device: str) -> Iterator[ChatModel | None]:
    """The reward model, None if none is wanted. The key of a server is NEMOTRON4_JUDGE_API_KEY."""
    if source is None or is_address(source):
        yield None if source is None else connect(source, None, key_variable=JUDGE_KEY_VARIABLE)
        return
    from nemotron4.client.engine import EngineChatModel
    from nemotron4.inference.reward import load_reward

    with closing(load_reward(source, device=device)) as engine:
        yield EngineChatModel(engine)


def judge_identity(source: str) -> str:
    """What a run records of its reward model."""
    from nemotron4.checkpoint.cache import resolve
    from nemotron4.cli.identity import model_digest

    return source if is_address(source) else model_digest(resolve(source))


@contextmanager
def input_file(source: Path) -> Iterator[Path]:
    """The file, or for ``-`` a copy of the standard input, which is read more than once."""
    if str(source) != "-":
        yield source
        return
    with tempfile.NamedTemporaryFile(prefix="nemotron4-input-", suffix=".jsonl") as copy:
        for block in iter(lambda: sys.stdin.buffer.read(1 << 20), b""):
            copy.write(block)
        copy.flush()
        yield Path(copy.name)
