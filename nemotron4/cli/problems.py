"""What is wrong with a command line: every problem of it, not only the first that the parser meets."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

import typer

from nemotron4.errors import unknown_name

Problem = tuple[str, str]  # what is wrong, what to do


def find_problems(error: Exception, words: list[str], command: str) -> list[Problem]:
    """All problems of ``words``, which follow the name ``command``; ``error`` is the first of them."""
    context: Any = getattr(error, "ctx", None)
    if context is None:
        return [_explained(error, command)]
    depth = len(context.command_path.split()) - len(command.split())
    return _of_command(context, words[depth:]) or [_explained(error, command)]


def _of_command(context: Any, words: list[str]) -> list[Problem]:
    command, found = context.command, []
    if hasattr(command, "commands"):  # a group, whose only fault is the name of its command
        return []
    given: dict[str, Any] | None = None
    order: list[Any] = []
    has_unknown = False
    while given is None:
        try:
            given, rest, order = command.make_parser(context).parse_args(args=list(words))
        except typer.TyperException as error:
            name = _as_typed(error, words)
            without = _without(words, name)
            if name is None or without == words:
                return []
            words = without
            has_unknown = has_unknown or hasattr(error, "possibilities")
            found.append(_explained(error, context.command_path))
    for parameter in sorted(
        command.params, key=lambda each: order.index(each) if each in order else len(order)
    ):
        if parameter.is_eager:  # --help
            continue
        try:
            _, rest = parameter.handle_parse_result(context, given, rest)
        except typer.TyperException as error:
            found.append(_explained(error, context.command_path))
    if rest and not has_unknown:  # else they may be the values of what is unknown
        found.append((f"unexpected: {' '.join(map(str, rest))}", f"see `{context.command_path} --help`"))
    return found


def _as_typed(error: Any, words: list[str]) -> str | None:
    """The unknown option as it was written: of llama.cpp's ``-ngl`` the parser names ``-n`` alone."""
    name: str | None = getattr(error, "option_name", None)
    if name is not None and hasattr(error, "possibilities"):
        typed = (word for word in words if re.fullmatch(r"-[a-z]{2,}", word) and word.startswith(name))
        name = error.option_name = next(typed, name)
    return name


def _without(words: list[str], option: str | None) -> list[str]:
    """The words but for the first that is the option (``--name`` or ``--name=value``)."""
    for index, word in enumerate(words):
        if word.split("=")[0] == option:
            return words[:index] + words[index + 1 :]
    return words


def _explained(error: Exception, command: str) -> Problem:
    """Message and hint for one thing that the parser refused."""
    context: Any = getattr(error, "ctx", None)
    path = context.command_path if context is not None else command
    option = getattr(error, "option_name", None)
    if context is not None and option is not None and hasattr(error, "possibilities"):
        known = [spelling for parameter in context.command.params for spelling in parameter.opts]
        options = [*(spelling for spelling in known if spelling.startswith("-")), "--help"]
        arguments = [
            p.metavar for p in context.command.params if p.param_type_name == "argument" and p.metavar
        ]
        message, hint = unknown_name("option", option, options)
        if hasattr(context.command, "commands"):  # options belong to the commands of a group
            hint = f"give a command first: {', '.join(context.command.commands)}"
        hint = ours(option, path, options, arguments) or hint
        return message, f"{hint} (see `{path} --help`)"
    message = error.format_message() if hasattr(error, "format_message") else str(error)
    message = " ".join(message.split()).replace(": Value error, ", ": ").replace(": Input should", ": should")
    return message[:1].lower() + message[1:].rstrip("."), f"see `{path} --help`"


# Their spelling -> ours, the first that the command has.
OPTIONS: dict[str, tuple[str, ...]] = {
    "--max-model-len": ("--context",),
    "--ctx-size": ("--context",),
    "--num-ctx": ("--context",),
    "--max-seq-len": ("--context",),
    "--tp": ("--tensor-parallel",),
    "--tensor-parallel-size": ("--tensor-parallel",),
    "--pp": ("--pipeline-parallel",),
    "--pipeline-parallel-size": ("--pipeline-parallel",),
    "--quantization": ("--quantize",),
    "--load-format": ("--quantize",),
    "--torch-dtype": ("--dtype",),
    "--precision": ("--dtype",),
    "--max-num-seqs": ("--max-running",),
    "--np": ("--max-running",),
    "--ctk": ("--kv-cache-dtype",),
    "--cache-type-k": ("--kv-cache-dtype",),
    "--parallel": ("--max-running", "--max-in-flight", "--concurrency"),
    "--num-concurrent": ("--concurrency", "--max-in-flight"),
    "--workers": ("--concurrency",),
    "--lora": ("--adapter",),
    "--lora-path": ("--adapter",),
    "--lora-modules": ("--adapter",),
    "--peft": ("--adapter",),
    "--max-tokens": ("--max-new-tokens",),
    "--max-new-tokens": ("--max-tokens",),
    "--n-predict": ("--max-new-tokens", "--max-tokens"),
    "--num-predict": ("--max-new-tokens", "--max-tokens"),
    "--temp": ("--temperature",),
    "--system-prompt": ("--system",),
    "--prompt-file": ("--system",),
    "--output-dir": ("--out", "--output"),
    "--output-path": ("--out", "--output"),
    "--output": ("--out",),
    "--out": ("--output",),
    "--outfile": ("--output", "--out"),
    "--outtype": ("--dtype",),
    "--num-samples": ("--limit",),
    "--base-url": ("--endpoint", "--url"),
    "--url": ("--endpoint",),
    "--api-base": ("--endpoint", "--url", "--model"),
    "--model-args": ("--model",),
    "--model-type": ("--target",),
    "--batch-size": ("--concurrency", "--max-in-flight", "--max-running"),
    "--gen-kwargs": ("--temperature", "--max-tokens"),
    "--api-key": ("--api-key-file",),
    "--tool-call-parser": ("--tool-format",),
    "--allowed-origins": ("--allowed-origin",),
    "--n-gpu-layers": ("--device",),
    "--gpu-layers": ("--device",),
    "--ngl": ("--device",),
    "--max-lora-rank": ("--enable-lora",),
    "--gpus": ("--tensor-parallel",),
    "--num-gpus": ("--tensor-parallel",),
    "-c": ("--context",),
    "-p": ("--port", "--system"),
    "-t": ("--temperature",),
    "-o": ("--out", "--output"),
}
# Their option -> what is given without an option here.
ARGUMENTS: dict[str, str] = {
    "--model": "MODEL",
    "--model-path": "MODEL",
    "--model-name-or-path": "MODEL",
    "--model-id": "MODEL",
    "--pretrained": "MODEL",
    "--tasks": "TASK",
    "--task": "TASK",
    "--model-name": "MODEL",
    "--input": "INPUT",
    "--input-file": "INPUT",
    "--prompts": "INPUT",
    "--prompt": "INPUT",
    "--outfile": "DST",
    "--config": "RECIPE",
    "--config-file": "RECIPE",
}


# Options that have nothing to say here, and why.
NOT_NEEDED: dict[str, str] = {
    **dict.fromkeys(
        ("--enforce-eager", "--disable-log-requests", "--disable-log-stats", "--swap-space", "--block-size",
         "--enable-chunked-prefill", "--max-num-batched-tokens", "--chat-template-content-format",
         "--cpu-offload-gb", "--flash-attn", "--fa", "--jinja", "--cont-batching", "--uvicorn-log-level",
         "--mlock", "--no-mmap", "--distributed-executor-backend"),
        "leave it out: there is nothing to choose",
    ),
    **dict.fromkeys(
        ("--generation-config", "--override-generation-config"),
        "leave it out: a request brings its temperature, top_p, ...; else they are off",
    ),
    **dict.fromkeys(("--ssl-keyfile", "--ssl-certfile", "--root-path"), "put a proxy before it"),
    "--tokenizer": "leave it out: the model's folder has it",
    "--speculative-config": "prompt and answer are looked up for guesses: --num-speculative-tokens",
    "--enable-prefix-caching": "leave it out: beginnings are always cached, in --prefix-cache-gb",
    "--trust-remote-code": "leave it out: code that comes with a checkpoint is never run",
    "--enable-auto-tool-choice": "leave it out: tools work with every model",
    "--reasoning-parser": "leave it out: answers are returned whole",
    "--guided-decoding-backend": "leave it out: llguidance, or vLLM's own with --engine vllm",
    "--log-samples": "leave it out: every answer is kept in the folder of --out",
    "--apply-chat-template": "leave it out: a benchmark says whether it asks by chat",
    "--seed": "leave it out: a request brings its own seed",
    "--threads": "set the variable OMP_NUM_THREADS",
}  # fmt: skip
# Commands of other tools -> what does it here.
COMMANDS_ELSEWHERE: dict[str, str] = {
    "run": "nemotron4 chat MODEL, or serve MODEL for a port",
    "list": "nemotron4 models list",
    "ls": "nemotron4 models list",
    "ps": "nemotron4 models list; a server runs until its command ends",
    "show": "nemotron4 models show MODEL",
    "rm": "nemotron4 models rm MODEL",
    "download": "nemotron4 pull MODEL",
    "complete": "nemotron4 generate MODEL INPUT -o FILE",
    "run-batch": "nemotron4 generate MODEL INPUT -o FILE",
    "create": "nemotron4 convert, or serve with --chat-template and --adapter",
    "bench": "a script in benchmarks/ of the source",
    "quantize": "nemotron4 convert MODEL DST --to FORM --quantize KIND",
    "export": "nemotron4 convert MODEL DST --to FORM",
    "merge": "nemotron4 convert MODEL DST --to FORM --adapter PATH",
    "lm-eval": "nemotron4 eval run TASK --model URL|MODEL --out DIR",
    "evaluate": "nemotron4 eval run TASK --model URL|MODEL --out DIR",
    "garak": "nemotron4 redteam garak",
    "tokenize": "nemotron4 data tokenize",
    **{
        name: f"nemotron4 train --new {name} RECIPE.toml, then nemotron4 train RECIPE.toml"
        for name in ("sft", "dpo", "kto", "rpo", "ipo", "grpo", "ppo", "reward")
    },
}


def elsewhere(command: str) -> str | None:
    """What does here what another tool's command does, as a hint."""
    ours = COMMANDS_ELSEWHERE.get(command.replace("_", "-"))
    return ours and f"here it is {ours}"


def ours(option: str, command: str, options: Collection[str], arguments: Collection[str]) -> str | None:
    """What to write instead of ``option``, as a hint, or None for an option that no tool is known to have."""
    option = option.replace("_", "-")
    if option in ("-m", "-hf"):
        option = "--model"
    elif re.fullmatch(r"-[a-z]{2,}", option):
        option = f"-{option}"
    if option in options:
        return f"here it is {option}"
    known = next((name for name in OPTIONS.get(option, ()) if name in options), None)
    if known is not None:
        return f"here it is {known}"
    argument = ARGUMENTS.get(option)
    if argument is not None and argument in arguments:
        return f"here {argument} is given without an option: {command} {argument}"
    if option in NOT_NEEDED:
        return NOT_NEEDED[option]
    return _recipe_key(option) if "RECIPE" in arguments else None


def _recipe_key(option: str) -> str | None:
    from nemotron4.training.synonyms import synonyms

    key = (synonyms("policy_gradient") | synonyms("")).get(option.strip("-").replace("-", "_"))
    return key and f"settings are the recipe's, or follow it as NAME=VALUE: here it is {key}"
