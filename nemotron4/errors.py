"""The exceptions a user can cause. Each says what was given, what was expected and what to do next."""

from __future__ import annotations

import difflib
import importlib
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any


class Nemotron4Error(Exception):
    """Base of every error that a user, a file or a remote service can cause.

    ``message`` states what was given and what was expected; ``hint`` says what to do next; ``others`` are
    the problems that were found with it. The command line prints all and exits with status 1; a bug raises
    something else.
    """

    others: Sequence[Nemotron4Error] = ()

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        own = self.message if self.hint is None else f"{self.message}\nhint: {self.hint}"
        return "\n".join((own, *map(str, self.others)))


def together(errors: Iterable[Nemotron4Error]) -> Nemotron4Error:
    """The first of some errors, with all others as its ``others``."""
    first, *rest = [each for error in errors for each in (error, *error.others)]
    first.others = rest
    return first


def raise_together(problems: Sequence[Nemotron4Error]) -> None:
    """Raise all of them as one, if there are any."""
    if problems:
        raise together(problems)


class Problems:
    """Errors that are told together: each check is made ``with problems.kept()``, then ``tell`` raises."""

    def __init__(self) -> None:
        self._found: list[Nemotron4Error] = []

    @contextmanager
    def kept(self) -> Iterator[None]:
        try:
            yield
        except Nemotron4Error as error:
            self._found.append(error)

    def tell(self) -> None:
        raise_together(self._found)


class ConfigError(Nemotron4Error):
    """A setting has an unknown name, a wrong type or an impossible value."""

    def within(self, place: str) -> ConfigError:
        """The same problems, each with the place before its message."""
        found = ConfigError(f"{place}: {self.message}", hint=self.hint)
        found.others = [ConfigError(f"{place}: {e.message}", hint=e.hint) for e in self.others]
        return found


class DataError(Nemotron4Error):
    """A row of a data file cannot be used. The message starts with ``file:line:``."""


class CheckpointError(Nemotron4Error):
    """A checkpoint is missing, incomplete, hostile or of an unknown form."""


class TokenizerError(Nemotron4Error):
    """A tokenizer cannot be read, or does not return the text it was given."""


class TemplateError(Nemotron4Error):
    """A chat template or a conversation cannot be rendered."""


class RequestError(Nemotron4Error):
    """A generation request cannot be served: bad parameter, too long, unknown option."""


class EngineBusyError(Nemotron4Error):
    """The engine's queue is full; ``retry_after_s`` says when to try again."""

    def __init__(self, message: str, *, retry_after_s: float, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.retry_after_s = retry_after_s


class TrainingError(Nemotron4Error):
    """A training run cannot go on: a loss that is not finite, a step without a trained token."""


class DownloadError(Nemotron4Error):
    """A model could not be fetched, or what arrived is not what was expected."""


class TerminatedError(BaseException):
    """SIGTERM ended a run as Ctrl-C would have: finished rows are kept. The exit status is 143.

    No KeyboardInterrupt, which the parser of the command line makes a status of its own.
    """


def import_optional(module: str, purpose: str) -> Any:
    """A module of a package that not everybody installs; ConfigError with the command that gets it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ConfigError(
            f"{purpose} needs the package {package}, which cannot be imported: {error}",
            hint=f"pip install '{_requirement(package)}'",
        ) from error


def _requirement(package: str) -> str:
    """What this package's metadata asks of the other one, such as ``matplotlib>=3.9``."""
    import importlib.metadata  # half of the start of a quick command

    try:
        lines = importlib.metadata.requires("nemotron4") or []
    except importlib.metadata.PackageNotFoundError:
        lines = []
    for line in lines:
        requirement = line.partition(";")[0].strip()
        name = re.split(r"[^A-Za-z0-9_.-]", requirement)[0]
        if name.lower().replace("-", "_") == package.lower():
            return requirement
    return package


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name most like ``name``, or None when nothing is close."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return matches[0] if matches else None


def unknown_name(kind: str, name: str, known: Iterable[str]) -> tuple[str, str]:
    """Message and hint for an unknown option, key or name."""
    names = sorted(known)
    guess = nearest(name, names)
    hint = f"did you mean {guess!r}?" if guess else f"known: {', '.join(names)}"
    return f"unknown {kind} {name!r}", hint


def unknown(
    kind: str, name: str, known: Iterable[str], error: type[Nemotron4Error] = ConfigError
) -> Nemotron4Error:
    """The error for an unknown option, key or name."""
    message, hint = unknown_name(kind, name, known)
    return error(message, hint=hint)
