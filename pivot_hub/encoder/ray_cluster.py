"""Encode on a Ray cluster: tasks on its CPUs decode, actors hold the encoder, and this process writes the features.

Tasks and actors are Ray's own, so that those that die are started again and their work is repeated. Images that lie in
files need paths or URLs that all machines of the cluster can read, and all need this package.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

from pivot_hub.data.stored_file import is_url
from pivot_hub.encoder.batches import Decoder, Encoded, Inputs, Item, Prepared, encoded, grouped, item_lists
from pivot_hub.encoder.encode import EncoderLoader
from pivot_hub.encoder.feature_table import StoredRow
from pivot_hub.errors import DataError

LOCAL = "local"
REPEATS = 3  # of the work of a task or actor that died
STARTED_S = 300.0  # within which an actor must hold the encoder
STORE_SHARE = 0.3  # of Ray's memory for objects, which decoded images may take


@dataclass(frozen=True)
class RayCluster:
    """The engine of a cluster: one actor for each free GPU; without a GPU, actors on three quarters of the free CPUs.

    Args:
        address: `local` starts Ray on this machine; `auto` finds the cluster that this machine belongs to; or the
            host:port of a cluster.
        load: Loads the encoder in an actor. It reads the same folder or Hub name there.
        workers: Largest number of lists of images that are decoded at a time; by default one for each free CPU.
    """

    address: str
    load: EncoderLoader
    workers: int | None = None

    def __call__(self, items: Iterator[Item], decoder: Decoder, batch: int) -> Iterator[list[Encoded]]:
        """Encode images, see `pivot_hub.encoder.batches.Engine`.

        Raises:
            DataError: Ray is not installed, the cluster cannot be reached, has too few free CPUs, or gave up on images.
            NotFiniteError: Features of an image are not finite.
        """
        try:
            import ray
        except ImportError:
            raise DataError("encoding on Ray needs the extra: pip install 'pivot_hub[ray]'.") from None
        from ray.exceptions import RayError, RayTaskError

        _connect(self.address)
        try:
            yield from _Pipeline(decoder, self.load, batch, self.workers).run(items)
        except RayTaskError as error:
            cause = error.cause if isinstance(error.cause, DataError) else None
            raise cause or DataError(f"a task of Ray failed: {_lines(error)[-1]}") from error
        except RayError as error:
            raise DataError(
                f"Ray gave up after {REPEATS} more attempts ({_lines(error)[0]}); what was encoded is kept. Give a "
                "smaller --batch if memory ran out, and run the same command again."
            ) from error
        finally:
            ray.shutdown()


def _connect(address: str) -> None:
    import ray

    if ray.is_initialized():
        raise DataError("this process is connected to Ray already; call ray.shutdown() first.")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
    if address == LOCAL:
        options["include_dashboard"] = False
    try:
        ray.init(address=address, **options)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise DataError(
            f"no Ray cluster answers at {address!r} ({_lines(error)[0]}); start one with `ray start --head`, or give "
            f"{LOCAL!r}."
        ) from error


class _Pipeline:
    """Lists of items on their way: decoded by tasks, grouped to batches here, encoded by actors; always in order.

    Pixels go from tasks to actors; this process sees what was read of each image, and rows.
    """

    def __init__(self, decoder: Decoder, load: EncoderLoader, batch: int, workers: int | None) -> None:
        import ray

        self.batch, self.at_once = batch, decoder.at_once(batch)
        actors, gpus, decoders = _divide()
        self.decoders = min(decoders, max(workers, 1)) if workers is not None else decoders
        options = {"num_gpus": 1, "num_cpus": 0} if gpus else {"num_cpus": 1}
        remote: Any = ray.remote
        actor = remote(max_restarts=REPEATS, max_task_retries=REPEATS, **options)(_Encoder)
        self.decode = remote(num_cpus=1, num_returns=2, max_retries=REPEATS)(_decode)
        self.decoder = ray.put(decoder)
        self.actors = [actor.remote(load) for _ in range(actors)]
        started = [a.ready.remote() for a in self.actors]
        ready, waiting = ray.wait(started, num_returns=len(started), timeout=STARTED_S)
        ray.get(ready)
        if waiting:
            raise DataError(
                f"{len(waiting)} of {len(self.actors)} actors did not start in {STARTED_S:.0f} s; see `ray status`, "
                "and whether other work holds the cluster."
            )
        self.store_bytes = STORE_SHARE * ray.cluster_resources().get("object_store_memory", 1e9)
        self.largest = 1  # bytes of a decoded list

    def run(self, items: Iterator[Item]) -> Iterator[list[Encoded]]:
        """Encode items in order."""
        import ray

        encoding: deque[tuple[list[Prepared], Any]] = deque()
        pixels: deque[Any] = deque()  # of the lists whose images are not in a batch yet
        lists = self._decoded(items, pixels)
        batches = lists if self.at_once == self.batch else grouped(chain.from_iterable(lists), self.batch)
        for number, images in enumerate(batches):
            own = [pixels.popleft() for _ in range(-(-len(images) // self.at_once))]
            actor = self.actors[number % len(self.actors)]
            encoding.append((images, actor.rows.remote([image.name for image in images if image.numbers], *own)))
            del own  # so that Ray may free them
            while len(encoding) > 2 * len(self.actors) or (encoding and _is_ready(encoding[0][1])):
                ready, rows = encoding.popleft()
                yield encoded(ready, ray.get(rows))
        for ready, rows in encoding:
            yield encoded(ready, ray.get(rows))

    def _decoded(self, items: Iterator[Item], pixels: deque[Any]) -> Iterator[list[Prepared]]:
        """Yield what was read of each list of items, and keep the reference of its pixels."""
        import ray

        lists = item_lists(map(_absolute, items), self.at_once)
        waiting: deque[Any] = deque()
        while True:
            room = max(1, min(2 * self.decoders, int(self.store_bytes / self.largest))) - len(waiting)
            waiting += [self.decode.remote(self.decoder, one) for one in islice(lists, max(room, 0))]
            if not waiting:
                return
            read, own = waiting.popleft()
            images: list[Prepared] = ray.get(read)
            self.largest = max(self.largest, 4 * sum(image.numbers for image in images))
            pixels.append(own)
            del own
            yield images


def _divide() -> tuple[int, int, int]:
    """Divide what is free of the cluster: the number of actors, of GPUs, and of CPUs that decode.

    Raises:
        DataError: It has too few free CPUs.
    """
    import ray

    free, owned = ray.available_resources(), ray.cluster_resources()
    cpus, gpus = int(free.get("CPU", 0)), int(free.get("GPU", 0))
    actors = gpus or cpus - max(1, cpus // 4)
    needed = 1 if gpus else 2
    if cpus < needed:
        purpose = "one to decode" if gpus else "one to decode, one to encode"
        raise DataError(
            f"{cpus} of the Ray cluster's {int(owned.get('CPU', 0))} CPUs are free, and encoding needs {needed} "
            f"({purpose}); start Ray with more (`ray start --head --num-cpus {needed}`), or wait for other work."
        )
    return actors, gpus, cpus if gpus else cpus - actors


def _decode(decoder: Decoder, items: Sequence[Item]) -> tuple[list[Prepared], list[Inputs]]:
    """Read images: what was read of each, and the inputs of those that have some."""
    images = [decoder[item] for item in items]
    return [replace(image, inputs=None) for image in images], [image.inputs for image in images if image.inputs]


class _Encoder:
    """An actor, which holds the encoder."""

    def __init__(self, load: EncoderLoader) -> None:
        self._rows = load()

    def ready(self) -> None:
        """Return once the encoder is there."""

    def rows(self, names: Sequence[str], *inputs: list[Inputs]) -> list[StoredRow]:
        """Encode images whose inputs several tasks made."""
        return self._rows(names, [one for several in inputs for one in several])


def _absolute(item: Item) -> Item:
    """Return an item whose file does not depend on the folder of a process."""
    place = item.place
    if not place.file or is_url(place.file):
        return item
    return replace(item, place=replace(place, file=str(Path(place.file).absolute())))


def _is_ready(reference: Any) -> bool:
    import ray

    return bool(ray.wait([reference], timeout=0)[0])


def _lines(error: Exception) -> list[str]:
    return [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
