"""Answers by the policy that trains, on one process or on several.

One process generates by the very modules that train, so there is no second copy of the weights. Of several,
each gathers the whole policy for the time of a call and writes its share of the answers: no process waits for
another while it generates, and the policy must fit into one process.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from nemotron4.engine import SamplingParams, SamplingRequest
from nemotron4.inference.rollouts import RolloutEngine
from nemotron4.model.transformer import Transformer
from nemotron4.records import Generation
from nemotron4.training.engine import TrainingEngine
from nemotron4.training.loading import fill, in_memory
from nemotron4.training.metrics import OnPart, Part, StepRecord, forget_after, hear_nothing
from nemotron4.training.rollouts import PromptSample
from nemotron4.training.rows import Prompt
from nemotron4.training.sharded import ShardedEngine


@dataclass(frozen=True)
class DrawnAnswer:
    """An answer, and how many updates of the policy came after the weights that wrote it."""

    generation: Generation
    staleness: int = 0


@dataclass(frozen=True)
class Sampler:
    """``skeleton`` makes the whole policy on the meta device, in the type that it shall generate in."""

    engine: TrainingEngine
    generate: RolloutEngine
    skeleton: Callable[[], Transformer]
    on_part: OnPart = hear_nothing  # of this process's share

    def __call__(self, requests: Sequence[SamplingRequest]) -> list[Generation]:
        """One answer for each request, in order, on every process; all of them make the same call."""
        with self._policy() as net:
            share = self.engine.share(requests)
            found = self.generate(
                net,
                share,
                on_progress=lambda done, tokens: self.on_part(Part("answers", done, len(share), tokens)),
            )
        return self.engine.joined(found)

    def begin(self, requests: Sequence[SamplingRequest]) -> Callable[[], list[DrawnAnswer]]:
        """What gives the answers: here by the weights that the policy has when it is called."""
        return lambda: [DrawnAnswer(each) for each in self(requests)]

    def update(self) -> None:
        """The policy has changed, and answers with it."""

    @contextlib.contextmanager
    def _policy(self) -> Iterator[Transformer]:
        """The policy without dropout, in the type that the trainer computes in."""
        net = self.engine.scorer.net
        if isinstance(self.engine, ShardedEngine):
            tensors = self.engine.whole_tensors(dict(net.named_parameters()))
            net = self.skeleton()
            fill(net, (in_memory(name, tensor) for name, tensor in tensors), self.engine.device)
        assert isinstance(net, Transformer), "a policy is a language model"
        was_training = net.training
        net.eval()
        try:
            with self.engine.computing():
                yield net
        finally:
            net.train(was_training)


# ---- Answers to the same few prompts after every validation: what the numbers of a run do not show.

SAMPLES_FILE = "samples.jsonl"


@dataclass(frozen=True)
class Samples:
    """A ``MetricsLog`` of greedy answers by the model that trains, one line for each prompt.

    Every process of a run has one, because all of them generate; one of them writes.
    """

    folder: Path
    prompts: Sequence[PromptSample]
    sampler: Sampler
    max_new_tokens: int
    is_writer: bool = True

    def begin(self, step: int) -> None:
        path = self.folder / SAMPLES_FILE
        if self.is_writer and path.exists():
            forget_after(path, step if step else -1)  # the start is answered again

    def write(self, progress: StepRecord) -> None:
        if progress.kind != "validation":
            return
        greedy = SamplingParams(max_new_tokens=self.max_new_tokens, temperature=0.0)
        answers = self.sampler([SamplingRequest(each.segments[0].tokens, greedy) for each in self.prompts])
        if not self.is_writer:
            return
        lines = [
            json.dumps(
                {
                    "step": progress.step,
                    "prompt": _plain(sample.prompt),
                    "answer": answer.text,
                    "is_finished": answer.finish_reason == "stop",
                },
                ensure_ascii=False,
            )
            for sample, answer in zip(self.prompts, answers, strict=True)
        ]
        with (self.folder / SAMPLES_FILE).open("a", encoding="utf-8") as file:
            file.write("".join(line + "\n" for line in lines))

    def close(self) -> None:
        """Every line is on its way to the disk already."""


def _plain(prompt: Prompt) -> object:
    return prompt if isinstance(prompt, str) else [message.to_json() for message in prompt]
