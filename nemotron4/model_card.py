"""A model card in the layout of the published one: the same headings and tables, in the same order.

What is not known is an empty cell or an empty section with its reason. The writer of a trained model and
``nemotron4 card`` fill the same form.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from nemotron4.report import Block, Table, as_markdown

MARK = "<!-- written by nemotron4 -->"
# Title, what it is, task, and the columns of its table with their metrics, as on the published card.
EVALUATIONS: tuple[tuple[str, str, str, tuple[tuple[str, str], ...]], ...] = (
    ("MT-Bench (GPT-4-Turbo)", "160 answers, rated by a judge.", "mt_bench",
     (("total", "total"), ("writing", "writing"), ("roleplay", "roleplay"), ("extraction", "extraction"),
      ("stem", "stem"), ("humanities", "humanities"), ("reasoning", "reasoning"), ("math", "math"),
      ("coding", "coding"), ("turn 1", "turn_1"), ("turn 2", "turn_2"))),
    ("IFEval", "Instructions that a program checks, 541 prompts.", "ifeval",
     (("Prompt-Strict Acc", "prompt_strict"), ("Instruction-Strict Acc", "instruction_strict"))),
    ("MMLU", "One letter, generated.", "mmlu", (("MMLU 0-shot", "accuracy"),)),
    ("GSM8K", "School mathematics, the number after ####.", "gsm8k", (("GSM8K 0-shot", "strict"),)),
    ("HumanEval", "Functions, run against their tests.", "humaneval", (("HumanEval 0-shot", "pass@1"),)),
    ("MBPP", "Short programs, run against their asserts.", "mbpp", (("MBPP 0-shot", "pass@1"),)),
    ("Arena Hard", "500 questions against a baseline, judged in both orders.", "arena_hard",
     (("Arena Hard", "score"),)),
    ("AlpacaEval 2.0 LC", "Win rate, corrected for length.", "alpaca_eval",
     (("AlpacaEval 2.0 LC", "lc_win_rate"),)),
    ("TFEval", "Staying on the topic that the system turn sets.", "tfeval",
     (("Distractor F1", "distractor_f1"), ("On-topic F1", "on_topic_f1"))),
)  # fmt: skip
METHODS = ("Garak", "AEGIS", "Human Content Red Teaming")


@dataclass(frozen=True)
class Measured:
    """Values of one task by metric, what the reader must know of them, and why others are missing."""

    values: Mapping[str, str]
    note: str


@dataclass(frozen=True, kw_only=True)
class CardContent:
    """Lines are Markdown. An empty section says ``missing[NAME]``, or that nobody has written it."""

    name: str
    overview: Sequence[str] = ()
    licence: Sequence[str] = ()
    intended_use: Sequence[str] = ()
    hardware: Sequence[str] = ()
    architecture: Sequence[str] = ()
    prompts: Mapping[str, str] = field(default_factory=dict)  # title -> prompt as text
    usage: Sequence[str] = ()  # commands
    evaluations: Mapping[str, Measured] = field(default_factory=dict)  # task -> numbers
    red_teaming: Mapping[str, str] = field(default_factory=dict)  # method -> what was found
    limitations: Sequence[str] = ()
    ethics: Sequence[str] = ()
    training: Sequence[Block] = ()
    missing: Mapping[str, str] = field(default_factory=dict)  # section or task -> why it is empty


def render(card: CardContent) -> str:
    """The whole card as Markdown."""
    sections = [
        f"{MARK}\n## {card.name}",
        _section(card, "Model Overview", card.overview),
        _section(card, "License", card.licence),
        _section(card, "Intended use", card.intended_use),
        _section(card, "Required Hardware", card.hardware),
        _section(card, "Model Architecture", card.architecture),
        _prompts(card),
        _usage(card),
        _evaluations(card),
        _red_teaming(card),
        _section(card, "Limitations", card.limitations),
        _section(card, "Ethical Considerations", card.ethics),
    ]
    if card.training:
        sections.append(f"### Training\n\n{as_markdown(card.training)}")
    return "\n\n".join(section.strip() for section in sections) + "\n"


def _reason(card: CardContent, name: str) -> str:
    return card.missing.get(name, "nobody has written it")


def _section(card: CardContent, title: str, lines: Sequence[str]) -> str:
    body = "\n".join(f"- {line}" for line in lines) if lines else f"Empty: {_reason(card, title)}."
    return f"### {title}\n{body}"


def _prompts(card: CardContent) -> str:
    if not card.prompts:
        return _section(card, "Prompt Format", ())
    parts = [f"#### {title}\n```text\n{text}\n```" for title, text in card.prompts.items()]
    return "\n\n".join(["### Prompt Format", *parts])


def _usage(card: CardContent) -> str:
    if not card.usage:
        return _section(card, "Usage", ())
    return "### Usage\n```bash\n" + "\n".join(card.usage) + "\n```"


def _evaluations(card: CardContent) -> str:
    parts = ["### Evaluation Results"]
    for title, what, task, columns in EVALUATIONS:
        found = card.evaluations.get(task)
        cells = [found.values.get(metric, "") if found else "" for _, metric in columns]
        table = as_markdown([Table([label for label, _ in columns], [cells])]).strip()
        notes = [f"- {what}"]
        if found is not None and found.note:
            notes.append(f"- {found.note}")
        if not all(cells):
            reason = card.missing.get(task, "no result was given" if found is None else "it was not scored")
            notes.append(f"- Empty: {reason}.")
        parts.append("\n".join([f"#### {title}", *notes]) + f"\n\n{table}")
    return "\n\n".join(parts)


def _red_teaming(card: CardContent) -> str:
    lines = [
        f"- **{method}**: {card.red_teaming.get(method) or f'empty: {_reason(card, method)}.'}"
        for method in METHODS
    ]
    return "### Adversarial Testing and Red Teaming Efforts\n" + "\n".join(lines)
