"""Signals: each ends training after the running step, ignored ones stay ignored, a second Ctrl-C ends at once."""

from __future__ import annotations

import errno
import os
import signal
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import typer

from pivot_hub import cli
from pivot_hub.errors import StoppedError
from pivot_hub.training import preemption
from pivot_hub.training.preemption import SIGNALS, Preemption


def stops(callback: Preemption) -> bool:
    control: Any = SimpleNamespace(should_save=False, should_training_stop=False)
    nothing: Any = None
    callback.on_step_end(nothing, nothing, control)
    assert control.should_save == control.should_training_stop
    return bool(control.should_training_stop)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_stops_after_the_step(number: int) -> None:
    before = signal.getsignal(number)
    with Preemption() as callback:
        assert not stops(callback)
        os.kill(os.getpid(), number)
        assert stops(callback)
        assert signal.Signals(number).name in callback.name
    assert signal.getsignal(number) is before


def test_a_second_ctrl_c_stops_at_once_but_not_one_that_a_launcher_passes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    with Preemption() as callback:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        assert stops(callback)
        monkeypatch.setattr(preemption, "ONE_REQUEST_S", 0)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_an_ignored_signal_stays_ignored() -> None:
    """As SIGHUP does under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Preemption() as callback:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stops(callback)
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (StoppedError("stopped by SIGUSR1 after step 3 of 20"), 3, "stopped by SIGUSR1 after step 3 of 20"),
        (KeyboardInterrupt(), 130, "stopped; run the same command again"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "the disk is full: free some space"),
        (RuntimeError("[enforce fail] . unexpected pos 6827200 vs 6827088"), 1, "the disk is full: free some space"),
    ],
)
def test_how_the_command_ends(
    error: BaseException, code: int, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    app = typer.Typer(pretty_exceptions_enable=False)

    @app.command()
    def fail() -> None:
        raise error

    monkeypatch.setattr(cli, "app", app)
    monkeypatch.setattr(sys, "argv", ["pivot"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == code
    assert message in capsys.readouterr().err
