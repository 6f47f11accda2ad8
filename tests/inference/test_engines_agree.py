"""What the interface of an engine promises, asked of the built-in engine and of vLLM on the same model.

vLLM's half runs where vLLM is installed: scripts/vllm-env makes such an environment and says how.
"""

from __future__ import annotations

import asyncio
import copy
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from nemotron4.checkpoint import open_checkpoint
from nemotron4.checkpoint.convert import ConvertOptions, convert
from nemotron4.checkpoint.load import load_transformer
from nemotron4.engine import InferenceEngine, SamplingParams, SamplingRequest, TakesWeights, TokenStep
from nemotron4.errors import Nemotron4Error, RequestError
from nemotron4.inference import sampling, vllm_load
from nemotron4.inference.load import load
from nemotron4.inference.vllm_load import Layout, is_installed, load_vllm
from nemotron4.model.adapter_config import AdapterConfig
from nemotron4.model.adapter_files import adapter_tensors, write_adapter
from nemotron4.model.adapters import add_adapter
from nemotron4.model.transformer import Transformer
from nemotron4.server.app import create_app
from tests.tiny_models import nemotron_directory

PROMPT = [5, 100, 101, 102, 103, 104]
CONTEXT = 256
NEEDS_VLLM = [
    pytest.mark.slow,
    pytest.mark.skipif(not is_installed(), reason="vLLM is not installed here: see scripts/vllm-env"),
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("default"),
]
SIZES = {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 64,
    "head_dim": 32,
    "intermediate_size": 96,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``convert`` writes from a random model."""
    folder = tmp_path_factory.mktemp("models")
    source = nemotron_directory(folder / "source", max_position_embeddings=CONTEXT, **SIZES)
    convert(open_checkpoint(source), folder / "hf", ConvertOptions(to="hf"))
    return folder / "hf"


@pytest.fixture(scope="module")
def module(model: Path) -> Transformer:
    return load_transformer(open_checkpoint(model), dtype=torch.float32)[0]


@pytest.fixture(scope="module", params=["builtin", pytest.param("vllm", marks=NEEDS_VLLM)])
def engine(request: pytest.FixtureRequest, model: Path) -> Iterator[InferenceEngine]:
    opened = load_vllm(model) if request.param == "vllm" else load(model)
    yield opened
    opened.close()


def run_all(engine: InferenceEngine, prompts: list[list[int]], **params: Any) -> list[list[TokenStep]]:
    async def one(prompt: list[int]) -> list[TokenStep]:
        return [step async for step in engine.stream(prompt, SamplingParams(**params))]

    async def every() -> list[list[TokenStep]]:
        return await asyncio.gather(*map(one, prompts))

    return asyncio.run(every())


def run(engine: InferenceEngine, prompt: list[int] = PROMPT, **params: Any) -> list[TokenStep]:
    return run_all(engine, [prompt], **params)[0]


def ids(steps: list[TokenStep]) -> list[int]:
    return [step.token_id for step in steps if step.token_id is not None]


@torch.inference_mode()
def expected_greedy(
    module: Transformer, prompt: list[int], params: SamplingParams
) -> tuple[list[int], list[float]]:
    """The obvious way: a full pass for every token, adjusted logits, the largest; with its raw score."""
    new: list[int] = []
    scores = []
    while len(new) < params.max_new_tokens:
        logits = module(torch.tensor([prompt + new]))[0, -1]
        adjusted = sampling.adjust(logits.numpy(), params, prompt_ids=prompt, new_ids=new)
        new.append(int(adjusted.argmax()))
        scores.append(float(logits.log_softmax(-1)[new[-1]]))
    return new, scores


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"repetition_penalty": 1.7},
        {"presence_penalty": 1.5, "frequency_penalty": 0.7},
        {"logit_bias": {400: 9.0, 10: -5.0}},
        {"min_new_tokens": 4, "min_tokens_masks": frozenset({364, 378}), "stop_token_ids": {364, 378}},
    ],
    ids=["plain", "repetition", "presence", "bias", "minimum"],
)
def test_greedy_tokens_and_raw_scores_are_those_of_the_full_pass(
    engine: InferenceEngine, module: Transformer, settings: dict[str, Any]
) -> None:
    asked = {"max_new_tokens": 12, "temperature": 0.0, "logprobs": 0, **settings}
    new, scores = expected_greedy(module, PROMPT, SamplingParams(**asked))
    stops = settings.get("stop_token_ids", ())
    end = next((i + 1 for i, token in enumerate(new) if token in stops), len(new))
    steps = run(engine, **asked)
    assert ids(steps) == new[:end]
    assert [s.logprobs.chosen.logprob for s in steps if s.logprobs] == pytest.approx(scores[:end], abs=2e-3)


def test_prompts_are_scored_with_and_without_new_tokens(engine: InferenceEngine, module: Transformer) -> None:
    full = [5, *range(100, 100 + CONTEXT - 1)]
    with torch.inference_mode():
        raw = module(torch.tensor([full]))[0].log_softmax(-1)
    wanted = [float(raw[i, full[i + 1]]) for i in range(len(full) - 1)]
    [only] = run(engine, full, max_new_tokens=0, prompt_logprobs=0)
    assert (only.token_id, only.finish_reason) == (None, "length")
    assert [p.chosen.logprob for p in only.prompt_logprobs or ()] == pytest.approx(wanted, abs=2e-3)
    first, *_ = run(
        engine, PROMPT, max_new_tokens=2, prompt_logprobs=2, logprobs=3, full_logprobs=True, seed=1
    )
    assert first.prompt_logprobs is not None
    assert first.logprobs is not None
    for position in (*first.prompt_logprobs, first.logprobs):
        assert position.full is not None
        assert len(position.full) == engine.info.vocab_size
        assert position.full[position.chosen.token_id] == position.chosen.logprob
        assert position.top[0].logprob == max(position.full)
    assert [len(p.top) for p in (first.prompt_logprobs[0], first.logprobs)] == [2, 3]


def test_nothing_to_generate_gives_only_the_reason(engine: InferenceEngine) -> None:
    [step] = run(engine, max_new_tokens=0)
    assert (step.token_id, step.finish_reason) == (None, "length")


def test_stop_rules(engine: InferenceEngine) -> None:
    greedy: dict[str, Any] = {"max_new_tokens": 12, "temperature": 0.0}
    free = ids(run(engine, **greedy))
    decode = engine.tokenizer.decode
    last = run(engine, stop_token_ids={free[4]}, **greedy)
    assert ids(last) == free[: free.index(free[4]) + 1]
    assert (last[-1].finish_reason, last[-1].stop_reason) == ("stop", free[4])
    text = decode([*PROMPT, *free])
    inside = text[-6:-3]  # straddles tokens somewhere
    stopped = run(engine, stop_strings=(inside,), **greedy)
    assert stopped[-1].stop_reason == inside
    assert inside in decode([*PROMPT, *ids(stopped)])
    assert inside not in decode([*PROMPT, *ids(stopped)[:-1]])[len(decode(PROMPT)) :]
    # Only the end of the whole row counts, prompt included; an empty string ends after one token.
    straddling = decode(PROMPT)[-1] + decode([*PROMPT, free[0]])[len(decode(PROMPT)) :]
    for stop in (straddling, ""):
        row = run(engine, stop_strings=(stop,), stop_scope="row_suffix", **greedy)
        assert (ids(row), row[-1].finish_reason) == (free[:1], "stop")
    assert run(engine, **greedy)[-1].finish_reason == "length"


def test_a_seed_gives_the_same_tokens_in_any_company(engine: InferenceEngine) -> None:
    asked = {"max_new_tokens": 12, "seed": 7, "temperature": 1.2, "top_k": 50, "top_p": 0.95}
    alone = ids(run(engine, **asked))
    company = run_all(engine, [PROMPT, PROMPT[:3], PROMPT[2:], PROMPT], **asked)
    assert ids(company[0]) == ids(company[3]) == alone
    assert ids(run(engine, **{**asked, "seed": 2**63 + 5})) != alone
    free = {"max_new_tokens": 20, "temperature": 1.5}
    assert ids(run(engine, **free)) != ids(run(engine, **free))


def test_the_narrowest_filters_are_greedy_and_scores_stay_raw(engine: InferenceEngine) -> None:
    greedy = run(engine, max_new_tokens=8, temperature=0.0, logprobs=0)
    for narrow in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):
        steps = run(engine, max_new_tokens=8, temperature=0.7, logprobs=0, seed=3, **narrow)
        assert ids(steps) == ids(greedy)
        assert [s.logprobs.chosen.logprob for s in steps if s.logprobs] == pytest.approx(
            [s.logprobs.chosen.logprob for s in greedy if s.logprobs], abs=2e-3
        )


@pytest.mark.parametrize(
    ("prompt", "params", "words"),
    [
        ([], {}, "the prompt is empty"),
        ([512], {}, "token id 512 is outside the vocabulary of 512"),
        ([5] * 250, {"max_new_tokens": 7}, "257.* above the context length of 256"),
        ([5], {"logit_bias": {600: 1.0}}, "600"),
    ],
)
def test_impossible_requests_are_refused(
    engine: InferenceEngine, prompt: list[int], params: dict[str, Any], words: str
) -> None:
    with pytest.raises(RequestError, match=words):
        run(engine, prompt, **params)


def test_leaving_a_stream_frees_its_place(engine: InferenceEngine) -> None:
    async def leave() -> None:
        stream: Any = engine.stream(PROMPT, SamplingParams(max_new_tokens=200))
        await anext(stream)
        await stream.aclose()

    asyncio.run(leave())
    deadline = time.monotonic() + 20
    while (engine.stats().num_running, engine.stats().num_waiting) != (0, 0):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert len(ids(run(engine, max_new_tokens=3))) == 3
    assert engine.stats().generated_tokens_total > 0


def request(engine: InferenceEngine, method: str, path: str, body: dict[str, Any]) -> httpx.Response:
    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(create_app(engine))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            return await client.request(method, path, json=body)

    return asyncio.run(send())


CARD = {
    "sentences": ["<extra_id_0>System\n\n<extra_id_1>User\nhi\n<extra_id_1>Assistant\n"],
    "tokens_to_generate": 20,
    "temperature": 1.0,
    "add_BOS": False,
    "top_k": 0,
    "top_p": 1.0,
    "greedy": True,
    "all_probs": False,
    "repetition_penalty": 1.0,
    "min_tokens_to_generate": 1,
    "end_strings": ["<|endoftext|>", "<extra_id_1>", "\x11", "<extra_id_1>User"],
}


def test_http_answers_have_nemo_s_and_openai_s_form(engine: InferenceEngine, module: Transformer) -> None:
    answer = request(engine, "PUT", "/generate", CARD)
    assert answer.status_code == 200
    assert list(json.loads(answer.text)) == ["logprob", "offsets", "sentences", "token_ids", "tokens"]
    prompt_ids = engine.tokenizer.encode(CARD["sentences"][0])  # type: ignore[index]
    wanted, _ = expected_greedy(module, prompt_ids, SamplingParams(max_new_tokens=20, temperature=0))
    got = answer.json()["token_ids"][0][len(prompt_ids) :]
    assert got == wanted[: len(got)]
    rows = request(
        engine,
        "PUT",
        "/generate",
        {"sentences": ["a", "a b c d e"], "tokens_to_generate": 3, "compute_logprob": True, "random_seed": 5},
    ).json()
    assert len({len(row) for row in rows["token_ids"]}) == 1
    assert [len(row) for row in rows["logprob"]] == [len(row) - 1 for row in rows["token_ids"]]
    refused = request(engine, "PUT", "/generate", {"sentences": ["a"], "tokens_to_generate": 0})
    assert refused.json() == "tokens_to_generate must be an integer greater than 0"
    body = {"prompt": "Shall I", "max_tokens": 4, "logprobs": 2, "seed": 3, "echo": True}
    first, second = (request(engine, "POST", "/v1/completions", body).json() for _ in range(2))
    assert first["choices"] == second["choices"]
    assert first["usage"]["completion_tokens"] == 4
    chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5, "temperature": 0}
    assert request(engine, "POST", "/v1/chat/completions", chat).status_code == 200


def near_the_built_in(model: Path, opened: InferenceEngine, *, tolerance: float) -> None:
    """Scores of a text that neither engine chose, and greedy tokens where the first of them is clear."""
    row = [5, *range(100, 140)]
    peer = load(model)
    try:
        [wanted], [got] = (run(each, row, max_new_tokens=0, prompt_logprobs=0) for each in (peer, opened))
        greedy = [ids(run(each, row, max_new_tokens=6, temperature=0.0)) for each in (peer, opened)]
    finally:
        peer.close()
    pairs = zip(wanted.prompt_logprobs or (), got.prompt_logprobs or (), strict=True)
    differences = [abs(a.chosen.logprob - b.chosen.logprob) for a, b in pairs]
    assert sum(differences) / len(differences) < tolerance
    assert greedy[0][:2] == greedy[1][:2]


def test_an_engine_answers_by_the_weights_it_is_sent(
    engine: InferenceEngine, model: Path, module: Transformer
) -> None:
    """One tensor, then all others too: the last one that was sent counts, and the checkpoint for the rest."""
    assert isinstance(engine, TakesWeights)
    params = SamplingParams(max_new_tokens=8, temperature=0.0, logprobs=0)
    own = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    other = copy.deepcopy(module)
    generator = torch.Generator().manual_seed(3)
    try:
        for is_changed in (lambda name: "layers.0.self_attn.q_proj" in name, lambda name: "norm" not in name):
            for name, tensor in other.state_dict().items():
                if is_changed(name):
                    tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)
            changed = {name: t for name, t in other.state_dict().items() if is_changed(name)}
            engine.replace_weights(changed)
            expected, scores = expected_greedy(other, PROMPT, params)
            [found] = engine.generate_each([SamplingRequest(tuple(PROMPT), params)])
            assert list(found.token_ids) == expected
            assert found.logprobs == pytest.approx(scores, abs=1e-3)
        with pytest.raises(Nemotron4Error, match=r"no\.such\.tensor"):
            engine.replace_weights({"no.such.tensor": torch.zeros(2)})
    finally:
        engine.replace_weights(own)
    assert ids(run(engine, max_new_tokens=8, temperature=0)) == expected_greedy(module, PROMPT, params)[0]


def vllm_test(function: Any) -> Any:
    for mark in NEEDS_VLLM:
        function = mark(function)
    return function


@vllm_test
@pytest.mark.parametrize(
    "layout", [Layout(tensor_parallel=2), Layout(pipeline_parallel=2)], ids=["tp2", "pp2"]
)
def test_vllm_splits_a_model_over_ranks(model: Path, layout: Layout) -> None:
    opened = load_vllm(model, layout)

    async def close_while_it_runs() -> TokenStep:
        async for step in opened.stream(PROMPT, SamplingParams(max_new_tokens=200, temperature=0)):
            if step.finish_reason is None:
                asyncio.get_running_loop().run_in_executor(None, opened.close)
        return step

    try:
        near_the_built_in(model, opened, tolerance=1e-3)
        assert asyncio.run(close_while_it_runs()).finish_reason == "abort"
    finally:
        opened.close()


@vllm_test
def test_vllm_reads_a_nemo_release_without_conversion(model: Path, tmp_path: Path) -> None:
    convert(open_checkpoint(model), tmp_path / "nemo", ConvertOptions(to="nemo", tensor_parallel=2))
    opened = load_vllm(tmp_path / "nemo")
    try:
        near_the_built_in(tmp_path / "nemo", opened, tolerance=1e-3)
    finally:
        opened.close()


@vllm_test
@pytest.mark.parametrize(("scheme", "tolerance"), [("int8", 0.05), ("fp8", 0.2)])
def test_vllm_reads_eight_bit_weights(model: Path, tmp_path: Path, scheme: Any, tolerance: float) -> None:
    """vLLM rounds activations to eight bits too, the built-in engine does not."""
    convert(open_checkpoint(model), tmp_path / "q", ConvertOptions(to="hf", quantize=scheme))
    opened = load_vllm(tmp_path / "q")
    try:
        near_the_built_in(tmp_path / "q", opened, tolerance=tolerance)
    finally:
        opened.close()


@vllm_test
def test_vllm_itself_serves_a_saved_lora_beside_its_base(model: Path, tmp_path: Path) -> None:
    """Through vLLM's own adapter support; ``--adapter`` would merge it."""
    net = load_transformer(open_checkpoint(model), dtype=torch.float32)[0]
    config = AdapterConfig(kind="lora", rank=8, alpha=16.0, targets=("all",))
    params = SamplingParams(max_new_tokens=12, temperature=0.0)
    base, _ = expected_greedy(net, PROMPT, params)
    add_adapter(net, config, seed=0)
    for name, parameter in net.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
    write_adapter(tmp_path, adapter_tensors(net, config), config, base=str(model))
    adapted, _ = expected_greedy(net, PROMPT, params)
    assert adapted != base

    vllm_load._prepare_environment(torch.device("cpu"), Layout())
    import vllm
    from vllm.lora.request import LoRARequest

    peer = vllm.LLM(
        str(model), enable_lora=True, max_lora_rank=8, dtype="float32", enforce_eager=True,
        skip_tokenizer_init=True, max_model_len=CONTEXT, max_num_seqs=2, generation_config="vllm",
        kv_cache_memory_bytes=1 << 26,
    )  # fmt: skip
    settings = vllm.SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, detokenize=False)
    for lora, wanted in ((LoRARequest("trained", 1, str(tmp_path)), adapted), (None, base)):
        prompt = {"prompt_token_ids": PROMPT}
        [answer] = peer.generate([prompt], settings, lora_request=lora, use_tqdm=False)
        assert list(answer.outputs[0].token_ids) == wanted
    peer.llm_engine.engine_core.shutdown()
