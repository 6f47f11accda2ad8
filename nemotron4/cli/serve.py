"""``nemotron4 serve``: put a model on a port."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from nemotron4.checkpoint.shipped import AUTO, NONE, chosen_adapter, with_shipped
from nemotron4.cli.console import note, show_notes
from nemotron4.cli.engines import EngineName, Parallel, run_vllm
from nemotron4.cli.options import (
    PORT,
    ChatTemplateOption,
    ContextOption,
    DeviceOption,
    DtypeOption,
    ForceAdapterOption,
    GpuMemoryOption,
    KvCacheDtypeOption,
    ModelArgument,
    NameAtServerOption,
    PolicyOption,
    QuantizeOption,
    RevisionOption,
    ServedNameOption,
)
from nemotron4.errors import ConfigError, Problems, unknown_name
from nemotron4.inference import NUM_SPECULATIVE_TOKENS, PREFIX_CACHE_GB
from nemotron4.server.settings import RemoteServer, ServerSettings, read_api_keys

if TYPE_CHECKING:
    from nemotron4.engine import InferenceEngine
    from nemotron4.server.guard import Guard, GuardSettings
    from nemotron4.server.page import PageTab


def serve(
    model: ModelArgument,
    host: Annotated[str, typer.Option(help="0.0.0.0 listens to every network.")] = ServerSettings.host,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = PORT,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    quantize: QuantizeOption = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]PATH",
            help="A trained adapter. NAME=PATH, repeatable: one that requests choose. "
            "auto (default): the one that ships for the model. none: no adapter.",
        ),
    ] = None,
    enable_lora: Annotated[
        bool, typer.Option("--enable-lora", help="Let POST /v1/load_lora_adapter add adapters.")
    ] = False,
    force_adapter: ForceAdapterOption = False,
    chat_template: ChatTemplateOption = None,
    max_running: Annotated[int, typer.Option(min=1, help="Rows answered at the same time.")] = 128,
    max_waiting: Annotated[int, typer.Option(min=1, help="Rows that wait; more are answered 429.")] = 1024,
    cache_gb: Annotated[
        float | None, typer.Option(help="Memory for keys and values; else a share of what is free.")
    ] = None,
    prefix_cache_gb: Annotated[
        float, typer.Option(min=0, help="Of it, what ended requests may leave for later ones.")
    ] = PREFIX_CACHE_GB,
    num_speculative_tokens: Annotated[
        int, typer.Option(min=0, help="Most tokens guessed at once while one row runs alone (builtin).")
    ] = NUM_SPECULATIVE_TOKENS,
    context: ContextOption = None,
    kv_cache_dtype: KvCacheDtypeOption = "auto",
    gpu_memory_utilization: GpuMemoryOption = None,
    revision: RevisionOption = None,
    start_timeout_s: Annotated[
        float | None, typer.Option(min=1, help="Longest start of vLLM; default an hour.")
    ] = None,
    engine: Annotated[EngineName, typer.Option(help="builtin: one device. vllm: many.")] = "builtin",
    tensor_parallel: Annotated[
        int, typer.Option(help="Devices that share each layer (vllm).")
    ] = Parallel.tensor,
    pipeline_parallel: Annotated[
        int, typer.Option(help="Stages of layers, one after the other (vllm).")
    ] = Parallel.pipeline,
    nodes: Annotated[int, typer.Option(help="The same command runs on each (vllm).")] = Parallel.nodes,
    served_model_name: ServedNameOption = None,
    unknown_fields: Annotated[
        Literal["warn", "refuse"], typer.Option(help="Of OpenAI bodies: ignore with a header, or 400.")
    ] = ServerSettings.unknown_fields,
    clip_max_tokens: Annotated[
        bool, typer.Option("--clip-max-tokens", help="Cut a max_tokens beyond the context.")
    ] = False,
    nemo_compat: Annotated[
        Literal["strict", "fixed"],
        typer.Option(help="strict: as NeMo. fixed: refusals are HTTP 400, penalties count."),
    ] = ServerSettings.nemo_compat,
    take_weights: Annotated[
        bool, typer.Option("--take-weights", help="Take weights from a trainer (needs a key).")
    ] = False,
    api_key_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Require one of these keys, one a line.")
    ] = None,
    allowed_host: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Answer to this host too; repeatable.")
    ] = None,
    allowed_origin: Annotated[
        list[str] | None,
        typer.Option(metavar="ORIGIN", help="Let pages of this site in; repeatable, * is all."),
    ] = None,
    tool_format: Annotated[
        str | None, typer.Option(help="hermes, llama3, mistral or nemotron; default the template's own.")
    ] = None,
    max_body_mb: Annotated[float, typer.Option(help="Largest request body.")] = 8.0,
    compare_with: Annotated[
        str | None, typer.Option(metavar="URL", help="Another server, for the page.")
    ] = None,
    reward_model: Annotated[
        str | None, typer.Option(metavar="URL", help="A reward model's server, for the page.")
    ] = None,
    guard: Annotated[
        str | None,
        typer.Option(metavar="URL", help="A content-safety model that screens prompts and answers."),
    ] = None,
    guard_name: NameAtServerOption = None,
    guard_mode: Annotated[
        Literal["block", "annotate"], typer.Option(help="Refuse what is unsafe, or only report it.")
    ] = "block",
    guard_failure: Annotated[
        Literal["closed", "open"], typer.Option(help="Without a verdict: refuse, or pass.")
    ] = "closed",
    guard_policy: PolicyOption = None,
    guard_permissive: Annotated[
        bool, typer.Option("--guard-permissive", help="Needs Caution (O13) counts as safe.")
    ] = False,
    guard_raw: Annotated[
        bool, typer.Option("--guard-raw", help="Ask by /v1/completions, as AEGIS' classifiers need it.")
    ] = False,
    redteam: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Show the red-team tab, which records here.")
    ] = None,
) -> int:
    """Serve a model: PUT /generate (NeMo), /v1 (OpenAI) and a web page on one port.

    The port opens when the model can generate. SIGTERM or Ctrl-C lets running requests end; a second signal
    exits at once. Keys: NEMOTRON4_API_KEY (--compare-with), NEMOTRON4_JUDGE_API_KEY (--reward-model).
    """
    _look_first(api_key_file, adapter or (), chat_template)
    settings = ServerSettings(
        host=host,
        served_names=tuple(served_model_name or ()),
        unknown_fields=unknown_fields,
        clips_max_tokens=clip_max_tokens,
        nemo_compat=nemo_compat,
        api_keys=() if api_key_file is None else read_api_keys(api_key_file),
        allowed_hosts=tuple(allowed_host or ()),
        allowed_origins=tuple(allowed_origin or ()),
        tool_format=tool_format,
        takes_weights=take_weights,
        max_body_bytes=int(max_body_mb * 1e6),
        compare_with=_endpoint(compare_with, "NEMOTRON4_API_KEY"),
        reward_model=_endpoint(reward_model, "NEMOTRON4_JUDGE_API_KEY"),
    )
    merged, named = split_adapters(adapter or (), is_enabled=enable_lora)
    from nemotron4.cluster.slurm import find_rank
    from nemotron4.server.guard import GuardSettings
    from nemotron4.server.run import run
    from nemotron4.text.content_safety import read_policy

    guard_settings = GuardSettings(
        mode=guard_mode,
        failure=guard_failure,
        is_permissive=guard_permissive,
        is_raw=guard_raw,
        policy=read_policy(guard_policy),
    )
    screen = None if guard is None else _connect_guard(guard, guard_name, guard_settings)

    def put_on_port(load: Callable[[], InferenceEngine]) -> None:
        with _tabs(redteam) as tabs:
            run(load, port=port, settings=settings, guard=screen, tabs=tabs)

    options: dict[str, Any] = {"dtype": dtype, "device": device, "cache_gb": cache_gb}
    options |= {"max_running": max_running, "max_waiting": max_waiting, "chat_template": chat_template}
    parallel = Parallel(tensor=tensor_parallel, pipeline=pipeline_parallel, nodes=nodes)
    if engine == "vllm":
        _check_vllm(model, named, quantize, (prefix_cache_gb, num_speculative_tokens))
        return run_vllm(
            model,
            find_rank(os.environ),
            parallel,
            put_on_port,
            port=port,
            adapter=chosen_adapter(model, merged),
            context=context,
            kv_cache_dtype=kv_cache_dtype,
            gpu_memory_utilization=gpu_memory_utilization,
            revision=revision,
            start_timeout_s=start_timeout_s,
            **options,
        )
    parallel.require_one_device()
    _check_builtin(kv_cache_dtype)
    options |= {"quantize": quantize, "force_adapter": force_adapter, "memory_share": gpu_memory_utilization}
    options |= {"prefix_cache_gb": prefix_cache_gb, "num_speculative_tokens": num_speculative_tokens}
    put_on_port(lambda: _load_builtin(model, merged, named, context=context, revision=revision, **options))
    return 0


def _look_first(keys: Path | None, adapters: Sequence[str], template: str | None) -> None:
    """Names of files that lead nowhere, told together."""
    from nemotron4.text.prompt import FORMATS

    problems = Problems()
    with problems.kept():
        if keys is not None:
            read_api_keys(keys)
    for each in adapters:
        with problems.kept():
            name, _, path = each.partition("=")
            if each not in (AUTO, NONE) and not Path(each).exists() and not Path(path or each).exists():
                raise ConfigError(
                    f"adapter {name!r}: there is no {path or each}", hint="name the adapter's folder"
                )
    with problems.kept():
        if template is not None and template not in FORMATS and not Path(template).is_file():
            message, hint = unknown_name("prompt format", template, FORMATS)
            raise ConfigError(f"{message}, and there is no such file", hint=hint)
    problems.tell()


def _endpoint(url: str | None, key_variable: str) -> RemoteServer | None:
    return None if url is None else RemoteServer(url, os.environ.get(key_variable))


def _check_vllm(
    model: str, named: dict[str, str] | None, quantize: str | None, cache_and_guesses: tuple[float, int]
) -> None:
    if named is not None:
        raise ConfigError("vLLM runs here with one adapter, without a name", hint="--adapter PATH")
    if quantize is not None:
        raise ConfigError(
            f"quantize is {quantize!r}; vLLM reads weights that are quantised already",
            hint=f"nemotron4 convert {model} DST --to hf --quantize {quantize}, then serve DST",
        )
    if cache_and_guesses != (PREFIX_CACHE_GB, NUM_SPECULATIVE_TOKENS):
        raise ConfigError(
            "prefix_cache_gb and num_speculative_tokens are of the built-in engine; vLLM reads neither",
            hint="leave them out",
        )


def _check_builtin(kv_cache_dtype: str) -> None:
    if kv_cache_dtype != "auto":
        raise ConfigError(
            f"kv_cache_dtype is {kv_cache_dtype!r}; the built-in engine keeps the model's type",
            hint="leave it out, or add --engine vllm",
        )


def _load_builtin(
    model: str,
    adapter: str,
    named: dict[str, str] | None,
    *,
    context: int | None,
    revision: str | None,
    **options: Any,
) -> InferenceEngine:
    """A chat model, or a reward model where the checkpoint or its adapter has a reward head."""
    from nemotron4.checkpoint import open_checkpoint
    from nemotron4.checkpoint.opening import watched
    from nemotron4.inference.load import load

    opened, chosen = with_shipped(model, adapter, note)
    with watched(open_checkpoint(opened, context=context, revision=revision)) as checkpoint:
        if checkpoint.config.num_reward_attributes or (chosen and _has_reward_head(chosen)):
            if named is not None:
                raise ConfigError("a reward model has one adapter, without a name", hint="--adapter PATH")
            forgotten = [
                name for name in ("quantize", "chat_template", "cache_gb") if options[name] is not None
            ]
            if forgotten:
                raise ConfigError(f"a reward model takes no {', no '.join(forgotten)}", hint="leave it out")
            from nemotron4.inference.reward import load_reward  # with torch, which a language model needs not

            taken = ("dtype", "device", "force_adapter", "max_waiting")
            return load_reward(checkpoint, adapter=chosen, **{name: options[name] for name in taken})
        ready = load(checkpoint, adapter=chosen, adapters=named, **options)
    show_notes(ready.info)
    return ready


def split_adapters(given: Sequence[str], *, is_enabled: bool = False) -> tuple[str, dict[str, str] | None]:
    """The adapter that is merged into the weights (auto, none), and those next to them: None for no room."""
    named: dict[str, str] = {}
    merged: list[str] = []
    for each in given:
        name, sign, path = each.partition("=")
        if not sign or Path(each).exists():
            merged.append(each)
        elif not name or not path or name in named:
            raise ConfigError(f"adapter is {each!r}; expected NAME=PATH, each name once")
        else:
            named[name] = path
    has_room = bool(named) or is_enabled
    if len(merged) > 1 or (has_room and merged not in ([], [NONE])):
        raise ConfigError(
            f"adapter is {', '.join(given)}; one alone is merged into the weights",
            hint="give each a name: --adapter NAME=PATH",
        )
    return (merged[0] if merged else NONE if has_room else AUTO), (named if has_room else None)


def _connect_guard(url: str, name: str | None, settings: GuardSettings) -> Guard:
    """The guard behind an address; an error if nothing answers there. Its key is NEMOTRON4_GUARD_API_KEY."""
    from nemotron4.client.remote import connect
    from nemotron4.server.guard import TIMEOUT_S, Guard

    classifier = connect(url, name, key_variable="NEMOTRON4_GUARD_API_KEY", timeout_s=TIMEOUT_S)
    return Guard(classifier, settings)


@contextmanager
def _tabs(sessions: Path | None) -> Iterator[list[PageTab]]:
    """What the page shows next to the chat: the workspace of red-teaming, over this file."""
    if sessions is None:
        yield []
        return
    from nemotron4.redteam.session_report import page_tab
    from nemotron4.redteam.sessions import SessionStore
    from nemotron4.server.page import PageTab

    with closing(SessionStore(sessions)) as store:
        yield [PageTab(**page_tab(store))]


def _has_reward_head(adapter: Path) -> bool:
    from nemotron4.model.adapter_files import has_reward_head

    return has_reward_head(adapter)
