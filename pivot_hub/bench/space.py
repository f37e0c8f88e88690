"""How fast the Space is: seconds until it is ready, from a click to its picture, and for many visitors at once.

The app runs in a process of its own, as `pivot space` starts it. Visitors speak the page's own protocol through
`gradio_client`; where Chromium and Playwright are installed, the clicks are made in a browser, page included.
"""

from __future__ import annotations

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

PATIENCE_S = 120.0


def bench_space(visitors: int = 20, clicks: int = 20, log: Callable[[str], None] = print) -> dict[str, Any]:
    """Measure the shipped app.

    Args:
        visitors: clients that ask at once.
        clicks: scenes that one client asks for in a row.
        say: called with a line a measurement.

    Returns:
        `ready_s`, and `ready_cpu_s`, which other programs on the machine do not stretch; `click_s` and, with a
        browser, `browser_click_s`, each as median and all values; of `visitors` their latencies in order of arrival,
        errors, and `overtakings`: the share of pairs that were served in another order.

    Raises:
        PivotError: gradio is not installed, or the app does not start.
    """
    if find_spec("gradio_client") is None:
        raise PivotError("the Space needs gradio: pip install 'pivot-hub[space]'.")
    with _served() as (url, ready_s, cpu_s):
        log(f"ready {ready_s:.1f} s after its start, {cpu_s:.1f} s of them computing")
        alone = _clicks(url, clicks)
        log(f"look by a program, figure included: median {statistics.median(alone):.2f} s of {clicks}")
        browser = _browser_clicks(url, clicks)
        if browser is None:
            log("no Chromium or no Playwright: clicks in a browser are not measured")
        else:
            log(f"click to picture in a browser: median {statistics.median(browser):.2f} s of {clicks}")
        crowd = _crowd(url, visitors)
        log(
            f"{visitors} visitors at once: {len(crowd['errors'])} errors, median {crowd['median_s']:.1f} s, "
            f"last {max(crowd['seconds'], default=0):.1f} s, {100 * crowd['overtakings']:.0f}% of pairs out of order"
        )
    return {
        "benchmark": "space",
        "ready_s": round(ready_s, 2),
        "ready_cpu_s": round(cpu_s, 2),
        "click_s": _summary(alone),
        "browser_click_s": None if browser is None else _summary(browser),
        "visitors": crowd,
        "machine": machine(),
        "versions": versions(),
    }


@contextmanager
def _served() -> Iterator[tuple[str, float, float]]:
    """Start `pivot space` on a free port: its address, seconds until it answered with its page, and its CPU seconds."""
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
            if time.perf_counter() - started > PATIENCE_S:
                raise PivotError(f"the app did not answer within {PATIENCE_S:.0f} s.")
            time.sleep(0.05)
        ready = time.perf_counter() - started
        used = psutil.Process(process.pid).cpu_times()
        yield url, ready, used.user + used.system
    finally:
        process.terminate()
        process.communicate(timeout=30)


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
        client.predict(scene=scene, api_name="/look")
        seconds.append(time.perf_counter() - began)
    return seconds


def _browser_clicks(url: str, count: int) -> list[float] | None:
    """Seconds from a click on `Another scene` until the new maps are in the page; None without a browser."""
    chromium = shutil.which("chromium")
    if chromium is None or find_spec("playwright") is None:
        return None
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(url)
        page.wait_for_selector("#stage img.heat", timeout=1000 * PATIENCE_S)
        seconds = []
        for _ in range(count):
            seconds.append(page.evaluate(_CLICK) / 1000)
        browser.close()
    return seconds


_CLICK = """() => new Promise((done) => {
  const stage = document.querySelector("#stage");
  const before = stage.querySelector("section").innerHTML;
  const began = performance.now();
  const watch = new MutationObserver(() => {
    const heat = stage.querySelector("img.heat");
    if (!heat || stage.querySelector("section").innerHTML === before) return;
    watch.disconnect();
    heat.decode().then(() => requestAnimationFrame(() => done(performance.now() - began)));
  });
  watch.observe(stage, { childList: true, subtree: true, characterData: true });
  document.querySelector("#another").click();
})"""


def _crowd(url: str, visitors: int) -> dict[str, Any]:
    """Let visitors who are all connected ask at the same moment, each for a scene of its own."""
    from gradio_client import Client

    clients = [Client(url, verbose=False) for _ in range(visitors)]
    gate = threading.Barrier(visitors)
    asked, served, errors = [0.0] * visitors, [0.0] * visitors, []

    def visit(number: int) -> None:
        gate.wait()
        # A tenth of a second apart, less than one look takes: the order of arrival is known, and the line still grows.
        time.sleep(0.1 * number)
        asked[number] = time.perf_counter()
        try:
            clients[number].predict(scene=1000 + number, api_name="/look")
        except Exception as error:  # whatever goes wrong for a visitor is what is counted here
            errors.append(f"{type(error).__name__}: {error}")
        served[number] = time.perf_counter()

    threads = [threading.Thread(target=visit, args=(n,)) for n in range(visitors)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = [round(s - a, 3) for a, s in zip(asked, served, strict=True)]
    pairs = [(i, j) for i in range(visitors) for j in range(i + 1, visitors)]
    overtaken = sum((asked[i] < asked[j]) != (served[i] < served[j]) for i, j in pairs)
    return {
        "count": visitors,
        "errors": errors,
        "seconds": seconds,
        "median_s": round(statistics.median(seconds), 3),
        "overtakings": round(overtaken / max(len(pairs), 1), 4),
    }


def _summary(seconds: list[float]) -> dict[str, Any]:
    return {"median": round(statistics.median(seconds), 3), "all": [round(s, 3) for s in seconds]}
