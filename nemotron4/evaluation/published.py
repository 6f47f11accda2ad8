"""Published numbers, as printed by their sources. Nothing here is measured by this project.

TR = "Nemotron-4 340B Technical Report" (NVIDIA 2024), tables 4 to 6; MC = the model card of
Nemotron-4-340B-Instruct. None is a cell the sources leave empty.
"""

from __future__ import annotations

CARD_MODEL = "Nemotron-4-340B-Instruct"
PEERS = (
    CARD_MODEL, "Llama-3-70B-Instruct", "Mixtral-8x22B-Instruct", "Qwen-2-72B-Instruct",
    "GPT-4-1106-preview", "Mistral Large", "Claude-3 Sonnet",
)  # fmt: skip
Row = tuple[float | None, ...]
# (task, metric, label) -> one value per peer (TR table 5; first column also MC).
PEER_TABLE: dict[tuple[str, str, str], Row] = {
    ("arena_hard", "score", "Arena Hard"): (54.2, 41.1, 36.4, 48.1, None, 37.7, 46.8),
    ("alpaca_eval", "lc_win_rate", "AlpacaEval 2 LC"): (41.5, 34.4, 30.9, 38.8, 50.0, 32.7, 34.9),
    ("mt_bench", "total", "MT-Bench (GPT-4-Turbo)"): (8.22, 8.16, 7.63, 8.26, 8.79, 7.80, 7.82),
    ("mmlu", "accuracy", "MMLU 0-shot"): (78.7, 77.2, None, None, None, None, None),
    ("gsm8k", "strict", "GSM8K 0-shot"): (92.3, 89.5, None, None, None, None, 92.3),
    ("humaneval", "pass@1", "HumanEval 0-shot"): (73.2, 81.7, 76.2, 86.0, 85.4, 69.5, 73.0),
    ("mbpp", "pass@1", "MBPP 0-shot"): (75.4, 82.3, 73.8, 80.2, 85.7, 72.8, 79.4),
    ("ifeval", "prompt_strict", "IFEval prompt-strict"): (79.9, 77.8, 61.7, 77.6, 77.1, None, None),
    ("ifeval", "instruction_strict", "IFEval instruction-strict"): (86.1, 84.3, 72.2, 84.2, 83.7, None, None),
    ("tfeval", "distractor_f1", "TFEval distractor F1"): (81.7, 63.0, 27.8, None, 67.5, None, None),
    ("tfeval", "on_topic_f1", "TFEval on-topic F1"): (97.7, 95.7, 83.5, None, 97.6, None, None),
}
# TR table 3, base models: (task, metric, label) -> one value per peer. The metric of ARC-Challenge and
# HellaSwag is lm-evaluation-harness' usual one; the report does not name it.
BASE_PEERS = ("Nemotron-4-340B-Base", "Llama-3 70B", "Mixtral 8x22B", "Qwen-2 72B")
BASE_TABLE: dict[tuple[str, str, str], Row] = {
    ("arc_challenge", "accuracy_norm", "ARC-Challenge 25-shot"): (94.28, 93.00, 91.30, 68.90),
    ("winogrande", "accuracy", "Winogrande 5-shot"): (89.50, 85.30, 84.70, 85.10),
    ("hellaswag", "accuracy_norm", "HellaSwag 10-shot"): (90.53, 88.00, 88.50, 87.60),
    ("mmlu_5shot", "accuracy", "MMLU 5-shot"): (81.10, 79.50, 77.75, 84.20),
    ("bbh", "accuracy", "BBH 3-shot"): (85.44, 81.30, 78.90, 82.40),
}
MT_BENCH_COLUMNS = (
    "writing", "roleplay", "extraction", "stem", "humanities", "reasoning", "math", "coding", "turn_1",
    "turn_2", "total",
)  # fmt: skip
MT_BENCH_CARD: Row = (8.70, 8.70, 9.20, 8.75, 8.95, 6.40, 8.40, 6.70, 8.61, 7.84, 8.22)
# TR table 6. The columns, and one row per alignment stage.
STAGE_COLUMNS = (
    ("mt_bench", "total", "MT-Bench"),
    ("mmlu", "accuracy", "MMLU 0-shot"),
    ("gsm8k", "strict", "GSM8K 0-shot"),
    ("humaneval", "pass@1", "HumanEval 0-shot"),
    ("ifeval", "prompt_strict", "IFEval prompt-strict"),
    ("ifeval", "instruction_strict", "IFEval instruction-strict"),
)
STAGES: dict[str, Row] = {
    "Code SFT": (6.79, 72.2, 77.6, 70.7, 46.4, 53.8),
    "+ General SFT": (7.99, 78.3, 87.9, 66.5, 61.4, 71.9),
    "+ DPO": (7.90, 78.4, 88.5, 67.1, 61.7, 72.7),
    "+ RPO 1": (8.21, 78.5, 91.1, 70.7, 78.2, 84.5),
    "+ RPO 2": (8.31, 78.6, 91.8, 68.3, 79.9, 86.1),
    "+ RPO 3 (release)": (8.22, 78.7, 92.3, 73.2, 79.9, 86.1),
}
