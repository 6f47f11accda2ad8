"""Answers to the same few prompts after every validation: what the numbers of a run do not show.

They go to ``samples.jsonl`` in the run's folder and change nothing of the run.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nemotron4.training.formats import Prompt
from nemotron4.training.metrics import Progress, forget_after
from nemotron4.training.rollouts import Draw, PromptSample
from nemotron4.training.sampler import Sampler

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
            forget_after(path, step)

    def write(self, progress: Progress) -> None:
        if progress.kind != "validation":
            return
        draws = [Draw(sample.segments[0].tokens, seed=0) for sample in self.prompts]
        answers = self.sampler(draws, max_new_tokens=self.max_new_tokens, temperature=0.0)
        if not self.is_writer:
            return
        lines = [
            json.dumps(
                {
                    "step": progress.step,
                    "prompt": _plain(sample.prompt),
                    "answer": answer.text,
                    "is_finished": answer.is_finished,
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
