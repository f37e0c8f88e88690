"""A client process of the fault table: pushes and pulls as it is told on stdin, a JSON line each, answers likewise."""

from __future__ import annotations

import json
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from pivot_hub.errors import PivotError
from pivot_hub.publish.pull import pull
from pivot_hub.publish.push import plan_push, push
from pivot_hub.publish.retry import RetryPolicy
from pivot_hub.publish.staging import Publication, stage_encoder
from tests.publish.publishable import make_prose

STAGED: dict[tuple[str, str], Publication] = {}
STAGING = threading.Lock()


def staged(encoder: str, version: str, stack: ExitStack) -> Publication:
    """What is published of an encoder, laid out once for all repositories it goes to."""
    with STAGING:
        if (encoder, version) not in STAGED:
            made = stage_encoder(encoder, "pivot/tiny-dpo", make_prose(version=version))
            STAGED[encoder, version] = stack.enter_context(made)
        return STAGED[encoder, version]


def act(told: dict[str, Any], stack: ExitStack) -> dict[str, Any]:
    retry_policy = RetryPolicy(**told["patience"])
    try:
        if told["do"] == "pull":
            pull(told["repo"], told["output"], retry_policy=retry_policy, log=lambda line: None)
            return {"kind": "pulled", "said": ""}
        publication = replace(staged(told["encoder"], told["version"], stack), repo=told["repo"])
        plan = plan_push(publication, retry_policy=retry_policy)
        return {"kind": push(plan, retry_policy, log=lambda line: None).kind, "said": ""}
    except PivotError as error:
        return {"kind": "refused", "said": str(error)}
    except Exception as error:  # reported, and judged by the test
        return {"kind": "broken", "said": f"{type(error).__name__}: {error}"}


def main() -> None:
    lock = threading.Lock()

    with ExitStack() as stack:

        def answer(line: str) -> None:
            told = json.loads(line)
            made = json.dumps({"id": told["id"], **act(told, stack)})
            with lock:
                print(made, flush=True)

        with ThreadPoolExecutor(8) as pool:
            for line in sys.stdin:
                pool.submit(answer, line)


if __name__ == "__main__":
    main()
