"""A client process of the fault table: it reads a JSON request on each line of stdin, pushes or pulls, and answers."""

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
    """The publication of an encoder, staged once for all repositories that it is pushed to."""
    with STAGING:
        if (encoder, version) not in STAGED:
            staging = stage_encoder(encoder, "pivot/tiny-dpo", make_prose(version=version))
            STAGED[encoder, version] = stack.enter_context(staging)
        return STAGED[encoder, version]


def act(request: dict[str, Any], stack: ExitStack) -> dict[str, Any]:
    """Carry out a request; the answer holds the kind of its end, and the error message if there is one."""
    try:
        retry_policy = RetryPolicy(**request["retry_policy"])
        if request["action"] == "pull":
            pull(request["repo"], request["output"], retry_policy=retry_policy, log=lambda line: None)
            return {"kind": "pulled", "message": ""}
        publication = replace(staged(request["encoder"], request["version"], stack), repo=request["repo"])
        plan = plan_push(publication, retry_policy=retry_policy)
        return {"kind": push(plan, retry_policy, log=lambda line: None).kind, "message": ""}
    except PivotError as error:
        return {"kind": "refused", "message": str(error)}
    except Exception as error:  # reported, and judged by the test
        return {"kind": "broken", "message": f"{type(error).__name__}: {error}"}


def main() -> None:
    lock = threading.Lock()

    with ExitStack() as stack:

        def answer(line: str) -> None:
            request = json.loads(line)
            text = json.dumps({"id": request["id"], **act(request, stack)})
            with lock:
                print(text, flush=True)

        with ThreadPoolExecutor(8) as pool:
            for line in sys.stdin:
                pool.submit(answer, line)


if __name__ == "__main__":
    main()
