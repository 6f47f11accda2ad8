"""Answers by servers that hold the policy: ``nemotron4 serve --take-weights``, one or several.

The trainer sends each server the weights after every step, tensor by tensor, so no process needs room for the
whole policy. Requests may be under way while the trainer learns: their answers are then by weights some steps
behind, and each has its own log-probabilities, by which the trainer weighs it.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from nemotron4.client import ClientError, RetryPolicy, api_key, call_with_retries
from nemotron4.client.http import HttpEndpoint
from nemotron4.engine import SamplingRequest
from nemotron4.errors import ConfigError, TrainingError
from nemotron4.model.adapters import LoraLinear, adapted_modules
from nemotron4.records import Generation
from nemotron4.training import parallel
from nemotron4.training.engine import TrainingEngine
from nemotron4.training.rollout_settings import RolloutSection
from nemotron4.training.sampler import DrawnAnswer
from nemotron4.training.stopping import StopSwitch, joined_unless_stopped

PART_BYTES = 3 << 20  # of a tensor in one request
ROWS_OF_A_CALL = 16
TIMEOUT_S = 3600.0
RETRIES = RetryPolicy(max_attempts=6, max_wait_s=20.0)


class RemoteSampler:
    """What a ``Sampler`` does, by servers. Every process of a run has one and makes the same calls."""

    def __init__(self, engine: TrainingEngine, settings: RolloutSection, stop: StopSwitch) -> None:
        self._engine, self._settings, self._stop = engine, settings, stop
        self._key = api_key(settings.server_key_env, "policy_gradient.servers")
        kinds = {type(module) for module in adapted_modules(engine.scorer.net).values()}
        if kinds - {LoraLinear}:
            raise ConfigError(
                f"servers cannot have an adapter of kind {kinds.pop().__name__} in their weights",
                hint='train with adapter.kind = "lora", or without servers',
            )
        self._threads = ThreadPoolExecutor(max_workers=1 + settings.max_staleness)
        self._version = 0  # of the weights here: updates since the run began

    def __call__(self, requests: Sequence[SamplingRequest]) -> list[Generation]:
        return [each.generation for each in self.begin(requests)()]

    def begin(self, requests: Sequence[SamplingRequest]) -> Callable[[], list[DrawnAnswer]]:
        """Send this process's share; the returned function waits for everybody's answers."""
        share = list(self._engine.share(requests))
        pending = self._threads.submit(lambda: asyncio.run(self._stop.wait(self._ask_all(share))))

        def wait() -> list[DrawnAnswer]:
            found = joined_unless_stopped(self._engine, pending.result)
            oldest = min((version for _, version in found), default=self._version)
            if self._version - oldest > self._settings.max_staleness:
                raise TrainingError(
                    f"a server answered by weights {self._version - oldest} updates old; "
                    f"expected at most {self._settings.max_staleness}",
                    hint="was it restarted, or is it shared? The same command sends the weights anew",
                )
            return [DrawnAnswer(each, self._version - version) for each, version in found]

        return wait

    async def _ask_all(self, requests: Sequence[SamplingRequest]) -> list[tuple[Generation, int]]:
        servers = [self._endpoint(url) for url in self._settings.servers]
        calls = [requests[i : i + ROWS_OF_A_CALL] for i in range(0, len(requests), ROWS_OF_A_CALL)]
        try:
            found = await asyncio.gather(
                *(self._ask(servers[i % len(servers)], call, i) for i, call in enumerate(calls))
            )
        except ClientError as error:
            raise TrainingError(
                f"a server of answers failed: {error.message}",
                hint="the same command continues when it works again",
            ) from error
        finally:
            for server in servers:
                await server.close()
        return [each for part in found for each in part]

    async def _ask(
        self, server: HttpEndpoint, requests: Sequence[SamplingRequest], place: int
    ) -> list[tuple[Generation, int]]:
        body = {
            "max_new_tokens": requests[0].params.max_new_tokens,
            "temperature": requests[0].params.temperature,
            "requests": [
                {"prompt_ids": list(each.prompt_ids), "seed": each.params.seed or 0} for each in requests
            ],
        }
        answer = await call_with_retries(
            lambda: server.request("POST", "/rollouts", body), policy=RETRIES, seed=place
        )
        return [(Generation.from_json(row), int(answer["version"])) for row in answer["answers"]]

    def _endpoint(self, url: str) -> HttpEndpoint:
        return HttpEndpoint(url, api_key=self._key, timeout_s=TIMEOUT_S)

    # ---- the weights

    def update(self) -> None:
        """Give every server the policy as it is; what never trains is sent once."""
        tensors = self._merged(is_first=self._version == 0)
        self._version += 1
        if parallel.is_first():
            try:
                asyncio.run(self._send(tensors))
            except ClientError as error:
                raise TrainingError(
                    f"the weights could not be sent: {error.message}",
                    hint="is it nemotron4 serve --take-weights, with this key and the run's own model?",
                ) from error
        else:
            for _ in tensors:
                pass  # sharded tensors are made whole by all processes together

    async def _send(self, tensors: Iterator[tuple[str, Tensor]]) -> None:
        servers = [self._endpoint(url) for url in self._settings.servers]
        try:
            for name, tensor in tensors:
                for part in _parts(name, tensor):
                    await self._post(servers, {"parts": [part]})
            await self._post(servers, {"version": self._version})
        finally:
            for server in servers:
                await server.close()

    async def _post(self, servers: Sequence[HttpEndpoint], body: Mapping[str, Any]) -> None:
        async def send(server: HttpEndpoint) -> None:
            await call_with_retries(lambda: server.request("POST", "/weights", body), policy=RETRIES)

        await asyncio.gather(*(send(each) for each in servers))

    def _merged(self, *, is_first: bool) -> Iterator[tuple[str, Tensor]]:
        """The policy's weights one after the other, LoRA in them; all of them, or those that have changed."""
        net = self._engine.scorer.net
        named = dict(net.named_parameters())
        found = adapted_modules(net).items()
        lora = {name: module for name, module in found if isinstance(module, LoraLinear)}
        small = {name: tensor for name, tensor in named.items() if ".lora_" in name}
        factors = {name: tensor.detach().float() for name, tensor in self._engine.whole_tensors(small)}
        wanted = {
            name: tensor
            for name, tensor in named.items()
            if name not in small
            and (is_first or tensor.requires_grad or name.removesuffix(".weight") in lora)
        }
        for name, tensor in self._engine.whole_tensors(wanted):
            module = name.removesuffix(".weight")
            whole = tensor.detach()
            if module in lora and name.endswith(".weight"):
                update = factors[f"{module}.lora_B.weight"] @ factors[f"{module}.lora_A.weight"]
                summed = whole.float() + lora[module].scale * update
                lengths = factors.get(f"{module}.lora_magnitude_vector")
                if lengths is not None:
                    summed *= (lengths / summed.norm(dim=1))[:, None]
                whole = summed.to(whole.dtype)
            yield name, whole


def _parts(name: str, tensor: Tensor) -> Iterator[dict[str, Any]]:
    kind = torch.bfloat16 if tensor.dtype == torch.bfloat16 else torch.float32
    data = tensor.to("cpu", kind).contiguous().flatten().view(torch.uint8).numpy()
    for start in range(0, len(data), PART_BYTES):
        yield {
            "name": name,
            "shape": list(tensor.shape),
            "dtype": str(kind).removeprefix("torch."),
            "start": start,
            "data": base64.b64encode(data[start : start + PART_BYTES].tobytes()).decode(),
        }
