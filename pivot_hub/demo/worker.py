"""Processes for the models that visitors name: what strangers published is loaded and run away from the app.

No code of a repository is run, but a chat template may loop or write a text of a gigabyte, and a config may ask for
ten million layers. Each bundle of such models therefore has a process of its own, with limits of memory and time. A
process that exceeds them is ended, and the app and its built-in models go on. Answers are unpickled from a list of
plain classes, so that a process cannot make the app run anything.
"""

from __future__ import annotations

import atexit
import io
import json
import multiprocessing
import os
import pickle
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import astuple, dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pivot_hub
from pivot_hub.demo.bundle_cache import MOST_PARAMETERS, BundleCache
from pivot_hub.demo.comparison import Comparison, ModelResult, Subject, compare, compare_patches, compare_tokens
from pivot_hub.demo.encoder_cache import EncoderCache
from pivot_hub.demo.encoder_set import EncoderInfo, EncoderMap, EncoderNames, EncoderSet, EncoderSetInfo
from pivot_hub.demo.model_bundle import BundleInfo, BundleNames, ModelBundle, Origin, Progress, describe_failure
from pivot_hub.errors import CheckpointError, DataError, PivotError
from pivot_hub.explain.gradcam import TokenMap
from pivot_hub.explain.patch_views import Match
from pivot_hub.probes.localization.gradient_maps import MapScores

GIB = 1 << 30
MOST_IMAGE_PX = 2048  # input side of an encoder, at which scenes are rendered
MOST_FILE_BYTES = 4 * MOST_PARAMETERS + GIB  # of a downloaded file
NICENESS = 10  # so that the built-in models are served first
GRACE_S = 5  # after which a process ends itself if the app did not end it
RESULT_CLASSES = (
    *(Comparison, ModelResult, MapScores, TokenMap, BundleInfo, Origin),
    *(EncoderSetInfo, EncoderInfo, EncoderMap, Match),
)
NUMPY_NAMES = frozenset({"_reconstruct", "_frombuffer", "scalar", "ndarray", "dtype"})
ModelNames = BundleNames | EncoderNames
ModelInfo = BundleInfo | EncoderSetInfo


def default_memory_bytes() -> int:
    """Return 40% of the machine's memory, so that two processes leave room for the app."""
    return int(0.4 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


@dataclass(frozen=True)
class WorkerLimits:
    """Limits of the processes.

    Args:
        memory_bytes: Memory that a process may allocate, its models included.
        load_s: Longest time for fetching and loading models, in seconds.
        call_s: Longest time for one computation, in seconds.
        idle_s: Time without a call after which a process is ended, in seconds.
        reply_bytes: Largest size of an answer.
        processes: Largest number of processes.
        waiting: Number of visitors that may wait for one process; others are told to try again.
    """

    memory_bytes: int = field(default_factory=default_memory_bytes)
    load_s: float = 600
    call_s: float = 120
    idle_s: float = 600
    reply_bytes: int = 64_000_000
    processes: int = 2
    waiting: int = 2


class ModelWorker:
    """One process, with a pipe to it. Only one thread may use it at a time."""

    def __init__(self, command: Sequence[str], label: str, limits: WorkerLimits) -> None:
        """Start the process.

        Args:
            command: Command of the process; the number of its end of the pipe is appended.
            label: Names of the models, for error messages.
            limits: Limits of the process.
        """
        self.label, self.limits = label, limits
        self._connection, other_end = multiprocessing.Pipe()
        with other_end:
            self._process = subprocess.Popen(
                [*command, str(other_end.fileno())],
                pass_fds=[other_end.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=_environment(),
            )

    @property
    def alive(self) -> bool:
        """Whether the process can be called."""
        return not self._connection.closed and self._process.poll() is None

    def call(self, function: str, arguments: Sequence[Any], seconds: float, progress: Progress | None = None) -> Any:
        """Run a function in the process.

        Args:
            function: Name of the function.
            arguments: Arguments of the function.
            seconds: Longest time that the function may take.
            progress: Callback that takes the finished share and the next step.

        Raises:
            PivotError: The function raised it.
            CheckpointError: The function took too long, or too much memory, or its answer is too large. The process
                has been ended.
        """
        end = time.monotonic() + seconds
        try:
            self._connection.send_bytes(pickle.dumps((function, arguments, seconds + GRACE_S)))
            while self._connection.poll(max(end - time.monotonic(), 0)):
                kind, value = _load_reply(self._connection.recv_bytes(self.limits.reply_bytes))
                if kind == "result":
                    return value
                if kind == "progress" and progress is not None:
                    progress(*value)
                elif kind in ("data", "checkpoint"):
                    raise (DataError if kind == "data" else CheckpointError)(str(value))
        except (EOFError, ConnectionError):
            self.close()
            raise CheckpointError(
                f"{self.label}: these models ended their process; they need more than the "
                f"{self.limits.memory_bytes / GIB:.1f} GiB of memory that this app lends, or their files are broken."
            ) from None
        except (OSError, pickle.UnpicklingError):
            self.close()
            raise CheckpointError(
                f"{self.label}: what these models answer cannot be shown here; at most "
                f"{self.limits.reply_bytes // 1_000_000} MB are accepted."
            ) from None
        self.close()
        raise CheckpointError(
            f"{self.label}: these models took more than {seconds:g} seconds, so they were stopped; run them yourself "
            "with `pivot space --first --second`."
        )

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        self._connection.close()


@dataclass
class _Slot:
    """The process of one bundle, which starts at the first call."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    users: int = 0
    last_use: float = 0.0
    worker: ModelWorker | None = None
    info: ModelInfo | None = None


class WorkerPool:
    """The processes of all bundles that visitors named: started on demand, ended when idle."""

    def __init__(
        self, limits: WorkerLimits | None = None, runs: Path | None = None, command: Sequence[str] | None = None
    ) -> None:
        """Store the settings; no process is started yet.

        Args:
            limits: Limits of the processes.
            runs: Folder of checkpoints that visitors may name besides Hub repositories.
            command: Command of a process; this module by default.
        """
        self.limits = limits or WorkerLimits()
        settings = {"memory_bytes": self.limits.memory_bytes, "runs": None if runs is None else str(runs)}
        self._command = command or [sys.executable, "-P", "-m", "pivot_hub.demo.worker", json.dumps(settings)]
        self._slots: dict[ModelNames, _Slot] = {}
        self._lock = threading.Lock()
        atexit.register(self.close)

    def info(self, names: ModelNames, progress: Progress | None = None) -> Any:
        """Load a bundle or a set of encoders unless it is loaded, and describe it.

        Args:
            names: Names that a visitor gave.
            progress: Callback that takes the finished share, from 0 to 1, and the next step.

        Returns:
            The `BundleInfo` of a bundle, or the `EncoderSetInfo` of encoders.

        Raises:
            CheckpointError: The models cannot be loaded, exceed a limit, or others are using all processes.
        """
        known = self._slots.get(names)
        if known is not None and known.info is not None and progress is None:
            return known.info
        with self._loaded(names, progress) as slot:
            assert slot.info is not None
            return slot.info

    def run(self, names: ModelNames, function: str, *arguments: Any) -> Any:
        """Run a function on a bundle or a set of encoders, which is loaded if necessary.

        Args:
            names: Names that a visitor gave.
            function: A key of FUNCTIONS.
            *arguments: Arguments of the function after the models.

        Raises:
            DataError: An argument cannot be used.
            CheckpointError: The bundle cannot be loaded, exceeds a limit, or others are using all processes.
        """
        with self._loaded(names) as slot:
            assert slot.worker is not None
            return slot.worker.call(function, arguments, self.limits.call_s)

    def close_idle(self) -> None:
        """End the processes that were not used for `idle_s` seconds."""
        with self._lock:
            oldest = time.monotonic() - self.limits.idle_s
            for names in [n for n, slot in self._slots.items() if not slot.users and slot.last_use <= oldest]:
                self._end(names)

    def close(self) -> None:
        """End all processes."""
        with self._lock:
            for names in list(self._slots):
                self._end(names)

    @contextmanager
    def _loaded(self, names: ModelNames, progress: Progress | None = None) -> Iterator[_Slot]:
        """Hold the slot of a bundle, with its process running and its models loaded."""
        slot = self._reserve(names)
        try:
            if not slot.lock.acquire(timeout=self.limits.call_s):
                raise CheckpointError(BUSY)
            try:
                if slot.worker is None or not slot.worker.alive:
                    slot.info = None
                    slot.worker = ModelWorker(self._command, _label(names), self.limits)
                if slot.info is None:
                    load = "load" if isinstance(names, BundleNames) else "load encoders"
                    slot.info = slot.worker.call(load, astuple(names), self.limits.load_s, progress)
                yield slot
            finally:
                slot.lock.release()
        finally:
            with self._lock:
                slot.users -= 1
                slot.last_use = time.monotonic()
            reaper = threading.Timer(self.limits.idle_s, self.close_idle)
            reaper.daemon = True
            reaper.start()

    def _reserve(self, names: ModelNames) -> _Slot:
        """Count the caller as a user of a bundle's slot; another bundle without users makes room for it."""
        with self._lock:
            slot = self._slots.get(names)
            if slot is None:
                unused = [n for n, other in self._slots.items() if not other.users]
                if len(self._slots) >= self.limits.processes:
                    if not unused:
                        raise CheckpointError(BUSY)
                    self._end(min(unused, key=lambda n: self._slots[n].last_use))
                slot = self._slots[names] = _Slot()
            if slot.users > self.limits.waiting:
                raise CheckpointError(BUSY)
            slot.users += 1
            return slot

    def _end(self, names: ModelNames) -> None:
        worker = self._slots.pop(names).worker
        if worker is not None and worker.alive:
            worker.close()


BUSY = "The models that visitors named are busy; try again in a minute, or use the built-in models, which are free."


def _label(names: ModelNames) -> str:
    """Return the names of the models that are compared, for error messages."""
    return " and ".join((names.first, names.second) if isinstance(names, BundleNames) else names.names)


def _environment() -> dict[str, str]:
    """Environment of a process: that of the app, without its Hub login, whose private models are no visitor's."""
    kept = {k: v for k, v in os.environ.items() if k not in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")}
    package = str(Path(pivot_hub.__file__).parents[1])
    paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    return kept | {"HF_HUB_DISABLE_IMPLICIT_TOKEN": "1", "PYTHONPATH": os.pathsep.join(paths)}


class _ReplyUnpickler(pickle.Unpickler):
    """Unpickler that creates arrays and the results of this package, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        for allowed in RESULT_CLASSES:
            if (module, name) == (allowed.__module__, allowed.__qualname__):
                return allowed
        if module.partition(".")[0] == "numpy" and name in NUMPY_NAMES:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is no result")


def _load_reply(content: bytes) -> tuple[str, Any]:
    try:
        kind, value = _ReplyUnpickler(io.BytesIO(content)).load()
    except pickle.UnpicklingError:
        raise
    except Exception as error:  # a damaged pickle raises whatever its bytes lead to
        raise pickle.UnpicklingError(str(error)) from error
    return kind, value


# ---------------------------------------------------------------------- inside the process
def _compare(bundle: ModelBundle, subject: Subject, *choices: Any) -> Comparison:
    """Compare, and leave the subject out of the answer: the app has it."""
    return replace(compare(bundle, subject, *choices), subject=None)  # type: ignore[arg-type]


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "compare": _compare,
    "tokens": compare_tokens,
    "patches": compare_patches,
    "maps": EncoderSet.maps,
}


def serve(connection: Connection, bundles: BundleCache) -> None:
    """Load one bundle or one set of encoders and run functions on it, until the app closes the pipe.

    Args:
        connection: End of the pipe.
        bundles: Cache that finds and loads the models.
    """
    names: ModelNames = BundleNames()
    encoders = EncoderCache(bundles, capacity=1)

    def load(progress: Progress | None = None) -> Any:
        return bundles.get(names, progress) if isinstance(names, BundleNames) else encoders.get(names, progress)

    def send(kind: str, value: Any) -> None:
        connection.send_bytes(pickle.dumps((kind, value)))

    while True:
        try:
            function, arguments, seconds = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        signal.setitimer(signal.ITIMER_REAL, seconds)  # ends the process, for the case that the app is gone
        try:
            if function in ("load", "load encoders"):
                names = BundleNames(*arguments) if function == "load" else EncoderNames(*arguments)
                info = load(lambda share, step: send("progress", (share, step))).info
                if info.image_px > MOST_IMAGE_PX:
                    raise CheckpointError(f"An encoder takes images of {info.image_px} px; at most {MOST_IMAGE_PX}.")
                send("result", info)
            else:
                send("result", FUNCTIONS[function](load(), *arguments))
        except MemoryError:
            return  # the app names the limit; the memory is free again when the process has ended
        except PivotError as error:
            send("data" if isinstance(error, DataError) else "checkpoint", str(error))
        except Exception as error:
            if "can't allocate memory" in str(error) or "out of memory" in str(error):
                return
            send("checkpoint", f"{_label(names)}: their {describe_failure(error)}.")
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)


def main(settings_text: str, descriptor: str) -> None:
    """Limit this process, and serve.

    Args:
        settings_text: Settings as JSON.
        descriptor: Number of this end of the pipe.
    """
    settings = json.loads(settings_text)
    # Not the address space, of which CUDA reserves far more than it uses.
    limit = settings["memory_bytes"]
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    resource.setrlimit(resource.RLIMIT_FSIZE, (MOST_FILE_BYTES, MOST_FILE_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(OSError):
        os.nice(NICENESS)
    runs = settings["runs"]
    serve(Connection(int(descriptor)), BundleCache(runs=None if runs is None else Path(runs), capacity=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
