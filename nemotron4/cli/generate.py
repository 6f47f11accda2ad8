"""``nemotron4 generate``: a file of prompts in, a file of answers out."""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nemotron4.checkpoint.shipped import AUTO
from nemotron4.cli.console import note, print_json, show_notes
from nemotron4.cli.options import (
    AdapterOption,
    ChatTemplateOption,
    DeviceOption,
    DtypeOption,
    ForceAdapterOption,
    JsonOption,
    JsonSchemaOption,
    MaxTokensOption,
    ModelArgument,
    QuantizeOption,
    ServedNameOption,
    TemperatureOption,
    TopPOption,
)
from nemotron4.engine import SamplingParams
from nemotron4.errors import ConfigError, DataError, Problems
from nemotron4.records import JsonObject, read_json_lines

if TYPE_CHECKING:
    from nemotron4.client.interface import ChatModel
    from nemotron4.engine import InferenceEngine

MAX_NEW_TOKENS = 256
SEED = 0  # the same command gives the same file
MAX_IN_FLIGHT = 64


def generate(
    model: ModelArgument,
    source: Annotated[Path, typer.Argument(metavar="INPUT", help="JSON lines; - is the standard input.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="Where the answers go.")],
    n: Annotated[int, typer.Option("--n", "-n", min=1, help="Samples of each row.")] = 1,
    score: Annotated[
        str | None, typer.Option(metavar="URL|MODEL", help="A reward model that scores each sample.")
    ] = None,
    best: Annotated[bool, typer.Option("--best", help="Keep the sample with the highest reward.")] = False,
    max_new_tokens: MaxTokensOption = MAX_NEW_TOKENS,
    temperature: TemperatureOption = SamplingParams.temperature,
    top_p: TopPOption = SamplingParams.top_p,
    top_k: Annotated[
        int, typer.Option(min=0, help="Draw from so many likeliest tokens; 0 is all.")
    ] = SamplingParams.top_k,
    min_p: Annotated[
        float,
        typer.Option(
            min=0, max=1, help="Leave out tokens below this share of the likeliest one's probability."
        ),
    ] = SamplingParams.min_p,
    repetition_penalty: Annotated[
        float, typer.Option(min=0, help="Above 1: tokens of prompt and answer are less likely.")
    ] = SamplingParams.repetition_penalty,
    presence_penalty: Annotated[
        float, typer.Option(min=-2, max=2, help="Taken off the logits of tokens in the answer.")
    ] = SamplingParams.presence_penalty,
    frequency_penalty: Annotated[
        float, typer.Option(min=-2, max=2, help="The same, once for each time.")
    ] = SamplingParams.frequency_penalty,
    logit_bias_: Annotated[
        list[str] | None,
        typer.Option("--logit-bias", metavar="ID=NUMBER", help="Add to a token's logit; repeatable."),
    ] = None,
    min_new_tokens: Annotated[
        int, typer.Option(min=0, help="No answer ends before.")
    ] = SamplingParams.min_new_tokens,
    stop: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="End an answer here; repeatable.")
    ] = None,
    stop_token_id: Annotated[
        list[int] | None, typer.Option(metavar="ID", help="End an answer at this token; repeatable.")
    ] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on at the model's end.")] = False,
    include_stop_str_in_output: Annotated[
        bool, typer.Option("--include-stop-str-in-output", help="Keep what ended an answer in its text.")
    ] = False,
    skip_special_tokens: Annotated[bool, typer.Option(help="Leave control tokens out of the text.")] = True,
    seed: Annotated[int, typer.Option(min=0, help="Equal seeds draw the same.")] = SEED,
    logprobs: Annotated[bool, typer.Option("--logprobs", help="Write each token's log-probability.")] = False,
    max_in_flight: Annotated[
        int, typer.Option(min=1, help="Rows answered at the same time.")
    ] = MAX_IN_FLIGHT,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    quantize: QuantizeOption = None,
    adapter: AdapterOption = AUTO,
    force_adapter: ForceAdapterOption = False,
    chat_template: ChatTemplateOption = None,
    json_schema: JsonSchemaOption = None,
    served_model_name: ServedNameOption = None,
    json_: JsonOption = False,
) -> int:
    """Answer a file of prompts, in continuous batches.

    A row of INPUT is {"prompt": TEXT}, {"prompt": [TOKEN IDS]}, {"messages": [...]} or a row of OpenAI's
    batch files. Its "id" and "meta" are copied; sampling settings in it ("temperature": 0, "n": 4,
    "json_schema": {...}, ...) hold for that row alone.

    Killed at any moment, the same command continues. A row that cannot be answered becomes {"line": ...,
    "error": ...} in its place, and the exit status is then 1.
    """
    from nemotron4.cli import batch
    from nemotron4.cli.answering import Wanted
    from nemotron4.cli.rows import logit_bias, read_schema
    from nemotron4.recipe import hash_of

    problems = _problems(model, source, output, score, n=n, best=best)
    with problems.kept():
        bias = logit_bias(logit_bias_ or ())
    with problems.kept():
        grammar = read_schema(json_schema)
    problems.tell()
    params = SamplingParams(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        logit_bias=bias,
        min_new_tokens=min_new_tokens,
        stop_strings=tuple(stop or ()),
        stop_token_ids=frozenset(stop_token_id or ()),
        ignore_eos=ignore_eos,
        shows_stop=include_stop_str_in_output,
        shows_special=not skip_special_tokens,
        seed=seed,
        logprobs=0 if logprobs else None,
        grammar=grammar,
    )
    run = _recorded(model, params, dtype=dtype, quantize=quantize, adapter=adapter, template=chat_template)
    # What earlier versions did not know is recorded where it is asked for: their runs go on.
    more: dict[str, object] = {
        "n": n if n > 1 else None,
        "best": best or None,
        "served_names": served_model_name,
    }
    more["score"] = None if score is None else judge_identity(score)
    run |= {name: value for name, value in more.items() if value is not None}

    def load_engine() -> InferenceEngine:
        options = {"adapter": adapter, "chat_template": chat_template, "force_adapter": force_adapter}
        return _load(model, dtype=dtype, device=device, quantize=quantize, **options)

    with input_file(source) as rows:
        run["input_sha256"] = hash_of(rows)
        with batch.Output(output, run) as answers:
            if answers.log is None:
                note(f"{output} is complete already")
            else:
                with open_judge(score, device=device) as judge:
                    names = tuple(served_model_name or ())
                    wanted = Wanted(params=params, n=n, judge=judge, keeps_best=best, served_names=names)
                    batch.answer_file(load_engine, rows, answers, wanted, max_in_flight=max_in_flight)
    return _report(output, is_json=json_)


def _problems(model: str, source: Path, output: Path, score: str | None, *, n: int, best: bool) -> Problems:
    """What is wrong with the names and numbers that a command gives, before anything is read."""
    from nemotron4.checkpoint.cache import resolve
    from nemotron4.client.remote import is_address
    from nemotron4.server.openai_schemas import MAX_ROWS

    problems = Problems()
    with problems.kept():
        if n > MAX_ROWS:
            raise ConfigError(f"--n is {n}; expected 1 to {MAX_ROWS}")
    with problems.kept():
        if best and score is None:
            raise ConfigError("--best needs rewards to compare", hint="add --score URL or --score MODEL")
    with problems.kept():
        resolve(model)
    with problems.kept():
        if str(source) != "-" and not source.exists():
            raise DataError(f"{source}: cannot be read: there is no such file")
    with problems.kept():
        if not output.parent.is_dir():
            raise DataError(f"{output}: the folder {output.parent} does not exist")
    with problems.kept():
        if score is not None and not is_address(score):
            resolve(score)
    return problems


def _recorded(
    model: str,
    params: SamplingParams,
    *,
    dtype: str,
    quantize: str | None,
    adapter: str | None,
    template: str | None,
) -> JsonObject:
    """What a run is made of: another one is refused under the same output."""
    from nemotron4.checkpoint.cache import resolve
    from nemotron4.checkpoint.shipped import chosen_adapter
    from nemotron4.cli import batch
    from nemotron4.recipe import hash_of

    chosen = chosen_adapter(model, adapter)
    run: JsonObject = {
        "model": model,
        "model_sha256": model_digest(resolve(model)),
        "dtype": dtype,
        "quantize": quantize,
        "adapter_sha256": model_digest(chosen) if chosen else None,
        "sampling": batch.as_json(params),
    }
    if template is not None:
        path = Path(template)
        run["chat_template"] = hash_of(path) if path.is_file() else template
    return run


def _load(model: str, **options: Any) -> InferenceEngine:
    from nemotron4.inference.load import load

    note(f"loading {model} ...")
    engine: InferenceEngine = load(model, **options)
    show_notes(engine.info)
    return engine


def _report(output: Path, *, is_json: bool) -> int:
    """Say what the finished file holds; the exit status."""
    from nemotron4.cli.answering import is_failed, num_tokens

    num_rows = num_failed = num_new_tokens = 0
    for _, row in read_json_lines(output):
        num_rows += 1
        num_failed += is_failed(row)
        num_new_tokens += num_tokens(row)
    if is_json:
        print_json(
            {"output": str(output), "rows": num_rows, "failed": num_failed, "new_tokens": num_new_tokens}
        )
    else:
        note(f"{output}: {num_rows} rows, {num_failed} failed, {num_new_tokens} new tokens")
    return 1 if num_failed else 0


@contextmanager
def open_judge(source: str | None, *, device: str) -> Iterator[ChatModel | None]:
    """The reward model, None if none is wanted. The key of a server is NEMOTRON4_JUDGE_API_KEY."""
    from nemotron4.client.remote import JUDGE_KEY_VARIABLE, connect, is_address

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
    from nemotron4.client.remote import is_address

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


SAMPLE_BYTES = 1 << 20


def model_digest(path: Path) -> str:
    """SHA-256 over name, size, first and last MiB of each file of a model.

    Enough to tell two models apart; hashing all 680 GB of the largest would take an hour.
    """
    digest = hashlib.sha256()
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.relative_to(path) if file != path else file.name}:{size}\n".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(SAMPLE_BYTES))
            stream.seek(max(0, size - SAMPLE_BYTES), os.SEEK_SET)
            digest.update(stream.read(SAMPLE_BYTES))
    return digest.hexdigest()
