"""The choices of an OpenAI request behind the guard: as they come, or held back until they are judged."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from starlette.responses import Response

from nemotron4.records import Message
from nemotron4.server.exchange import Exchange
from nemotron4.server.guard import Guard, Screening, report
from nemotron4.server.openai_choices import Choice, run_choices, run_to_end
from nemotron4.server.openai_schemas import ChatCompletion, Completion, GuardReport
from nemotron4.server.service import Service


class Screened:
    """One request's choices. ``conversations`` has the prompt of each choice, as messages."""

    def __init__(
        self,
        choices: Sequence[Choice],
        conversations: Sequence[Sequence[Message]],
        service: Service,
        exchange: Exchange,
    ) -> None:
        self._choices = choices
        self._conversations = conversations
        self._service = service
        self._exchange = exchange
        self._prompts: list[Screening] = []
        self._answers: list[Screening] = []

    @property
    def guard(self) -> Guard | None:
        return self._service.guard

    @property
    def report(self) -> dict[str, object]:
        return report(self._prompts, self._answers)

    def response(self, answer: ChatCompletion | Completion) -> Response:
        """The answer, with what the guard found if there is one."""
        if self.guard is None:
            return Response(answer.model_dump_json(exclude={"guard"}), media_type="application/json")
        answer.guard = GuardReport.model_validate(self.report)
        return Response(answer.model_dump_json(), media_type="application/json")

    async def run(self) -> None:
        """Prompts judged, choices whole, answers judged."""
        async with aclosing(self.parts()) as parts:
            async for _ in parts:
                pass

    async def parts(self) -> AsyncGenerator[tuple[int, str, bool], None]:
        """As ``run_choices``. A blocking guard gives each choice in one part, after its judgment."""
        guard = self.guard
        if guard is None:
            async with aclosing(run_choices(self._choices, self._service, self._exchange)) as parts:
                async for part in parts:
                    yield part
            return
        prompts = list(dict.fromkeys(map(tuple, self._conversations)))
        self._prompts = await guard.screen_prompts(prompts, self._exchange, self._service.metrics)
        if guard.is_blocking:
            await run_to_end(self._choices, self._service, self._exchange)
            await self._judge(guard)
            for index, choice in enumerate(self._choices):
                yield index, choice.text, True
            return
        async with aclosing(run_choices(self._choices, self._service, self._exchange)) as parts:
            async for part in parts:
                yield part
        await self._judge(guard)

    async def _judge(self, guard: Guard) -> None:
        pairs = zip(self._conversations, self._choices, strict=True)
        answers = [(conversation, choice.answer.text) for conversation, choice in pairs]
        self._answers = await guard.screen_answers(answers, self._exchange, self._service.metrics)
        for choice, screening in zip(self._choices, self._answers, strict=True):
            choice.is_blocked = guard.is_refused(screening)
