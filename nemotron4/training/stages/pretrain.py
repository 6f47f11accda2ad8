"""Pre-training: documents end to end in windows."""

from __future__ import annotations

from typing import Any, ClassVar

from nemotron4.training.stage import Objective, Stage
from nemotron4.training.stages.sft import TextKind


class PretrainStage(Stage):
    name = "pretrain"
    kinds = (TextKind(),)
    examples: ClassVar = {"pretrain": {}}
    reads_documents = True

    def objective(self, settings: Any) -> Objective:
        from nemotron4.training.objectives import LikelihoodObjective

        return LikelihoodObjective()


STAGE = PretrainStage()
