"""Calls to a hub: tried again when it is away, its refusals in one sentence with the remedy."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from huggingface_hub import HfApi, get_session
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from pivot_hub.errors import PublishError

# What the client's HTTP library raises; it is httpx for huggingface_hub 1.x, httpx2 for 2.x.
HTTPError: type[Exception] = HfHubHTTPError.__bases__[0]
TRANSIENT = (408, 429, 500, 502, 503, 504)
REMEDIES = {
    401: "your login is not valid any more; run `hf auth login`",
    403: "your token may not do this; take one with write access to this owner, or another owner's name",
    409: "somebody else was changing it; run the same command again to see what would change",
    412: "somebody else committed in between; run the same command again to see what would change",
    413: "a file is larger than the hub takes",
    429: "it asks for fewer requests; wait some minutes and run the same command again",
    507: "its storage is full; free some there and run the same command again",
}

T = TypeVar("T")


@dataclass(frozen=True)
class RetryPolicy:
    """How long a hub is tried.

    Args:
        tries: of one call.
        wait_s: before the second try; doubled before each further one.
        timeout_s: for which a silent hub is waited for; the client itself would wait for ever.
    """

    tries: int = 5
    wait_s: float = 1.0
    timeout_s: float = 120.0

    def call(self, call: Callable[[], T], log: Callable[[str], None] = lambda line: None) -> T:
        """Call until it answers: again after 5xx, 429, time-outs and broken connections."""
        attempt = 1
        while True:
            try:
                get_session().timeout = self.timeout_s
                return call()
            except (HTTPError, LocalEntryNotFoundError) as error:
                self.wait(error, attempt, log)
            attempt += 1

    def wait(self, error: Exception, attempt: int, log: Callable[[str], None]) -> None:
        """Wait before the next try, or raise the error: it is no passing one, or this was the last try."""
        if attempt >= self.tries or not is_passing(error):
            raise error
        seconds = self.wait_s * 2 ** (attempt - 1)
        if isinstance(error, HfHubHTTPError) and (asked := error.response.headers.get("Retry-After", "")).isdigit():
            seconds = max(seconds, float(asked))
        log(f"the hub {_said(error)}; try {attempt + 1} of {self.tries} in {seconds:g} s")
        time.sleep(seconds)


def is_passing(error: Exception) -> bool:
    """Whether the same call may go well a moment later."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in TRANSIENT
    if isinstance(error, LocalEntryNotFoundError):  # of a download that got no answer
        cause = error.__cause__
        return isinstance(cause, HTTPError) and is_passing(cause)
    return True


@contextmanager
def in_words(repo: str) -> Iterator[None]:
    """Turn the client's errors into one sentence with the remedy.

    Raises:
        PublishError: whatever the client raised for a hub's sake.
    """
    where = f"{repo} at {HfApi().endpoint}"
    before = get_session().timeout
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise PublishError(f"{where}: offline mode is on; unset HF_HUB_OFFLINE.") from error
    except LocalTokenNotFoundError as error:
        raise PublishError(f"{where}: you are not logged in; run `hf auth login`.") from error
    except RevisionNotFoundError as error:
        raise PublishError(f"{where}: there is no such revision; look at its tags on its page.") from error
    except RepositoryNotFoundError as error:
        raise PublishError(
            f"{where}: there is no such repository, or your login may not see it; check the name, or `hf auth login`."
        ) from error
    except HFValidationError as error:
        raise PublishError(f"{repo} is no name for a repository; give owner/name.") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        remedy = REMEDIES.get(status, "run the same command again later")
        detail = f" ({error.server_message.splitlines()[0].rstrip('.')})" if error.server_message else ""
        raise PublishError(f"{where}: the hub answered {status}{detail}; {remedy}.") from error
    except (HTTPError, LocalEntryNotFoundError) as error:
        raise PublishError(f"{where}: the hub {_said(error)}; run the same command again to go on.") from error
    except OSError as error:
        reason = " ".join(str(error).split())
        raise PublishError(f"{where}: {reason}; free some space or mend the folder, and run it again.") from error
    finally:
        get_session().timeout = before


def _said(error: BaseException) -> str:
    if isinstance(error, HfHubHTTPError):
        return f"answered {error.response.status_code}"
    return f"gave no answer ({type(error).__name__})"
