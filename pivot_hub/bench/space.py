"""Speed of the Space: seconds until it is ready, from a click to the new maps, and for many visitors at once.

The app runs in a process of its own, as `pivot space` starts it. Visitors are clients of `gradio_client`, which uses
the page's own protocol. If Chromium and Playwright are installed, clicks are also measured in a browser.
"""

from __future__ import annotations

import math
import shutil
import socket
import statistics
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import psutil

from pivot_hub.errors import PivotError
from pivot_hub.provenance import machine, versions

START_TIMEOUT_S = 120.0


def bench_space(
    visitors: int = 20, clicks: int = 20, looks: int = 0, log: Callable[[str], None] = print
) -> dict[str, Any]:
    """Measure the shipped app.

    Args:
        visitors: Number of clients that request a comparison at the same time.
        clicks: Number of scenes that one client requests one after the other.
        looks: Number of further scenes after which the app's memory is measured; 0 leaves it out.
        log: Callback that takes a line for each measurement.

    Returns:
        `ready_s`, the time until the app answers, and `ready_cpu_s`, its CPU time, which does not depend on other
        programs; `click_s` and `browser_click_s` (None without a browser), each as median and all values; under
        `visitors` for the endpoint `/compare`, and under `encoder_visitors` for `/encoders`, the latencies in order of
        arrival, their median and 95th percentile, the errors, and `overtakings`: the share of pairs of visitors that
        were served in another order than they arrived; `memory_mb`, the resident memory of the app before and after
        the looks.

    Raises:
        PivotError: Gradio is not installed, or the app does not start.
    """
    if find_spec("gradio_client") is None:
        raise PivotError("the Space needs gradio: pip install 'pivot-hub[space]'.")
    with _served() as (url, ready_s, cpu_s, app):
        log(f"ready {ready_s:.1f} s after its start, with {cpu_s:.1f} s of CPU time")
        click_seconds = _clicks(url, clicks)
        log(f"comparison by a program, with figure: median {statistics.median(click_seconds):.2f} s of {clicks}")
        browser_seconds = _browser_clicks(url, clicks)
        if browser_seconds is None:
            log("no Chromium or no Playwright: clicks in a browser are not measured")
        else:
            log(f"click to new maps in a browser: median {statistics.median(browser_seconds):.2f} s of {clicks}")
        crowds = {}
        for name in ("/compare", "/encoders"):
            crowds[name] = crowd = _crowd(url, visitors, name)
            log(
                f"{visitors} visitors of {name} at once: {len(crowd['errors'])} errors, "
                f"median {crowd['median_s']:.1f} s, 95% within {crowd['p95_s']:.1f} s, "
                f"last {max(crowd['seconds'], default=0):.1f} s, "
                f"{100 * crowd['overtakings']:.0f}% of pairs of visitors out of order"
            )
        memory_mb = [_memory_mb(app)]
        if looks:
            _clicks(url, looks)
            memory_mb.append(_memory_mb(app))
            log(f"memory {memory_mb[0]} MB, {memory_mb[1]} MB after {looks} further looks")
    return {
        "benchmark": "space",
        "ready_s": round(ready_s, 2),
        "ready_cpu_s": round(cpu_s, 2),
        "click_s": _summary(click_seconds),
        "browser_click_s": None if browser_seconds is None else _summary(browser_seconds),
        "visitors": crowds["/compare"],
        "encoder_visitors": crowds["/encoders"],
        "looks": looks,
        "memory_mb": memory_mb,
        "machine": machine(),
        "versions": versions(),
    }


@contextmanager
def _served() -> Iterator[tuple[str, float, float, psutil.Process]]:
    """Start `pivot space` on a free port; yield its address, the seconds until it answered, its CPU seconds, and it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    started = time.perf_counter()
    command = [sys.executable, "-m", "pivot_hub", "space", "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        while not _answers(url):
            if process.poll() is not None:
                assert process.stderr is not None
                raise PivotError(f"the app did not start: {process.stderr.read().strip()[-500:]}")
            if time.perf_counter() - started > START_TIMEOUT_S:
                raise PivotError(f"the app did not answer within {START_TIMEOUT_S:.0f} s.")
            time.sleep(0.05)
        ready = time.perf_counter() - started
        app = psutil.Process(process.pid)
        used = app.cpu_times()
        yield url, ready, used.user + used.system, app
    finally:
        process.terminate()
        process.communicate(timeout=30)


def _memory_mb(app: psutil.Process) -> int:
    return int(app.memory_info().rss // 1_000_000)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as page:
            return bool(page.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _clicks(url: str, count: int) -> list[float]:
    from gradio_client import Client

    client = Client(url, verbose=False)
    seconds = []
    for scene in range(count):
        began = time.perf_counter()
        client.predict(scene=scene, api_name="/compare")
        seconds.append(time.perf_counter() - began)
    return seconds


def _browser_clicks(url: str, count: int) -> list[float] | None:
    """Measure the seconds from a click on "Another scene" until the new maps are drawn; None without a browser."""
    chromium = shutil.which("chromium")
    if chromium is None or find_spec("playwright") is None:
        return None
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(url)
        page.wait_for_selector("#comparison img.heat", timeout=1000 * START_TIMEOUT_S)
        seconds = []
        for _ in range(count):
            seconds.append(page.evaluate(_CLICK) / 1000)
        browser.close()
    return seconds


_CLICK = """() => new Promise((done) => {
  const comparison = document.querySelector("#comparison");
  const before = comparison.querySelector("section").innerHTML;
  const began = performance.now();
  const watch = new MutationObserver(() => {
    const heat = comparison.querySelector("img.heat");
    if (!heat || comparison.querySelector("section").innerHTML === before) return;
    watch.disconnect();
    heat.decode().then(() => requestAnimationFrame(() => done(performance.now() - began)));
  });
  watch.observe(comparison, { childList: true, subtree: true, characterData: true });
  document.querySelector("#another").click();
})"""


def _crowd(url: str, visitors: int, endpoint: str) -> dict[str, Any]:
    """Let connected visitors call an endpoint almost at the same time, each with another scene."""
    from gradio_client import Client

    clients = [Client(url, verbose=False) for _ in range(visitors)]
    start_together = threading.Barrier(visitors)
    requested_at, served_at = [0.0] * visitors, [0.0] * visitors
    errors: list[str] = []

    def visit(number: int) -> None:
        start_together.wait()
        # A tenth of a second apart: the order of arrival is known, and the queue grows, as a comparison takes longer.
        time.sleep(0.1 * number)
        requested_at[number] = time.perf_counter()
        try:
            clients[number].predict(scene=1000 + number, api_name=endpoint)
        except Exception as error:  # any error of a visitor is counted
            errors.append(f"{type(error).__name__}: {error}")
        served_at[number] = time.perf_counter()

    threads = [threading.Thread(target=visit, args=(n,)) for n in range(visitors)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = [round(end - start, 3) for start, end in zip(requested_at, served_at, strict=True)]
    pairs = [(i, j) for i in range(visitors) for j in range(i + 1, visitors)]
    overtaken = sum((requested_at[i] < requested_at[j]) != (served_at[i] < served_at[j]) for i, j in pairs)
    return {
        "count": visitors,
        "errors": errors,
        "seconds": seconds,
        "median_s": round(statistics.median(seconds), 3),
        "p95_s": round(sorted(seconds)[math.ceil(0.95 * visitors) - 1], 3),
        "overtakings": round(overtaken / max(len(pairs), 1), 4),
    }


def _summary(seconds: list[float]) -> dict[str, Any]:
    return {"median": round(statistics.median(seconds), 3), "all": [round(s, 3) for s in seconds]}
