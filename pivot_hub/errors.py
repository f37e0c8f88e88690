"""What can go wrong, by whose hand it is mended; each message is one sentence that names the remedy."""

from __future__ import annotations


class PivotError(Exception):
    """Base of every error this package raises on purpose. `exit_code` is what the command line returns."""

    exit_code = 1


class RecipeError(PivotError):
    """A recipe, an override or a command-line value is wrong: nothing was loaded yet."""

    exit_code = 2


class DataError(PivotError):
    """A row, an image or a data file cannot be used."""

    exit_code = 2


class CheckpointError(PivotError):
    """A checkpoint or an encoder repository is missing, incomplete or does not fit."""

    exit_code = 2


class TrainingError(PivotError):
    """Training cannot go on: the loss is not finite, or a checkpoint cannot be written."""


class ExportError(PivotError):
    """An encoder cannot be exported, or its export gives other features."""


class ProbeError(PivotError):
    """A probe cannot measure what it was asked to."""

    exit_code = 2


class CardError(PivotError):
    """A card lacks a fact, or says what the facts do not."""

    exit_code = 2


class PublishError(PivotError):
    """A repository cannot be published or pulled; what is on the Hub is what was there before."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code
