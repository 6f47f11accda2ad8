"""Answers to the same few prompts after every validation: what the numbers of a run do not show.

They go to ``samples.jsonl`` in the run's folder and change nothing of the run.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nemotron4.model.transformer import Transformer
from nemotron4.training.formats import Prompt
from nemotron4.training.metrics import Progress, forget_after
from nemotron4.training.rollouts import Draw, Generate, PromptSample

SAMPLES_FILE = "samples.jsonl"


@dataclass(frozen=True)
class Samples:
    """A ``MetricsLog`` of greedy answers by the model that trains, one line for each prompt."""

    folder: Path
    net: Transformer
    prompts: Sequence[PromptSample]
    generate: Generate
    max_new_tokens: int

    def begin(self, step: int) -> None:
        path = self.folder / SAMPLES_FILE
        if path.exists():
            forget_after(path, step)

    def write(self, progress: Progress) -> None:
        if progress.kind != "validation":
            return
        was_training = self.net.training
        self.net.eval()
        draws = [Draw(sample.segments[0].tokens, seed=0) for sample in self.prompts]
        answers = self.generate(self.net, draws, max_new_tokens=self.max_new_tokens, temperature=0.0)
        self.net.train(was_training)
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
