"""Push: show what would change, then publish it in one commit, which succeeds or fails as a whole.

Every call goes through huggingface_hub, with its login and its HF_ENDPOINT; nothing here keeps or prints a token.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_session
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.utils.sha import git_hash

from pivot_hub.errors import PublishError
from pivot_hub.provenance import file_sha256
from pivot_hub.publish.remote import (
    Remote,
    RemoteFile,
    has_xet,
    local_files,
    read_remote,
    read_remote_file,
    remote_files,
    repository_info,
    repository_url,
)
from pivot_hub.publish.retry import HTTPError, RetryPolicy, explain_hub_errors
from pivot_hub.publish.staging import Publication

CARD_LINES = 40  # lines of the card's difference that a plan prints


@dataclass(frozen=True)
class Change:
    """A file that a push adds, changes or deletes, with its sizes in bytes; None where the file does not exist."""

    path: str
    before: int | None
    after: int | None


@dataclass(frozen=True)
class PushPlan:
    """The changes that a push will make.

    Args:
        publication: Staged folder that is to be published.
        endpoint: Address of the hub.
        remote: Repository as it is on the hub; None where it does not exist.
        private: Whether a new repository is private.
        changes: Changes file by file.
        card: Difference of README.md, as `diff -u` writes it.
        edited: Reason why this becomes a pull request; None for a commit.
    """

    publication: Publication
    endpoint: str
    remote: Remote | None
    private: bool
    changes: list[Change]
    card: list[str]
    edited: str | None

    def text(self) -> str:
        """Format the plan for a reader."""
        pub = self.publication
        where = f"{pub.repo} at {self.endpoint}"
        if self.remote is None:
            title = f"{where}: a new {'private ' if self.private else ''}{pub.type} repository"
        else:
            title = f"{where}, now at {self.remote.sha[:8]}"
        if not self.changes:
            return f"{title}: nothing to change"
        lines = [f"{title}:"]
        for change in self.changes:
            mark = "+" if change.before is None else "-" if change.after is None else "~"
            sizes = [_size(s) for s in (change.before, change.after) if s is not None]
            lines.append(f"  {mark} {change.path:40} {' -> '.join(sizes)}")
        if self.card:
            lines += ["", "README.md:", *(f"  {line}" for line in self.card[:CARD_LINES])]
            if len(self.card) > CARD_LINES:
                lines.append(f"  ... {len(self.card) - CARD_LINES} more lines")
        lines += [
            "",
            f"One pull request, because {self.edited}" if self.edited else f"One commit, tag {pub.tag or 'none'}",
        ]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Convert the plan to what `--json` writes."""
        return {
            "repo": self.publication.repo,
            "endpoint": self.endpoint,
            "parent": self.remote.sha if self.remote else None,
            "changes": [vars(change) for change in self.changes],
            "tag": self.publication.tag,
            "pull_request": self.edited,
        }


@dataclass(frozen=True)
class PushResult:
    """The result of a push.

    Args:
        commit: Hash of the commit that holds the files.
        url: Address of the repository or of the pull request.
        kind: Kind of the result: commit, pull request, or unchanged.
    """

    commit: str
    url: str
    kind: str


def plan_push(publication: Publication, private: bool = False, retry_policy: RetryPolicy = RetryPolicy()) -> PushPlan:
    """Compare a publication with the repository on the Hub; nothing is changed.

    Args:
        publication: Staged folder that is to be published.
        private: Whether a new repository is private.
        retry_policy: How long a Hub that does not answer is tried again.

    Raises:
        PublishError: The Hub does not answer, the login lacks the right, or the version's tag is taken.
    """
    api = HfApi()
    with explain_hub_errors(publication.repo):
        retry_policy.call(api.whoami)
        remote = read_remote(api, publication.repo, publication.type, retry_policy)
        changes, card, edited = _compare(publication, remote, retry_policy)
    if remote is not None and private and not remote.private:
        raise PublishError(f"{publication.repo} exists and is public: make it private on its page, or omit --private.")
    if remote is not None and changes and not edited and publication.tag in remote.tags:
        raise PublishError(
            f"{publication.repo} has {publication.tag} at {remote.tags[publication.tag][:8]} with other files: raise "
            "`version` in the card's prose."
        )
    return PushPlan(publication, api.endpoint, remote, private, changes, card, edited)


def push(plan: PushPlan, retry_policy: RetryPolicy = RetryPolicy(), log: Callable[[str], None] = print) -> PushResult:
    """Carry out a plan: one commit whose parent is the commit that was compared, or one pull request, then the tag.

    Args:
        plan: Plan of `plan_push`.
        retry_policy: How long a Hub that does not answer is tried again.
        log: Callback that receives progress messages.

    Raises:
        PublishError: The push failed; the repository is as it was before, and the same push resumes from there.
    """
    api, pub, remote = HfApi(), plan.publication, plan.remote
    with explain_hub_errors(pub.repo):
        if remote is not None and not plan.changes:
            _set_tag(api, pub, remote, remote.sha, retry_policy, log)
            return PushResult(remote.sha, repository_url(api, pub), "unchanged")
        if plan.edited:
            known = _open_pull_request(api, pub, retry_policy)
            if known is not None:
                return known
        is_new = remote is None
        if remote is None:
            remote = _create(api, plan, retry_policy, log)
        try:
            result = _commit(api, plan, remote, retry_policy, log)
        except BaseException:
            if is_new:
                _delete_empty(api, pub, remote, log)
            raise
        if not plan.edited:
            _set_tag(api, pub, remote, result.commit, retry_policy, log)
        return result


def add_to_collection(
    title: str, publication: Publication, private: bool = False, retry_policy: RetryPolicy = RetryPolicy()
) -> tuple[str, list[str]]:
    """Add an encoder, the one it is compared with, and their base encoder to a collection of the same owner.

    Args:
        title: Title of the collection, which is created if it does not exist.
        publication: Publication of the encoder.
        private: Whether a new collection is private.
        retry_policy: How long a Hub that does not answer is tried again.

    Returns:
        The collection's address, and those of the three repositories that are on this hub.

    Raises:
        PublishError: The Hub refuses.
    """
    api, owner = HfApi(), publication.repo.partition("/")[0]
    notes = {publication.repo: "base" if publication.stage == "base" else (publication.stage or "").upper()}
    for stage, name in (publication.branches or {}).items():
        if stage != publication.stage:
            notes[name] = stage.upper()
    if publication.base:
        notes[publication.base] = "base"
    with explain_hub_errors(title):
        collection = retry_policy.call(
            lambda: api.create_collection(title, namespace=owner, private=private, exists_ok=True)
        )
        added = []
        for name, note in notes.items():
            if name != publication.repo and not retry_policy.call(partial(api.repo_exists, name)):
                continue
            retry_policy.call(
                partial(api.add_collection_item, collection.slug, name, "model", note=note, exists_ok=True)
            )
            added.append(name)
    return collection.url, added


def _compare(
    pub: Publication, remote: Remote | None, retry_policy: RetryPolicy
) -> tuple[list[Change], list[str], str | None]:
    """The changes, the card's difference, and the reason for a pull request."""
    local = local_files(pub)
    there = remote.files if remote else {}
    changes = []
    for path in sorted({*local, *there}):
        if path not in local:
            changes.append(Change(path, there[path].size, None))
        elif path not in there:
            changes.append(Change(path, None, local[path].stat().st_size))
        elif not _same_content(local[path], there[path]):
            changes.append(Change(path, there[path].size, local[path].stat().st_size))
    if remote is None or not changes:
        return changes, [], None
    old = read_remote_file(pub, remote, "README.md", retry_policy).decode().splitlines()
    new = local["README.md"].read_text().splitlines()
    card = list(difflib.unified_diff(old, new, "there", "here", lineterm="", n=1))
    return changes, card, _edited_by_hand(pub, remote, changes, retry_policy)


def _edited_by_hand(
    pub: Publication, remote: Remote, changes: Sequence[Change], retry_policy: RetryPolicy
) -> str | None:
    """The file that differs from the remote's manifest: an edit by hand is not overwritten, but gets a pull request."""
    if not remote.files:
        return None
    try:
        checksums = json.loads(read_remote_file(pub, remote, "provenance.json", retry_policy))["files"]
    except (ValueError, KeyError, TypeError):
        return "the repository there was not made by this package"
    if foreign := sorted((remote.files.keys() ^ checksums.keys()) - {"provenance.json"}):
        return f"{foreign[0]} was added or deleted by hand"
    for path in [c.path for c in changes if c.before is not None and c.path != "provenance.json"]:
        digest = remote.files[path].digest
        if not remote.files[path].large:  # its digest is git's, and the manifest holds the SHA-256
            digest = hashlib.sha256(read_remote_file(pub, remote, path, retry_policy)).hexdigest()
        if digest != checksums[path]:
            return f"{'its card' if path == 'README.md' else path} was edited by hand"
    return None


def _same_content(file: Path, there: RemoteFile) -> bool:
    if file.stat().st_size != there.size:
        return False
    return (file_sha256(file) if there.large else git_hash(file.read_bytes())) == there.digest


def _create(api: HfApi, plan: PushPlan, retry_policy: RetryPolicy, log: Callable[[str], None]) -> Remote:
    pub = plan.publication
    options = {"space_sdk": pub.sdk} if pub.type == "space" else {}
    private = plan.private or None  # None leaves it to the owner's setting

    def create() -> object:
        # exist_ok, because a try whose answer was lost may have created the repository.
        return api.create_repo(pub.repo, repo_type=pub.type, private=private, exist_ok=True, **options)  # type: ignore[arg-type]

    retry_policy.call(create, log)
    remote = read_remote(api, pub.repo, pub.type, retry_policy)
    assert remote is not None
    if remote.files:
        raise PublishError(f"{pub.repo} was created by somebody else in between: push again to see what would change.")
    return remote


def _commit(
    api: HfApi, plan: PushPlan, remote: Remote, retry_policy: RetryPolicy, log: Callable[[str], None]
) -> PushResult:
    """Upload, then commit; after a try without an answer, look whether it landed before trying again."""
    pub = plan.publication
    operations: list[Any] = [
        CommitOperationAdd(c.path, pub.folder / c.path) if c.after is not None else CommitOperationDelete(c.path)
        for c in plan.changes
    ]
    get_session().timeout = retry_policy.timeout_s
    additions = [o for o in operations if isinstance(o, CommitOperationAdd)]
    propose = plan.edited is not None
    # The client itself retries each of these requests, and skips large files that are there already.
    _upload(api, pub, lambda: api.preupload_lfs_files(pub.repo, additions, repo_type=pub.type, create_pr=propose))
    attempt = 1
    while True:
        try:
            get_session().timeout = retry_policy.timeout_s
            commit = api.create_commit(
                pub.repo,
                operations,
                commit_message=pub.summary,
                repo_type=pub.type,
                parent_commit=remote.sha,
                create_pr=propose,
            )
            url = commit.pr_url or repository_url(api, pub)
            return PushResult(commit.oid, url, "pull request" if propose else "commit")
        except HTTPError as error:
            # A try that seemed lost may land late, and this try then conflicts with it.
            conflict = attempt > 1 and isinstance(error, HfHubHTTPError) and error.response.status_code == 412
            if not conflict:
                retry_policy.wait(error, attempt, log)
            if landed := _find_landed(api, plan, remote, retry_policy):
                return landed
            if conflict:
                raise
        attempt += 1


def _find_landed(api: HfApi, plan: PushPlan, remote: Remote, retry_policy: RetryPolicy) -> PushResult | None:
    """The commit of a try that got no answer, if it is there nevertheless."""
    pub = plan.publication
    if plan.edited:
        return _open_pull_request(api, pub, retry_policy)
    current = read_remote(api, pub.repo, pub.type, retry_policy)
    if current is None or current.sha == remote.sha:
        return None
    if _compare(pub, current, retry_policy)[0]:
        raise PublishError(f"{pub.repo} was changed by somebody else in between: push again to see what would change.")
    return PushResult(current.sha, repository_url(api, pub), "commit")


def _open_pull_request(api: HfApi, pub: Publication, retry_policy: RetryPolicy) -> PushResult | None:
    """An open pull request that holds exactly what is to be published."""
    opened = retry_policy.call(
        lambda: list(
            api.get_repo_discussions(
                pub.repo, repo_type=pub.type, discussion_type="pull_request", discussion_status="open"
            )
        )
    )
    for proposal in opened:
        if proposal.title != pub.summary:
            continue
        info = repository_info(api, pub.repo, pub.type, retry_policy, proposal.git_reference)
        there, local = remote_files(info), local_files(pub)
        if local.keys() == there.keys() and all(_same_content(local[p], there[p]) for p in local):
            return PushResult(info.sha, proposal.url, "pull request")
    return None


def _set_tag(
    api: HfApi, pub: Publication, remote: Remote, commit: str, retry_policy: RetryPolicy, log: Callable[[str], None]
) -> None:
    if pub.tag is None or pub.tag in remote.tags:
        return
    tag = pub.tag
    retry_policy.call(
        lambda: api.create_tag(pub.repo, tag=tag, revision=commit, repo_type=pub.type, exist_ok=True), log
    )


def _delete_empty(api: HfApi, pub: Publication, created: Remote, log: Callable[[str], None]) -> None:
    """Delete the repository that this push created and that holds no files yet."""
    try:
        if api.repo_info(pub.repo, repo_type=pub.type, timeout=RetryPolicy().timeout_s).sha == created.sha:
            api.delete_repo(pub.repo, repo_type=pub.type)
    except (HTTPError, OSError):
        log(f"{pub.repo} was created and is empty; push again, or delete it on its page")


def _upload(api: HfApi, pub: Publication, upload: Callable[[], object]) -> None:
    try:
        upload()
    except (HTTPError, OfflineModeIsEnabled):
        raise
    except Exception as error:
        if isinstance(error.__cause__, HTTPError):  # the client wraps the error of a file
            raise error.__cause__ from error
        if not constants.HF_HUB_DISABLE_XET and not has_xet(api, pub):
            raise PublishError(
                f"{api.endpoint} has no Xet storage: set HF_HUB_DISABLE_XET=1 to upload large files by git-LFS."
            ) from error
        raise


def _size(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count >= 1e6 else f"{count / 1e3:,.1f} kB"
