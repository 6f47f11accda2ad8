from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemotron4.errors import TemplateError
from nemotron4.records import Message
from nemotron4.text import prompt
from nemotron4.text.json_tokenizer import JsonTokenizer
from nemotron4.text.prompt import encode_answer, encode_conversation
from nemotron4.text.sentencepiece_tokenizer import SentencePieceTokenizer
from nemotron4.text.tokenizer import Tokenizer

TWO_ROUNDS = [
    Message("system", "sys"),
    Message("user", "q1"),
    Message("assistant", "a1"),
    Message("user", "q2"),
    Message("assistant", "a2"),
]
EOS_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
FORGETFUL_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' and not loop.last %}...{% else %}{{ m.content }}"
    "{% endif %}<|im_end|>{% endfor %}"
)


def spelled(made: prompt.PromptFormat, tokenizer: Tokenizer, messages: list[Message]) -> str:
    """The conversation with what trains in [brackets]."""
    turns = encode_conversation(made, tokenizer, messages)
    text, was_trained = "", False
    for token_id, is_trained in zip(turns.token_ids, turns.is_trained, strict=True):
        if is_trained != was_trained:
            text += "[" if is_trained else "]"
        was_trained = is_trained
        text += tokenizer.piece(token_id)
    text = text.replace("<0x0A>", "\n").replace("Ċ", "\n").replace("Ġ", " ").replace("▁", " ")
    return (text + "]" if was_trained else text).removeprefix(" ")


def test_nemotron_answers_train_with_the_marker_that_follows(
    nemotron_tokenizer: SentencePieceTokenizer,
) -> None:
    assert spelled(prompt.nemotron4(), nemotron_tokenizer, TWO_ROUNDS) == (
        "<extra_id_0>System\nsys\n<extra_id_1>User\nq1\n<extra_id_1>Assistant\n[a1\n<extra_id_1>]User\nq2\n"
        "<extra_id_1>Assistant\n[a2\n<extra_id_1>]"
    )


GOLDEN = Path(__file__).parents[1] / "golden" / "nemo_chat_masks.json"


@pytest.mark.parametrize(
    "case", json.loads(GOLDEN.read_text())["cases"], ids=lambda case: case["expected"][:40]
)
def test_nemotron_masks_are_those_that_nemo_computes(
    case: dict[str, Any], nemotron_tokenizer: SentencePieceTokenizer
) -> None:
    turns = [Message(turn["role"], turn["content"]) for turn in case["turns"]]
    made = prompt.nemotron4({int(place) + 1: values for place, values in case["labels"].items()})
    messages = [Message("system", case["system"]), *turns]
    assert spelled(made, nemotron_tokenizer, messages) == case["expected"]


def test_nemotron_first_turn_never_trains(nemotron_tokenizer: SentencePieceTokenizer) -> None:
    messages = [Message("assistant", "hello"), Message("user", "q"), Message("assistant", "a")]
    assert spelled(prompt.nemotron4(), nemotron_tokenizer, messages) == (
        "<extra_id_0>System\n\n<extra_id_1>Assistant\nhello\n<extra_id_1>User\nq\n"
        "<extra_id_1>Assistant\n[a\n<extra_id_1>]"
    )


def test_nothing_is_appended_after_a_turn_that_does_not_train(
    nemotron_tokenizer: SentencePieceTokenizer,
) -> None:
    assert spelled(prompt.nemotron4(), nemotron_tokenizer, TWO_ROUNDS[:4]).endswith(
        "[a1\n<extra_id_1>]User\nq2\n"
    )


def test_label_lines_do_not_train(nemotron_tokenizer: SentencePieceTokenizer) -> None:
    made = prompt.nemotron4({2: dict.fromkeys(prompt.formats.LABEL_ATTRIBUTES, 1)})
    text = spelled(made, nemotron_tokenizer, TWO_ROUNDS[:3])
    assert text.endswith("complexity:1,verbosity:1\n[a1\n<extra_id_1>]")
    assert "]" not in text.partition("[")[0]


@pytest.mark.parametrize("kind", ["chatml", "template"])
def test_chatml_answers_train_with_the_end_of_their_turn(kind: str, chatml_tokenizer: JsonTokenizer) -> None:
    made = prompt.chatml() if kind == "chatml" else prompt.from_template(EOS_TEMPLATE, chatml_tokenizer)
    assert spelled(made, chatml_tokenizer, [Message("assistant", "a0"), *TWO_ROUNDS[1:]]) == (
        "<|im_start|>assistant\na0<|im_end|>\n"
        "<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\n[a1<|im_end|>]\n"
        "<|im_start|>user\nq2<|im_end|>\n<|im_start|>assistant\n[a2<|im_end|>]\n"
    )


def test_a_template_in_nemotrons_manner_trains_the_marker_that_follows(
    nemotron_tokenizer: SentencePieceTokenizer,
) -> None:
    made = prompt.from_template(prompt.NEMOTRON4_CHAT_TEMPLATE, nemotron_tokenizer)
    assert made.stop_strings == ("<extra_id_1>",)
    assert spelled(made, nemotron_tokenizer, TWO_ROUNDS).startswith(
        "<extra_id_0>System\nsys\n<extra_id_1>User\nq1\n<extra_id_1>Assistant\n[a1\n<extra_id_1>]User\nq2\n"
    )


def test_a_template_that_rewrites_earlier_answers_is_refused(chatml_tokenizer: JsonTokenizer) -> None:
    made = prompt.from_template(FORGETFUL_TEMPLATE, chatml_tokenizer)
    with pytest.raises(
        TemplateError, match=r"messages\[2\]: the chat template writes this answer differently"
    ):
        encode_conversation(made, chatml_tokenizer, TWO_ROUNDS)


words = st.text(st.sampled_from("ab \n1é🎉<extra_id_1><|im_end|>"), max_size=12)


@given(question=words, first=words, second=words)
def test_the_prompts_ids_are_a_prefix_whatever_the_answer(
    question: str,
    first: str,
    second: str,
    nemotron_tokenizer: SentencePieceTokenizer,
    chatml_tokenizer: JsonTokenizer,
) -> None:
    messages = [Message("user", question), Message("assistant", first), Message("user", "more")]
    for made, tokenizer in ((prompt.nemotron4(), nemotron_tokenizer), (prompt.chatml(), chatml_tokenizer)):
        cut = encode_answer(made, tokenizer, messages, second)
        assert list(cut.prompt_ids) == made.encode(tokenizer, messages)
        end = "\n<extra_id_1>" if tokenizer is nemotron_tokenizer else ""
        assert TextOf(tokenizer, cut.prompt_ids)(cut.answer_ids) == second + end
        assert tokenizer.token_id("<|im_end|>") in (None, cut.answer_ids[-1])


class TextOf:
    """What new ids add to the text of a prompt."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: tuple[int, ...]) -> None:
        self._tokenizer, self._prompt_ids = tokenizer, prompt_ids

    def __call__(self, ids: tuple[int, ...]) -> str:
        whole = self._tokenizer.decode([*self._prompt_ids, *ids])
        return whole.removeprefix(self._tokenizer.decode(self._prompt_ids))


def test_an_answer_without_a_question_is_refused(nemotron_tokenizer: SentencePieceTokenizer) -> None:
    with pytest.raises(TemplateError, match="answer to 1 messages without a user's turn never trains"):
        encode_answer(prompt.nemotron4(), nemotron_tokenizer, [Message("system", "s")], "a")


def test_a_marker_in_an_answer_trains_as_text(nemotron_tokenizer: SentencePieceTokenizer) -> None:
    cut = encode_answer(prompt.nemotron4(), nemotron_tokenizer, [Message("user", "q")], "a <extra_id_1> b")
    assert [i for i in cut.answer_ids if i == 5] == [5]
    assert cut.answer_ids[-1] == 5
