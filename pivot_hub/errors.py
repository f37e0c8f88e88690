"""The errors of this package, by who can fix them. Each message is one or two sentences that name the remedy."""

from __future__ import annotations

import reprlib


class PivotError(Exception):
    """Base class of the errors that this package raises on purpose.

    `exit_code` is the code that the command line exits with.
    """

    exit_code = 1


class RecipeError(PivotError):
    """A recipe, an override or a command-line value is wrong. Nothing has been loaded yet."""

    exit_code = 2


class DataError(PivotError):
    """A row, an image or a data file cannot be used."""

    exit_code = 2


class SourceError(PivotError):
    """What another machine should install cannot be installed there. Nothing was sent to it."""

    exit_code = 2


class CheckpointError(PivotError):
    """A checkpoint or an encoder repository is missing, incomplete, or does not fit."""

    exit_code = 2


class OutputError(PivotError):
    """An output cannot be written where it should be: others' files lie there, or another process is working on it."""

    exit_code = 2


class TrainingError(PivotError):
    """Training cannot continue: the loss is not finite, or a checkpoint cannot be written."""


class StoppedError(TrainingError):
    """A signal ended training early. The last step is saved, and the same command resumes from it."""

    exit_code = 3


class ExportError(PivotError):
    """An encoder cannot be exported, or its export gives other features."""


class ProbeError(PivotError):
    """A probe cannot measure what was requested."""

    exit_code = 2


class RehearsalError(PivotError):
    """This machine cannot rehearse another device."""

    exit_code = 2


class CardError(PivotError):
    """A card lacks metadata, or contradicts it."""

    exit_code = 2


class PublishError(PivotError):
    """A repository cannot be published or pulled. The repository on the Hub is unchanged."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = 4
_SHORT.maxlevel = 3


def shown(value: object) -> str:
    """Return a short representation of a value that a user gave, for an error message.

    A value may hold the bytes of an image, so messages and reports quote no value whole.
    """
    return _SHORT.repr(value)


def shown_text(text: str, longest: int = 300) -> str:
    """Return a name or a reason for an error message: shortened in its middle, and printable everywhere."""
    if len(text) > longest:
        half = longest // 2 - 2
        text = f"{text[:half]}...{text[-half:]}"
    return text.encode("utf-8", "backslashreplace").decode()
