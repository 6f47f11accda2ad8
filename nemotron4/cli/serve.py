"""``nemotron4 serve``: put a model on a port."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from nemotron4.cli.console import show_notes
from nemotron4.cli.engines import EngineName, Parallel, run_vllm
from nemotron4.cli.options import AdapterOption, DeviceOption, DtypeOption, ModelArgument, QuantizeOption
from nemotron4.errors import ConfigError


def serve(
    model: ModelArgument,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for every network.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")] = 1424,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    quantize: QuantizeOption = None,
    adapter: AdapterOption = None,
    max_running: Annotated[int, typer.Option(min=1, help="Rows that generate at the same time.")] = 128,
    max_waiting: Annotated[int, typer.Option(min=1, help="Rows that wait; more are answered 429.")] = 1024,
    cache_gb: Annotated[
        float | None, typer.Option(help="Memory for keys and values; without it a share of what is free.")
    ] = None,
    engine: Annotated[
        EngineName, typer.Option(help="builtin: one device. vllm: many, when vLLM is installed.")
    ] = "builtin",
    tensor_parallel: Annotated[int, typer.Option(help="Devices that share each layer (vllm).")] = 1,
    pipeline_parallel: Annotated[int, typer.Option(help="Stages of layers, one after the other (vllm).")] = 1,
    nodes: Annotated[int, typer.Option(help="Nodes; the same command runs on each (vllm).")] = 1,
    nemo_compat: Annotated[
        str,
        typer.Option(help="strict: /generate as NeMo has it. fixed: refusals are HTTP 400, penalties count."),
    ] = "strict",
    api_key_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Ask for one of the keys in this file, one a line.")
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Answer to this name too when listening on loopback; repeatable."),
    ] = None,
    max_body_mb: Annotated[float, typer.Option(help="Largest request body, in MB.")] = 8.0,
    compare_with: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Another server, whose model the page shows beside this one."),
    ] = None,
    reward_model: Annotated[
        str | None,
        typer.Option(metavar="URL", help="A server of a reward model, which judges the answers on the page."),
    ] = None,
) -> int:
    """Serve a model: PUT /generate (NeMo), /v1 (OpenAI) and a web page on one port.

    The port opens when the model can generate; a line on stderr then says so. SIGTERM or Ctrl-C lets running
    requests end and refuses new ones; a second signal exits at once. Keys for the other servers come from
    NEMOTRON4_API_KEY (--compare-with) and NEMOTRON4_JUDGE_API_KEY (--reward-model).
    """
    from nemotron4.server.settings import Endpoint, ServerSettings, read_api_keys

    def endpoint(url: str | None, key_variable: str) -> Endpoint | None:
        return None if url is None else Endpoint(url, os.environ.get(key_variable))

    settings = ServerSettings(
        host=host,
        nemo_compat=nemo_compat,  # type: ignore[arg-type]  # checked there
        api_keys=() if api_key_file is None else read_api_keys(api_key_file),
        allowed_hosts=tuple(allowed_host or ()),
        max_body_bytes=int(max_body_mb * 1e6),
        compare_with=endpoint(compare_with, "NEMOTRON4_API_KEY"),
        reward_model=endpoint(reward_model, "NEMOTRON4_JUDGE_API_KEY"),
    )

    from nemotron4.cluster.ranks import find_rank
    from nemotron4.inference.interface import InferenceEngine
    from nemotron4.server.run import run

    parallel = Parallel(tensor=tensor_parallel, pipeline=pipeline_parallel, nodes=nodes)
    if engine == "vllm":
        if quantize is not None:
            raise ConfigError(
                f"quantize is {quantize!r}; vLLM reads weights that are quantised already",
                hint=f"nemotron4 convert {model} DST --to hf --quantize {quantize}, then serve DST",
            )
        return run_vllm(
            model,
            find_rank(os.environ),
            parallel,
            lambda load: run(load, port=port, settings=settings),
            port=port,
            max_waiting=max_waiting,
            max_running=max_running,
            dtype=dtype,
            device=device,
            adapter=adapter,
            cache_gb=cache_gb,
        )
    parallel.require_one_device()

    def load_engine() -> InferenceEngine:
        from nemotron4.checkpoint import open_checkpoint
        from nemotron4.inference.load import load
        from nemotron4.inference.reward import load_reward

        if open_checkpoint(model).config.num_reward_attributes:
            return load_reward(model, dtype=dtype, device=device)
        opened = load(
            model,
            dtype=dtype,
            device=device,
            quantize=quantize,
            adapter=adapter,
            cache_gb=cache_gb,
            max_running=max_running,
            max_waiting=max_waiting,
        )
        show_notes(opened.info)
        return opened

    run(load_engine, port=port, settings=settings)
    return 0
