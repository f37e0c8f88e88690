"""The state of a hub, and a request to it with its account and repository."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, cast
from urllib.parse import unquote

from starlette.requests import Request
from starlette.responses import Response

from .store import TYPES, HubError, Repo, Store

REPO = "/api/{type}/{namespace}/{name}"
# Paths of a repository outside the API: models have no prefix.
PAGES = ("/{namespace}/{name}", "/{type}/{namespace}/{name}")


@dataclass(frozen=True)
class Account:
    """The owner of a token.

    Args:
        name: Name of the user.
        organisations: Organisations that the user may write to.
        role: Role of the token: write or read.
    """

    name: str
    organisations: tuple[str, ...] = ()
    role: str = "write"

    def may_write(self, namespace: str) -> bool:
        return self.role == "write" and namespace in (self.name, *self.organisations)


class Hub:
    """A hub's state and accounts.

    Args:
        store: Store of the repositories and collections.
        accounts: Accounts by token.
        part_bytes: Size of a part in bytes; larger files are uploaded in several parts.
    """

    def __init__(self, store: Store, accounts: dict[str, Account], part_bytes: int = 5_000_000_000) -> None:
        self.store, self.accounts, self.part_bytes = store, accounts, part_bytes
        self.key = secrets.token_bytes(16)  # signs the links to large files

    def sign(self, oid: str) -> str:
        """Return the signature of a link to a large file."""
        return hmac.new(self.key, oid.encode(), hashlib.sha256).hexdigest()[:32]


@dataclass(frozen=True)
class Call:
    """A request and the hub that it is sent to."""

    hub: Hub
    request: Request

    def part(self, name: str) -> str:
        """Return a part of the path, unquoted: revisions and file names may contain slashes."""
        return unquote(self.request.path_params[name])

    def account(self) -> Account | None:
        """Return the account of the request's token; None without a token.

        Raises:
            HubError: The token is not known.
        """
        header = self.request.headers.get("authorization")
        if header is None:
            return None
        account = self.hub.accounts.get(header.removeprefix("Bearer "))
        if account is None:
            raise HubError(401, "Invalid credentials in Authorization header")
        return account

    def writer(self, namespace: str) -> Account:
        """Return the account of the request, if it may write to a namespace.

        Raises:
            HubError: There is no token, or its account may not write.
        """
        account = self.account()
        if account is None:
            raise HubError(401, "Unauthorized: a token is needed")
        if not account.may_write(namespace):
            raise HubError(403, f"You don't have the rights to write to {namespace} with this token")
        return account

    def repo(self, write: bool = False) -> Repo:
        """Return the repository of the path.

        Args:
            write: Whether the account must be able to write to it.

        Raises:
            HubError: The repository does not exist, or the account may not read it or write to it.
        """
        type_ = TYPES[self.request.path_params.get("type", "models")]
        namespace, name = self.part("namespace"), self.part("name")
        repo = self.hub.store.repos.get((type_, f"{namespace}/{name}"))
        account = self.account()
        is_member = account is not None and namespace in (account.name, *account.organisations)
        if repo is None or (repo.private and not is_member):
            raise HubError(404 if account else 401, "Repository not found", "RepoNotFound")
        if write:
            self.writer(namespace)
        return repo

    def committable_repo(self) -> Repo:
        """Return the repository of the path, if the account may commit to it.

        Any account whose token may write can propose a pull request to a repository that it can read.

        Raises:
            HubError: The repository does not exist, or the account may not commit to it.
        """
        repo = self.repo()
        account = self.account()
        if account is None:
            raise HubError(401, "Unauthorized: a token is needed")
        proposed = "create_pr" in self.request.query_params
        if account.role != "write" or (not proposed and not account.may_write(repo.name.split("/")[0])):
            raise HubError(403, f"You don't have the rights to write to {repo.name} with this token")
        return repo

    async def json(self) -> dict[str, Any]:
        try:
            return cast(dict[str, Any], await self.request.json())
        except ValueError as error:
            raise HubError(400, f"not JSON: {error}") from error

    def url(self, path: str) -> str:
        return f"{self.request.url.scheme}://{self.request.url.netloc}{path}"


Handler = Callable[[Call], Awaitable[Response]]
Routes = list[tuple[str, str, Handler]]  # method, path, handler


def repo_page(repo: Repo) -> str:
    """Return the path of a repository's page."""
    return f"/{repo.name}" if repo.type == "model" else f"/{repo.type}s/{repo.name}"
