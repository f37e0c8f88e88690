"""The processes for models that visitors name: their limits, and what may come out of them."""

from __future__ import annotations

import multiprocessing
import pickle
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pivot_hub.data.synthetic import ShapesDataset
from pivot_hub.demo.bundle_cache import BundleCache
from pivot_hub.demo.comparison import Comparison, compare, scene_subject
from pivot_hub.demo.encoder_set import EncoderSetInfo, MapRequest
from pivot_hub.demo.launch import load_module
from pivot_hub.demo.model_bundle import BundleInfo, BundleNames, Origin
from pivot_hub.demo.packed_bundle import shipped_bundle
from pivot_hub.demo.turns import Turns
from pivot_hub.demo.worker import WorkerLimits, WorkerPool, _load_reply, serve
from pivot_hub.errors import CheckpointError, DataError

NAMES = BundleNames("a/b", "c/d")
INFO = BundleInfo(("b", "d"), (Origin("a/b", "1" * 40, "2" * 64),), 64, 3, False)
LIMITS = WorkerLimits(memory_bytes=1 << 30, load_s=30, call_s=0.5, idle_s=600, reply_bytes=1000, processes=1, waiting=0)
# A process that misbehaves as the called function says, and starts faster than the real one.
STRANGER = """
import os, pickle, sys, time
from multiprocessing.connection import Connection
connection = Connection(int(sys.argv[-1]))
while True:
    function, arguments, seconds = pickle.loads(connection.recv_bytes())
    if function == "load":
        connection.send_bytes(bytes.fromhex(sys.argv[1]))
    elif function == "end":
        sys.exit(1)
    elif function == "large":
        connection.send_bytes(b"x" * 10**6)
    elif function == "code":
        class Code:
            def __reduce__(self):
                return os.mkdir, arguments
        connection.send_bytes(pickle.dumps(("result", Code())))
    elif function == "data":
        connection.send_bytes(pickle.dumps(("data", "No question.")))
    elif function == "loop":
        time.sleep(600)
    else:
        connection.send_bytes(pickle.dumps(("result", os.getpid())))
"""


@pytest.fixture
def pool() -> Iterator[WorkerPool]:
    workers = WorkerPool(LIMITS, command=[sys.executable, "-c", STRANGER, pickle.dumps(("result", INFO)).hex()])
    yield workers
    workers.close()


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("loop", "a/b and c/d: these models took more than 0.5 seconds, so they were stopped"),
        ("end", "need more than the 1.0 GiB of memory that this app lends, or their files are broken"),
        ("large", "at most 0 MB are accepted"),
        ("code", "what these models answer cannot be shown here"),
    ],
)
def test_a_process_beyond_its_limits_is_ended_and_replaced(
    pool: WorkerPool, function: str, message: str, tmp_path: Path
) -> None:
    first = pool.run(NAMES, "pid")
    with pytest.raises(CheckpointError, match=message):
        pool.run(NAMES, function, str(tmp_path / "made"))
    assert not (tmp_path / "made").exists(), "the app ran code that a process sent"
    assert not Path(f"/proc/{first}").exists()
    assert pool.run(NAMES, "pid") != first


def test_errors_of_visitors_leave_the_process_running(pool: WorkerPool) -> None:
    assert pool.info(NAMES) == INFO
    first = pool.run(NAMES, "pid")
    with pytest.raises(DataError, match="No question"):
        pool.run(NAMES, "data")
    assert pool.run(NAMES, "pid") == first


def test_busy_processes_refuse_others_at_once(pool: WorkerPool) -> None:
    pool.info(NAMES)
    with ThreadPoolExecutor() as threads:
        slow = threads.submit(pool.run, NAMES, "loop")
        while not pool._slots[NAMES].users:
            time.sleep(0)
        for names in (NAMES, BundleNames("e/f", "g/h")):
            with pytest.raises(CheckpointError, match="busy; try again in a minute"):
                pool.run(names, "pid")
        assert isinstance(slow.exception(), CheckpointError)
    assert pool.run(BundleNames("e/f", "g/h"), "pid"), "an unused process makes room"
    assert list(pool._slots) == [BundleNames("e/f", "g/h")]


def test_idle_processes_are_ended(pool: WorkerPool) -> None:
    process = pool.run(NAMES, "pid")
    pool.close_idle()
    assert Path(f"/proc/{process}").exists()
    pool._slots[NAMES].last_use -= LIMITS.idle_s
    pool.close_idle()
    assert not Path(f"/proc/{process}").exists()


class _Bundles(BundleCache):
    """A cache in which one name needs too much memory, one is broken, and the others are the shipped bundle."""

    def get(self, names: BundleNames, progress: Any = None) -> Any:
        if names.first == "too/large":
            raise MemoryError
        if names.first == "broken/one":
            raise KeyError("no such key")
        progress and progress(0.5, "loading")
        return self.default()


def served(*requests: tuple[str, Any]) -> list[tuple[str, Any]]:
    """Serve requests as a process does; return its messages."""
    ours, theirs = multiprocessing.Pipe()
    for function, arguments in requests:
        ours.send_bytes(pickle.dumps((function, arguments, 600)))
    thread = threading.Thread(target=serve, args=(theirs, _Bundles()))
    thread.start()
    messages: list[tuple[str, Any]] = []
    while len([m for m in messages if m[0] != "progress"]) < len(requests) and (ours.poll(0.2) or thread.is_alive()):
        if ours.poll(0.2):
            messages.append(pickle.loads(ours.recv_bytes()))
    ours.close()
    thread.join()
    return messages


def test_a_process_gives_the_results_of_the_package() -> None:
    subject = scene_subject(ShapesDataset(image_px=64), 27, "colour")
    messages = served(("load", ("a/b", "c/d", "")), ("compare", (subject, "answer", None)), ("nothing", ()))
    assert [kind for kind, _ in messages] == ["progress", "result", "result", "checkpoint"]
    assert messages[1][1] == shipped_bundle().info
    comparison: Comparison = messages[2][1]
    assert comparison.first.answer == compare(shipped_bundle(), subject).first.answer
    assert messages[3][1] == "a/b and c/d: their files or settings lead to an error (KeyError: 'nothing')."


def test_a_process_gives_the_maps_of_encoders_in_classes_that_the_app_accepts() -> None:
    image = scene_subject(ShapesDataset(image_px=64), 27, "colour").image
    wrong, right = MapRequest("drift", image, layers=(9, 9)), MapRequest("matching", image, image, row=2, column=5)
    messages = served(("load encoders", ((),)), ("maps", (wrong,)), ("maps", (right,)))
    assert [kind for kind, _ in messages] == ["result", "data", "result"]
    assert messages[1][1] == "SFT: layer is 9: it must be between -7 and 6 in this encoder."
    for message in (messages[0], messages[2]):
        kind, value = _load_reply(pickle.dumps(message))
        assert kind == "result"
    assert isinstance(messages[0][1], EncoderSetInfo)
    for shown in value:
        best = shown.matches[0]
        assert (best.row, best.column) == shown.position == (2, 5)


def test_a_process_without_memory_ends_and_a_broken_repository_is_named() -> None:
    assert served(("load", ("too/large", "c/d", ""))) == []
    ((kind, message),) = served(("load", ("broken/one", "c/d", "")))
    assert kind == "checkpoint"
    assert message.startswith("broken/one and c/d: their files or settings lead to an error (KeyError")


def test_the_last_of_several_waiting_calls_runs_and_gets_the_view_before_it() -> None:
    turns, started, finish, ran = Turns(), threading.Event(), threading.Event(), []

    def call(name: str, kind: str, hold: bool = False) -> None:
        with turns.turn("visitor", kind) as values:
            if values is None:
                return
            if hold:
                started.set()
                finish.wait()
            ran.append((name, dict(values)))
            values["view"] = name

    def waiting(*kinds: str) -> bool:
        return set(turns._visitors["visitor"].waiting) == set(kinds)

    with ThreadPoolExecutor() as threads:
        threads.submit(call, "first", "compare", True)
        started.wait()
        replaced = threads.submit(call, "second", "compare")
        while not waiting("compare"):
            time.sleep(0)
        threads.submit(call, "third", "compare")
        replaced.result()
        threads.submit(call, "patch", "patch")
        while not waiting("compare", "patch"):
            time.sleep(0)
        with turns.turn("other visitor", "compare") as values:
            assert values == {}, "a visitor waits for another one"
        finish.set()
    assert ran == [("first", {}), ("third", {"view": "first"}), ("patch", {"view": "third"})]
    assert not turns._visitors


PUBLISH = """
import shutil, sys
from pathlib import Path
from huggingface_hub import HfApi
runs, folder = Path(sys.argv[1]), Path(sys.argv[2])
templates = {
    "honest": None,
    "loop": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "large": "{{ 'x' * 8000000000 }}",
}
for name, template in templates.items():
    shutil.copytree(runs / "3-sft", folder / name)
    if template:
        (folder / name / "chat_template.jinja").write_text(template)
    HfApi().create_repo(f"pivot/{name}")
    HfApi().upload_folder(repo_id=f"pivot/{name}", folder_path=folder / name)
"""


@pytest.mark.slow
def test_hostile_visitors_beside_honest_ones(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty visitors of the built-in models are served while a chat template loops and another one fills memory."""
    import subprocess

    from gradio_client import Client
    from gradio_client.exceptions import AppError

    from tests.publish.hub_server import hub_server

    with hub_server(tmp_path / "hub") as server:
        publish = [sys.executable, "-c", PUBLISH, str(trained), str(tmp_path / "repositories")]
        (tmp_path / "repositories").mkdir()
        subprocess.run(publish, check=True, env=server.environment(tmp_path / "home"))
        monkeypatch.delenv("HF_HUB_OFFLINE")
        for name, value in server.environment(tmp_path / "visitors", user="").items():
            monkeypatch.setenv(name, value)
        module = load_module()
        app = module.build_app(limits=WorkerLimits(memory_bytes=3 << 30, load_s=240, call_s=120))
        _, address, _ = app.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True, **module.LAUNCH)

        def visit(**parameters: Any) -> tuple[str, float]:
            start = time.monotonic()
            try:
                client = Client(address, verbose=False, httpx_kwargs={"timeout": 240})
                _, numbers = client.predict(api_name="/compare", **parameters)
                return str(numbers["models"][0]["answer"]), time.monotonic() - start
            except AppError as error:
                return str(error), time.monotonic() - start

        try:
            with ThreadPoolExecutor(40) as threads:
                alone = list(threads.map(lambda _: visit(scene=27, kind="colour"), range(20)))
                hostile = [
                    threads.submit(visit, first=f"pivot/{name}", second="pivot/honest") for name in ("loop", "large")
                ]
                time.sleep(5)
                honest = list(threads.map(lambda _: visit(scene=27, kind="colour"), range(20)))
                assert not hostile[0].done(), f"the honest visitors waited: {honest}, {hostile[0].result()}"
                messages = [future.result()[0] for future in hostile]
            again, _ = visit(first="pivot/honest", second="pivot/honest", scene=27)
        finally:
            app.close()
    assert {answer for answer, _ in [*alone, *honest]} == {"It is teal."}
    assert max(seconds for _, seconds in honest) < 4 * max(seconds for _, seconds in alone)
    assert "took more than 120 seconds, so they were stopped" in messages[0]
    assert "need more than the 3.0 GiB of memory" in messages[1]
    assert "busy" not in again
    assert "stopped" not in again
