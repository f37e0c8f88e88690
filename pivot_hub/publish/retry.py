"""Calls to a hub: retried when it is unavailable, and its errors explained with their remedy."""

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

# Base class of the errors of the client's HTTP library: httpx for huggingface_hub 1.x, httpx2 for 2.x.
HTTPError: type[Exception] = HfHubHTTPError.__bases__[0]
TRANSIENT = (408, 429, 500, 502, 503, 504)
REMEDIES = {
    401: "your login is no longer valid; run `hf auth login`",
    403: "your token lacks the right; use one with write access to this owner, or another owner's name",
    409: "somebody else was changing it; run the same command again to see what would change",
    412: "somebody else committed in between; run the same command again to see what would change",
    413: "a file is larger than the hub accepts",
    429: "it asks for fewer requests; wait some minutes and run the same command again",
    507: "its storage is full; free some there and run the same command again",
}

T = TypeVar("T")


@dataclass(frozen=True)
class RetryPolicy:
    """How often and how long a hub is tried.

    Args:
        tries: Number of tries of one call.
        wait_s: Wait before the second try, in seconds; doubled before each further one.
        timeout_s: Time-out of a silent hub, in seconds; the client itself would wait indefinitely.
    """

    tries: int = 5
    wait_s: float = 1.0
    timeout_s: float = 120.0

    def call(self, call: Callable[[], T], log: Callable[[str], None] = lambda line: None) -> T:
        """Call until it succeeds: it is repeated after 5xx, 429, time-outs and broken connections."""
        attempt = 1
        while True:
            try:
                get_session().timeout = self.timeout_s
                return call()
            except (HTTPError, LocalEntryNotFoundError) as error:
                self.wait(error, attempt, log)
            attempt += 1

    def wait(self, error: Exception, attempt: int, log: Callable[[str], None]) -> None:
        """Wait before the next try.

        Args:
            error: Error of the try before.
            attempt: Number of the try before, from 1.
            log: Callback that receives a message about the wait.

        Raises:
            Exception: The given error, where it is not transient or this was the last try.
        """
        if attempt >= self.tries or not is_transient(error):
            raise error
        seconds = self.wait_s * 2 ** (attempt - 1)
        if isinstance(error, HfHubHTTPError):
            retry_after = error.response.headers.get("Retry-After", "")
            if retry_after.isdigit():
                seconds = max(seconds, float(retry_after))
        log(f"the hub {_describe(error)}; try {attempt + 1} of {self.tries} in {seconds:g} s")
        time.sleep(seconds)


def is_transient(error: Exception) -> bool:
    """Whether the same call may succeed a moment later."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in TRANSIENT
    if isinstance(error, LocalEntryNotFoundError):  # raised by a download that got no answer
        cause = error.__cause__
        return isinstance(cause, HTTPError) and is_transient(cause)
    return True


@contextmanager
def explain_hub_errors(repo: str) -> Iterator[None]:
    """Turn the client's errors into a `PublishError` that names the remedy.

    Args:
        repo: Name of the repository, for the message.

    Raises:
        PublishError: The client or the file system raised an error in the block.
    """
    where = f"{repo} at {HfApi().endpoint}"
    previous_timeout = get_session().timeout
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise PublishError(f"{where}: offline mode is on; unset HF_HUB_OFFLINE.") from error
    except LocalTokenNotFoundError as error:
        raise PublishError(f"{where}: you are not logged in; run `hf auth login`.") from error
    except RevisionNotFoundError as error:
        raise PublishError(f"{where}: there is no such revision; its page lists its tags.") from error
    except RepositoryNotFoundError as error:
        raise PublishError(
            f"{where}: there is no such repository, or your login may not see it; check the name, or `hf auth login`."
        ) from error
    except HFValidationError as error:
        raise PublishError(f"{repo} is not a valid repository name; give owner/name.") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        remedy = REMEDIES.get(status, "run the same command again later")
        detail = f" ({error.server_message.splitlines()[0].rstrip('.')})" if error.server_message else ""
        raise PublishError(f"{where}: the hub answered {status}{detail}; {remedy}.") from error
    except (HTTPError, LocalEntryNotFoundError) as error:
        raise PublishError(f"{where}: the hub {_describe(error)}; run the same command again to resume.") from error
    except OSError as error:
        reason = " ".join(str(error).split())
        raise PublishError(f"{where}: {reason}; free some space or fix the folder, and run it again.") from error
    finally:
        get_session().timeout = previous_timeout


def _describe(error: BaseException) -> str:
    if isinstance(error, HfHubHTTPError):
        return f"answered {error.response.status_code}"
    return f"gave no answer ({type(error).__name__})"
