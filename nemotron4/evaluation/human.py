"""A blind study: people rate the answers of several models, by the technical report's protocol.

study.json            what the study is made of
answers-NAME.jsonl    one row for each prompt
judgments.sqlite      what annotators said (ratings-HANDLE.jsonl of older versions is taken into it)
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import permutations
from pathlib import Path

from nemotron4.annotation.app import Listed, Shown, ShownAnswer, judgment_rows
from nemotron4.annotation.export import Export, check_form, collect
from nemotron4.annotation.store import AnnotationStore
from nemotron4.annotation.vocabulary import Annotation, Question, Vocabulary, scale
from nemotron4.client import ChatModel, Sampling, call_with_retries
from nemotron4.client.remote import connect, is_address
from nemotron4.client.retry import ERROR, ask_missing
from nemotron4.errors import ConfigError, DataError
from nemotron4.evaluation.settings import StudySettings
from nemotron4.progress import Progress
from nemotron4.records import AskedPrompt, JsonObject, Message, PreferencePair, read_json_lines
from nemotron4.report import Block
from nemotron4.runs import RowLog, claim, read_rows, write_json

# Five levels of quality and one for complete failure (technical report, human evaluation).
SCALE = scale(0, ("does not do what was asked at all", "bad", "poor", "fair", "good", "excellent"))
AXES = ("helpfulness", "truthfulness")
LENGTHS = {"too_short": "something is missing", "just_right": "as long as it should be", "too_long": "padded"}
VOCABULARY = Vocabulary(
    "blind study",
    (
        *(Question(axis, SCALE, is_scale=True, of_answer=True) for axis in AXES),
        Question("length", LENGTHS, of_answer=True),
    ),
    main=AXES[0],
    is_blind=True,
)
UNCATEGORISED = "none"
STORE = "judgments.sqlite"
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")


@dataclass(frozen=True, kw_only=True)
class AnswerRating:
    """One annotator's view of one answer, whole. ``position`` is where it was shown, from 0."""

    annotator: str
    prompt: str
    model: str
    position: int
    helpfulness: int
    truthfulness: int
    length: str
    at: str = ""


def check_name(kind: str, name: str) -> str:
    """Names become parts of file names."""
    if not _NAME.fullmatch(name) or name.startswith("."):
        raise ConfigError(
            f"{kind} is {name!r}; expected 1 to 64 letters, digits, dots, dashes or underscores"
        )
    return name


def create(
    folder: Path,
    prompts: Sequence[AskedPrompt],
    models: Mapping[str, str],
    *,
    seed: int,
    sampling: Sampling,
) -> None:
    """Make the study, or check that the folder is this one. ``models``: name -> source of its answers."""
    if len(models) < 2:
        raise ConfigError(f"{len(models)} model given; a comparison needs two or more")
    for name in models:
        check_name("model", name)
    rows = [[p.id, [m.to_json() for m in p.messages], str(p.category or UNCATEGORISED)] for p in prompts]
    claim(
        folder,
        {
            "kind": "human evaluation",
            "models": list(models),
            "seed": seed,
            "prompts_sha256": hashlib.sha256(json.dumps(rows).encode()).hexdigest(),
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
        },
        {"max_tokens": StudySettings.max_tokens, "temperature": StudySettings.temperature},
    )
    study = {"models": dict(models), "seed": seed, "prompts": rows}
    write_json(folder / "study.json", study, indent=None)


class Study:
    """A study whose answers are there; it is the source of items for the page, too."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.title = folder.name
        try:
            study = json.loads((folder / "study.json").read_text(encoding="utf-8"))
            self.models: tuple[str, ...] = tuple(study["models"])
            self.seed: int = study["seed"]
            self.prompts = [
                AskedPrompt(name, tuple(Message(**turn) for turn in turns), category)
                for name, turns, category in study["prompts"]
            ]
        except OSError as error:
            raise DataError(
                f"{folder}: there is no study here", hint="make one: nemotron4 eval human new"
            ) from error
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{folder / 'study.json'}: not a study of this version: {error!r}") from error
        self.answers = {model: self._read_answers(model) for model in self.models}
        self.store = AnnotationStore(folder / STORE, VOCABULARY)
        self._take_old_ratings()

    def _read_answers(self, model: str) -> dict[str, str]:
        rows = read_rows(answers_path(self.folder, model))
        return {str(row["id"]): str(row["response"]) for row in rows if ERROR not in row}

    def _take_old_ratings(self) -> None:
        """Older versions kept each annotator's ratings in a file; a rating is taken once."""
        for path in sorted(self.folder.glob("ratings-*.jsonl")):
            with self.store.transaction():
                rows = read_rows(path)
                for row in rows[int(self.store.meta(path.name, "0")) :]:
                    try:
                        values = {question.name: row[question.name] for question in VOCABULARY.questions}
                        self.store.say(
                            row["prompt"], row["annotator"], values, answer=row["model"], at=row.get("at", "")
                        )
                    except (KeyError, DataError) as error:
                        raise DataError(f"{path}: a row is not a rating: {error}") from error
                self.store.set_meta(path.name, str(len(rows)))

    @property
    def complete_prompts(self) -> list[AskedPrompt]:
        """Prompts that every model answered; the others cannot be compared and are left out, counted."""
        return [p for p in self.prompts if all(p.id in answers for answers in self.answers.values())]

    def prompt_order(self, annotator: str) -> list[AskedPrompt]:
        """The prompts in this annotator's random order, always the same."""
        prompts = self.complete_prompts
        random.Random(f"{self.seed} {annotator}").shuffle(prompts)
        return prompts

    def answer_order(self, annotator: str, prompt: str) -> list[str]:
        """The models in the random order in which this annotator sees their answers to the prompt."""
        models = list(self.models)
        random.Random(f"{self.seed} {annotator} {prompt}").shuffle(models)
        return models

    def rate(self, annotator: str, prompt: str, model: str, values: Mapping[str, object]) -> None:
        """What this returned from is on the disk."""
        self.store.say(prompt, check_name("annotator", annotator), values, answer=model)

    def ratings(self) -> list[AnswerRating]:
        """The last rating of every answer by every annotator; half-given ones are not ratings yet."""
        names = [question.name for question in VOCABULARY.questions]
        return [
            AnswerRating(
                annotator=each.annotator,
                prompt=each.item,
                model=each.answer,
                position=self.answer_order(each.annotator, each.item).index(each.answer),
                at=each.at,
                **{name: each.values[name] for name in names},
            )
            for each in self.store.judgments()
            if all(name in each.values for name in names) and each.answer in self.models
        ]

    # --- the page: an annotator sees letters, in an order of their own

    def groups(self) -> list[tuple[str, int]]:
        categories = [str(prompt.category) for prompt in self.complete_prompts]
        return [(name, categories.count(name)) for name in dict.fromkeys(categories)]

    def listed(self, group: str, after: str, annotator: str) -> Iterator[Listed]:
        prompts = self.prompt_order(annotator)
        names = [prompt.id for prompt in prompts]
        for prompt in prompts[names.index(after) + 1 if after in names else 0 :]:
            if group in ("", prompt.category):
                text = "\n".join(message.content for message in prompt.messages)
                title = " ".join(text.split())[:200]
                summary = partial(dict[str, object], title=title, facts=[str(prompt.category)])
                yield Listed(prompt.id, prompt.id, summary, partial(str, text))

    def show(self, item: str, annotator: str) -> tuple[str, Shown]:
        prompt = next((each for each in self.complete_prompts if each.id == item), None)
        if prompt is None:
            raise DataError(f"the study has no prompt {item!r} that every model answered")
        answers = [
            ShownAnswer(letter, f"answer {letter}", self.answers[model][prompt.id])
            for letter, model in self.answer_keys(item, annotator).items()
        ]
        messages = [message.to_json() for message in prompt.messages]
        title = " ".join(prompt.messages[-1].content.split())[:120]
        return prompt.id, Shown(title, messages, answers, {"category": str(prompt.category)})

    def answer_keys(self, item: str, annotator: str) -> dict[str, str]:
        order = self.answer_order(annotator, item)
        return {chr(ord("A") + place): model for place, model in enumerate(order)}

    def report(self) -> list[Block]:
        """What all may see before the study is over: who agrees with whom, and not which model wins."""
        from nemotron4.annotation.figures import agreements

        return [pair.table() for pair in agreements(self.store.judgments(), VOCABULARY)]

    def figures(self) -> JsonObject:
        return {}

    def export(self, form: str) -> Export:
        """Single judgments, or a pair of each two answers of which people found one more helpful."""
        check_form(form, ("judgments", "preference"))
        if form == "judgments":
            return Export(judgment_rows(self.store.judgments()), {})
        judged = self.store.by_item()
        found = [list(self._pairs(prompt, judged.get(prompt.id, []))) for prompt in self.complete_prompts]
        return collect(found, "no answer was rated higher than another")

    def _pairs(self, prompt: AskedPrompt, judgments: Sequence[Annotation]) -> Iterator[PreferencePair]:
        """Of people who rated both answers: one person's 3 may be another's 5."""
        said: dict[str, dict[str, int]] = {}
        for each in judgments:
            if AXES[0] in each.values:
                said.setdefault(each.answer, {})[each.annotator] = each.values[AXES[0]]
        for better, worse in permutations(said, 2):
            both = said[better].keys() & said[worse].keys()
            if sum(said[better][who] - said[worse][who] for who in both) > 0:
                yield PreferencePair(
                    id=f"{prompt.id}:{better}:{worse}",
                    prompt=prompt.messages,
                    chosen=self.answers[better][prompt.id],
                    rejected=self.answers[worse][prompt.id],
                    meta={"chosen_model": better, "rejected_model": worse, "annotators": len(both)},
                )


def answers_path(folder: Path, model: str) -> Path:
    return folder / f"answers-{model}.jsonl"


async def collect_answers(
    folder: Path,
    prompts: Sequence[AskedPrompt],
    sources: Mapping[str, str],
    sampling: Sampling,
    *,
    concurrency: int,
    note: Callable[[str], None],
) -> None:
    """Every model's answers into the study, each on disk when it is there; what is there stays."""
    by_id = {prompt.id: prompt for prompt in prompts}
    for name, source in sources.items():
        with RowLog(answers_path(folder, name)) as log:
            if not is_address(source):
                _take_answers(log, Path(source), by_id)
                continue
            chat = connect(source, None)
            num_done = sum(prompt in log for prompt in by_id)
            try:
                with Progress(len(by_id), num_done, name=name, unit="requests") as progress:
                    await ask_missing(
                        log,
                        list(by_id),
                        partial(_ask, chat, by_id, sampling),
                        concurrency=concurrency,
                        on_rows=lambda rows, progress=progress: progress.add(len(rows)),  # type: ignore[misc]
                    )
            finally:
                await chat.close()
        note(f"{name}: {len(prompts)} prompts answered")


async def _ask(
    chat: ChatModel, by_id: Mapping[str, AskedPrompt], sampling: Sampling, prompt: str
) -> JsonObject:
    reply = await call_with_retries(partial(chat.chat, by_id[prompt].messages, sampling))
    return {"response": reply.text, "finish_reason": reply.finish_reason}


def _take_answers(log: RowLog, path: Path, by_id: Mapping[str, AskedPrompt]) -> None:
    """Answers of other prompts are no part of the study; an answer that is no text, or another one than the
    study or a line above has, is an error.
    """
    there = {str(row["id"]): row["response"] for row in log.rows if ERROR not in row}
    found = []
    for number, row in read_json_lines(path):
        name, response = str(row.get("id")), row.get("response")
        if name not in by_id:
            continue
        if not isinstance(response, str):
            raise DataError(f"{path}:{number}: field 'response' is not a string; expected one answer")
        if name not in there:
            found.append({"id": name, "response": response})
        elif there[name] != response:
            raise DataError(
                f"{path}:{number}: there is another answer to prompt {name!r} already",
                hint="a study keeps its answers: mend the file, or make another study",
            )
        there[name] = response
    log.append(*found)
