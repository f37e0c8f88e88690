"""The functions behind the controls of a mode take turns: those of one visitor run one after the other."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gradio as gr
from gradio.context import LocalContext

from pivot_hub.demo.turns import Turns

Updates = dict[Any, Any]


class VisitorEvents(ABC):
    """Base of the functions behind the controls of a mode. They keep no state of a visitor, one of several at a time.

    Every function returns its updates as a dict of components; the components it leaves out stay as they are.
    """

    def __init__(self, kept: Mapping[type, Any]) -> None:
        """Begin without calls.

        Args:
            kept: Components that hold what the visitor's last call displayed, by the type of their values.
        """
        self._kept = kept
        self._turns = Turns()

    @abstractmethod
    def failed(self, error: Exception, values: Sequence[Any]) -> Updates:
        """Return the updates that show the error of a function of these values."""

    def take_turn(self, kind: str, function: Callable[..., Updates], values: Sequence[Any]) -> Any:
        """Run a function after the visitor's earlier calls; an error becomes a message, and the page stays as it is.

        Args:
            kind: Kind of the call; a later call of the same kind replaces one that still waits.
            function: Function of the values.
            values: Values from the page. What an earlier call has displayed in the meantime takes the place of what was
                sent.
        """
        request = LocalContext.request.get(None)
        with self._turns.turn(getattr(request, "session_hash", None) or "", kind) as latest:
            if latest is None:
                return gr.skip()
            values = [latest.get(self._kept.get(type(value)), value) for value in values]
            try:
                updates = function(*values)
            except Exception as error:  # `failed` shows it, and logs one that is not of this package
                return self.failed(error, values)
            latest.update({component: updates[component] for component in self._kept.values() if component in updates})
            return updates


def in_turn(kind: str) -> Callable[[Callable[..., Updates]], Callable[..., Updates]]:
    """Decorate a method of `VisitorEvents` to run in its turn, see `VisitorEvents.take_turn`.

    Args:
        kind: Kind of the call; a later call of the same kind replaces one that still waits.
    """

    def decorate(handler: Callable[..., Updates]) -> Callable[..., Updates]:
        @functools.wraps(handler)
        def run(self: VisitorEvents, *values: Any) -> Any:
            return self.take_turn(kind, functools.partial(handler, self), values)

        return run

    return decorate
