"""Answers by the policy that trains, on one process or on several.

One process generates by the very modules that train, so there is no second copy of the weights. Of several,
each gathers the whole policy for the time of a call and writes its share of the answers: no process waits for
another while it generates, and the policy must fit into one process.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from nemotron4.model.transformer import Transformer
from nemotron4.training.engine import Engine
from nemotron4.training.loading import fill, in_memory
from nemotron4.training.metrics import OnPart, Part, hear_nothing
from nemotron4.training.rollouts import Continuation, Draw, Generate
from nemotron4.training.sharded import ShardedEngine


@dataclass(frozen=True)
class Sampler:
    """``skeleton`` makes the whole policy on the meta device, in the type that it shall generate in."""

    engine: Engine
    generate: Generate
    skeleton: Callable[[], Transformer]
    on_part: OnPart = hear_nothing  # of this process's share

    def __call__(
        self, draws: Sequence[Draw], *, max_new_tokens: int, temperature: float
    ) -> list[Continuation]:
        """One continuation for each draw, in order, on every process; all of them make the same call."""
        with self._policy() as net:
            share = self.engine.share(draws)
            found = self.generate(
                net,
                share,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                on_progress=lambda done, tokens: self.on_part(Part("answers", done, len(share), tokens)),
            )
        return self.engine.joined(found)

    @contextlib.contextmanager
    def _policy(self) -> Iterator[Transformer]:
        """The policy without dropout."""
        net = self.engine.scorer.net
        if isinstance(self.engine, ShardedEngine):
            tensors = self.engine.whole_tensors(dict(net.named_parameters()))
            net = self.skeleton()
            fill(net, (in_memory(name, tensor) for name, tensor in tensors), self.engine.device)
        assert isinstance(net, Transformer), "a policy is a language model"
        was_training = net.training
        net.eval()
        try:
            yield net
        finally:
            net.train(was_training)
