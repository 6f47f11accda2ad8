"""Tokens/s of one stream with guessed tokens and without, in turns, greedy and drawn.

    .venv/bin/python benchmarks/inference/speculation.py [MODEL] [--precision int8] [--tokens 96] [--rounds 2]
                                                         [--temperatures 0 0.7] [--prompts question story]

Each figure is the best of its rounds; the tokens must be the same.
"""

from __future__ import annotations

import argparse
import time

import nemotron4
from nemotron4.inference import NUM_SPECULATIVE_TOKENS

TEXT = (
    "Ada Lovelace was born in London on 10 December 1815. She was the only legitimate child of the poet "
    "Lord Byron. In 1833 she met Charles Babbage, who showed her the prototype of his Difference Engine. In "
    "1843 she translated an article by the engineer Luigi Menabrea and added a long set of notes of her own. "
    "They hold what many call the first computer program, a method to compute Bernoulli numbers."
)
PROMPTS = {
    "rewriting": f"Copy this text and correct its spelling mistakes:\n\n{TEXT}",
    "extraction": f"{TEXT}\n\nList every year in the text with the sentence that it is in.",
    "synthesis": "Give me 12 topics related to cooking, each with one sentence of description.",
    "question": "Explain how a bill becomes law in the United States.",
    "story": "Write a short story about a lighthouse keeper.",
    "loop": "Count from 1 to 100, separated by commas.",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--precision", choices=("int8", "int4"))
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 0.7])
    parser.add_argument("--prompts", choices=PROMPTS, nargs="+", default=list(PROMPTS))
    options = parser.parse_args()
    with nemotron4.load(options.model, adapter=None, quantize=options.precision) as engine:
        for temperature in options.temperatures:
            for name in options.prompts:
                best, found = [0.0, 0.0], []
                before = engine.stats()
                for _ in range(options.rounds):
                    for i, count in enumerate((0, NUM_SPECULATIVE_TOKENS)):
                        # One engine for both: a second one's weights lie in other pages.
                        engine._num_speculative_tokens = count
                        began = time.perf_counter()
                        [answer] = engine.generate(
                            [[{"role": "user", "content": PROMPTS[name]}]],
                            max_new_tokens=options.tokens,
                            temperature=temperature,
                            seed=1,
                        )
                        best[i] = max(best[i], len(answer.token_ids) / (time.perf_counter() - began))
                        found.append(answer.token_ids)
                assert len(set(found)) == 1, "guesses changed a token"
                stats = engine.stats()
                guessed = stats.spec_decode_num_draft_tokens_total - before.spec_decode_num_draft_tokens_total
                right = (
                    stats.spec_decode_num_accepted_tokens_total - before.spec_decode_num_accepted_tokens_total
                )
                print(
                    f"{name}, temperature {temperature}: {best[0]:.0f} -> {best[1]:.0f} tokens/s "
                    f"({best[1] / best[0]:.2f}x), {right} of {guessed} guesses right, "
                    f"{options.rounds * len(found[0])} tokens",
                    flush=True,
                )


if __name__ == "__main__":
    main()
