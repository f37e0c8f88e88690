"""The errors of this package, by who can fix them. Each message is one or two sentences that name the remedy."""

from __future__ import annotations


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


class CheckpointError(PivotError):
    """A checkpoint or an encoder repository is missing, incomplete, or does not fit."""

    exit_code = 2


class OutputError(PivotError):
    """An output cannot be written where it should be: others' files lie there, or another process is working on it."""

    exit_code = 2


class TrainingError(PivotError):
    """Training cannot continue: the loss is not finite, or a checkpoint cannot be written."""


class ExportError(PivotError):
    """An encoder cannot be exported, or its export gives other features."""


class ProbeError(PivotError):
    """A probe cannot measure what was requested."""

    exit_code = 2


class CardError(PivotError):
    """A card lacks metadata, or contradicts it."""

    exit_code = 2


class PublishError(PivotError):
    """A repository cannot be published or pulled. The repository on the Hub is unchanged."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code
