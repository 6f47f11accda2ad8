"""How well a reward model separates right from wrong turns.

    python benchmarks/learning/reward_auc.py ROWS MODEL

ROWS are rewards_held_out.jsonl of prepare.py, MODEL a reward stage's model folder. AUC is the share of
(right, wrong) pairs whose right turn scores higher, ties counted half; the interval is a bootstrap over rows.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nemotron4.inference.reward import load_reward

NUM_ROUNDS = 1000


def auc(scores_N: NDArray[np.float64], is_right_N: NDArray[np.bool_]) -> float:
    """Mann and Whitney's statistic over the number of pairs."""
    right, wrong = scores_N[is_right_N], np.sort(scores_N[~is_right_N])
    below = np.searchsorted(wrong, right, side="left") + np.searchsorted(wrong, right, side="right")
    return float(below.mean() / 2 / len(wrong))


def main(rows: Path, model: Path) -> None:
    engine = load_reward(model, dtype="float32")
    read = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]
    ids = [engine.tokenizer.encode(row["text"]) for row in read]
    fitting = [i for i, row in enumerate(ids) if len(row) <= engine.info.context_length]
    scores = np.array(
        [reward.attributes["helpfulness"] for reward in engine.score_ids([ids[i] for i in fitting])]
    )
    is_right = np.array([read[i]["label"][4] == 1.0 for i in fitting])
    generator = np.random.default_rng(0)
    draws = (generator.integers(len(scores), size=len(scores)) for _ in range(NUM_ROUNDS))
    low, high = np.percentile([auc(scores[draw], is_right[draw]) for draw in draws], [2.5, 97.5])
    print(f"{is_right.sum()} right, {(~is_right).sum()} wrong; {len(read) - len(fitting)} exceed the context")
    print(f"AUC {auc(scores, is_right):.3f}  [{low:.3f}, {high:.3f}]")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
