"""The order of one visitor's calls: one at a time, and of several calls of one kind that wait, only the last."""

from __future__ import annotations

import itertools
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass
class _Calls:
    """The calls of one visitor that wait or run."""

    waiting: dict[str, int] = field(default_factory=dict)
    running: bool = False
    values: dict[Any, Any] = field(default_factory=dict)


class Turns:
    """Turns of all visitors.

    The app serves several calls at a time, so that a visitor whose models are slow keeps nobody waiting. The calls of
    one visitor still have to follow each other: a later click must not be overtaken by an earlier one, and it needs the
    view that the call before it displayed.
    """

    def __init__(self) -> None:
        """Begin without calls."""
        self._changed = threading.Condition()
        self._tickets = itertools.count()
        self._visitors: defaultdict[str, _Calls] = defaultdict(_Calls)

    @contextmanager
    def turn(self, visitor: str, kind: str) -> Iterator[dict[Any, Any] | None]:
        """Wait until the visitor's earlier calls have ended.

        Args:
            visitor: Visitor who makes the call.
            kind: Kind of the call: a later call of the same kind replaces one that still waits.

        Yields:
            Values that the visitor's earlier calls have stored since this one arrived, to which this call adds its own;
            None if a later call of the same kind has replaced this one.
        """
        with self._changed:
            ticket = next(self._tickets)
            calls = self._visitors[visitor]
            calls.waiting[kind] = ticket
            self._changed.notify_all()

            def replaced() -> bool:
                return calls.waiting.get(kind) != ticket

            self._changed.wait_for(lambda: replaced() or (not calls.running and min(calls.waiting.values()) == ticket))
            if not replaced():
                del calls.waiting[kind]
                calls.running = True
                values: dict[Any, Any] | None = calls.values
            else:
                values = None
        try:
            yield values
        finally:
            with self._changed:
                if values is not None:
                    calls.running = False
                if not calls.running and not calls.waiting and self._visitors.get(visitor) is calls:
                    del self._visitors[visitor]
                self._changed.notify_all()
