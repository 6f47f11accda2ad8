"""The process behind the shim: NeMo's ``megatron_gpt_eval.py`` by its command line, this engine inside."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemotron4.cli.console import note
from nemotron4.cli.engines import EngineName, Parallel, follow, run_vllm
from nemotron4.cluster.hydra import DEFAULTS, parse_overrides
from nemotron4.cluster.slurm import Rank, find_rank, held_lifeline, lifeline_port
from nemotron4.errors import ConfigError

if TYPE_CHECKING:
    from nemotron4.engine import InferenceEngine
    from nemotron4.server.settings import PageSettings

STARS = "*" * 27
PRECISIONS = ("16", "32", "bf16", "bf16-mixed", "16-mixed", "32-true", "bf16-true", "16-true")


def run(arguments: list[str], environment: Mapping[str, str]) -> int:
    """Serve, answer the offline prompts, or wait for the rank that does; the exit status."""
    values = parse_overrides(arguments)
    model = _model(values)
    _check_layout(values)
    rank = find_rank(environment)
    port = lifeline_port(values["port"])
    if rank.local_rank > 0:
        return follow(rank, port)

    def lead(load: Callable[[], InferenceEngine]) -> None:
        if values["server"]:
            _serve(load, values)
        else:
            _answer_offline(load, values)

    if _engine(values) == "vllm":
        return run_vllm(model, rank, _parallel(values), lead, port=values["port"])
    if not rank.is_leader:
        return follow(rank, port)
    _tell_layout(values, rank)
    with held_lifeline(rank, port):
        lead(lambda: _load(model))
    return 0


def _parallel(values: Mapping[str, Any]) -> Parallel:
    """NeMo's layout; a negative size, "as the checkpoint says", is all that the job leaves for it."""
    num_devices = values["trainer.devices"] * values["trainer.num_nodes"]
    tensor, pipeline = values["tensor_model_parallel_size"], values["pipeline_model_parallel_size"]
    if tensor < 1:
        tensor = values["trainer.devices"] if pipeline < 1 else num_devices // pipeline
    return Parallel(
        tensor=tensor,
        pipeline=pipeline if pipeline > 0 else max(1, num_devices // tensor),
        nodes=values["trainer.num_nodes"],
    )


def _engine(values: Mapping[str, Any]) -> EngineName:
    """What ``+engine`` says; else vLLM where it is installed and this node has the GPUs of the layout."""
    chosen = values.get("engine", "auto")
    if chosen in ("builtin", "vllm"):
        return "vllm" if chosen == "vllm" else "builtin"
    if chosen != "auto":
        raise ConfigError(f"engine is {chosen!r}; expected auto, builtin or vllm")
    wanted = values["trainer.devices"]
    if wanted * values["trainer.num_nodes"] == 1 or importlib.util.find_spec("vllm") is None:
        return "builtin"
    import torch

    return "vllm" if torch.cuda.device_count() >= wanted else "builtin"


def _model(values: Mapping[str, Any]) -> str:
    if values.get("gpt_model_file"):
        return str(values["gpt_model_file"])
    if values.get("checkpoint_dir"):
        raise ConfigError(
            f"checkpoint_dir is {values['checkpoint_dir']!r}; Lightning checkpoints are pickles, which are "
            "not read",
            hint="give the extracted .nemo directory as gpt_model_file",
        )
    raise ConfigError("need at least a nemo file or checkpoint dir", hint="gpt_model_file=PATH")


def _check_layout(values: Mapping[str, Any]) -> None:
    """NeMo's own assertion, and types that would fail later."""
    names = (
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "trainer.devices",
        "trainer.num_nodes",
        "port",
    )
    for name in names:
        if type(values.get(name)) is not int:
            raise ConfigError(f"{name} is {values.get(name)!r}; expected an integer")
    tensor, pipeline = values["tensor_model_parallel_size"], values["pipeline_model_parallel_size"]
    expert = values.get("expert_model_parallel_size", 1)
    if tensor > 0 and pipeline > 0:
        product = tensor * pipeline * expert
        if values["trainer.devices"] * values["trainer.num_nodes"] != product:
            raise ConfigError(
                "devices * num_nodes should equal tensor_model_parallel_size * pipeline_model_parallel_size",
                hint=f"{values['trainer.devices']} * {values['trainer.num_nodes']} is not {product}",
            )
    if str(values["trainer.precision"]) not in PRECISIONS:
        raise ConfigError(
            f"trainer.precision is {values['trainer.precision']!r}; expected {', '.join(PRECISIONS)}"
        )


def _tell_layout(values: Mapping[str, Any], rank: Rank) -> None:
    tensor, pipeline = values["tensor_model_parallel_size"], values["pipeline_model_parallel_size"]
    if max(tensor, pipeline) > 1:
        note(
            f"tensor parallel {tensor} x pipeline parallel {pipeline} asked for; without vLLM and "
            f"{values['trainer.devices']} GPUs on this node one device of node 0 does all, and the other "
            f"{rank.num_tasks - 1} processes wait"
        )


def _load(model: str) -> InferenceEngine:
    from nemotron4.inference.load import load

    return load(model)


def _serve(load: Callable[[], InferenceEngine], values: Mapping[str, Any]) -> None:
    from nemotron4.server.run import run as serve
    from nemotron4.server.settings import ServerSettings

    settings = ServerSettings(host=str(values.get("host", "127.0.0.1")), page=page_settings(values))
    serve(load, port=values["port"], settings=settings)


def page_settings(values: Mapping[str, Any]) -> PageSettings | None:
    """The web page on a port of its own, behind the login. Without ``web_server`` ``GET /`` is NeMo's 404."""
    from nemotron4.server.settings import PageSettings

    if not values["web_server"]:
        return None
    if type(values["web_port"]) is not int or values["web_port"] == values["port"]:
        raise ConfigError(
            f"web_port is {values['web_port']!r}; expected an integer other than port ({values['port']})"
        )
    name, password = str(values["username"]), str(values["password"])
    note(f"the page is on http://localhost:{values['web_port']}/ (name {name}, password as given)")
    if values["share"]:
        note("share=True is ignored: nothing is tunnelled to the public")
    if (name, password) == (DEFAULTS["username"], DEFAULTS["password"]):
        note("the page has NeMo's default password; set username=... password=...")
    return PageSettings(
        starts_with="chat" if values["chat"] else "raw", port=values["web_port"], login=(name, password)
    )


def _answer_offline(load: Callable[[], InferenceEngine], values: Mapping[str, Any]) -> None:
    """Both runs of the original: all prompts at once, then in batches of two."""
    prompts = _prompts(values)
    engine = load()
    try:
        answers = asyncio.run(_generate(engine, values, [prompts, *_pairs(prompts)]))
    finally:
        engine.close()
    _print_between_stars(answers[0])
    _print_between_stars(answers[1:])


def _prompts(values: Mapping[str, Any]) -> list[str]:
    prompts = values.get("prompts") or []
    if not isinstance(prompts, list) or not all(isinstance(p, str) for p in prompts):
        raise ConfigError(f"prompts is {prompts!r}; expected a list of texts")
    if values.get("prompts_jsonl"):
        from nemotron4.records import read_json_lines

        rows = read_json_lines(Path(str(values["prompts_jsonl"])))
        return [str(row.get("prompt", row.get("text", ""))) for _, row in rows]
    return prompts


def _pairs(prompts: list[str]) -> list[list[str]]:
    return [prompts[i : i + 2] for i in range(0, len(prompts), 2)]


async def _generate(
    engine: InferenceEngine, values: Mapping[str, Any], batches: list[list[str]]
) -> list[dict[str, Any]]:
    """Each batch through the same checks and rules as ``PUT /generate``."""
    import httpx

    from nemotron4.server.app import create_app
    from nemotron4.server.settings import ServerSettings

    settings = {
        name.removeprefix("inference."): value
        for name, value in values.items()
        if name.startswith("inference.") and name != "inference.use_flash_attention"
    }
    transport = httpx.ASGITransport(create_app(engine, ServerSettings()))
    answers = []
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=None) as client:
        for sentences in batches:
            response = await client.put("/generate", json={"sentences": sentences, **settings})
            answer = response.json()
            if not isinstance(answer, dict) or "sentences" not in answer:
                raise ConfigError(f"the prompts cannot be answered: {answer}")
            order = ("sentences", "tokens", "logprob", "full_logprob", "token_ids", "offsets")
            answers.append({name: answer.get(name) for name in order})
    return answers


def _print_between_stars(value: Any) -> None:
    print(STARS)
    print(value)
    print(STARS, flush=True)


def main() -> int:
    from nemotron4.cli.main import explained

    return explained(lambda: run(sys.argv[1:], os.environ))


if __name__ == "__main__":
    sys.exit(main())
