"""Push: what would change is shown, then one commit is there whole or not at all.

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

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    get_session,
)
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.utils.sha import git_hash

from pivot_hub.errors import PublishError
from pivot_hub.provenance import file_sha256
from pivot_hub.publish.remote import (
    Remote,
    has_xet,
    local_files,
    read_remote,
    read_remote_file,
    remote_files,
    repository_info,
    repository_url,
)
from pivot_hub.publish.retry import HTTPError, RetryPolicy, in_words
from pivot_hub.publish.staging import Publication

CARD_LINES = 40  # of the card's difference that are shown


@dataclass(frozen=True)
class Change:
    """A file that a push adds, changes or takes away; sizes in bytes, None where it is not there."""

    path: str
    before: int | None
    after: int | None


@dataclass(frozen=True)
class PushPlan:
    """What a push will do.

    Args:
        publication: what is to be there.
        endpoint: of the hub.
        remote: what is there; None for a repository that is not.
        private: make it for few, when it is made.
        changes: file by file.
        card: the difference of README.md, as `diff -u` writes it.
        edited: why this becomes a pull request; None for a commit.
    """

    publication: Publication
    endpoint: str
    remote: Remote | None
    private: bool
    changes: list[Change]
    card: list[str]
    edited: str | None

    def text(self) -> str:
        """The plan for a reader."""
        pub = self.publication
        where = f"{pub.repo} at {self.endpoint}"
        if self.remote is None:
            head = f"{where}: a new {'private ' if self.private else ''}{pub.type} repository"
        else:
            head = f"{where}, now at {self.remote.sha[:8]}"
        if not self.changes:
            return f"{head}: nothing to change"
        lines = [f"{head}:"]
        for change in self.changes:
            mark = "+" if change.before is None else "-" if change.after is None else "~"
            sizes = [_size(s) for s in (change.before, change.after) if s is not None]
            lines.append(f"  {mark} {change.path:40} {' -> '.join(sizes)}")
        if self.card:
            lines += ["", "README.md:", *(f"  {line}" for line in self.card[:CARD_LINES])]
            if len(self.card) > CARD_LINES:
                lines.append(f"  ... {len(self.card) - CARD_LINES} lines more")
        lines += [
            "",
            f"One pull request, because {self.edited}" if self.edited else f"One commit, tag {pub.tag or 'none'}",
        ]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """The plan for a program."""
        return {
            "repo": self.publication.repo,
            "endpoint": self.endpoint,
            "parent": self.remote.sha if self.remote else None,
            "changes": [vars(change) for change in self.changes],
            "tag": self.publication.tag,
            "pull_request": self.edited,
        }


@dataclass(frozen=True)
class Pushed:
    """What a push did: the commit that holds the files, the address, and whether it is proposed, new or was there."""

    commit: str
    url: str
    kind: str  # commit, pull request, or unchanged


def plan_push(publication: Publication, private: bool = False, retry_policy: RetryPolicy = RetryPolicy()) -> PushPlan:
    """Compare what is to be published with what is on the Hub; nothing is changed.

    Raises:
        PublishError: the Hub does not answer, the login may not, or the version's tag is taken.
    """
    api = HfApi()
    with in_words(publication.repo):
        retry_policy.call(api.whoami)
        remote = read_remote(api, publication.repo, publication.type, retry_policy)
        changes, card, edited = _compare(publication, remote, retry_policy)
    if remote is not None and private and not remote.private:
        raise PublishError(f"{publication.repo} exists and is public: make it private on its page, or leave --private.")
    if remote is not None and changes and not edited and publication.tag in remote.tags:
        raise PublishError(
            f"{publication.repo} has {publication.tag} at {remote.tags[publication.tag][:8]} with other files: raise "
            "`version` in the card's prose."
        )
    return PushPlan(publication, api.endpoint, remote, private, changes, card, edited)


def push(plan: PushPlan, retry_policy: RetryPolicy = RetryPolicy(), log: Callable[[str], None] = print) -> Pushed:
    """Carry out a plan: one commit whose parent is the commit that was looked at, or one pull request, then the tag.

    Raises:
        PublishError: it failed; the repository is as it was before, and the same push goes on from there.
    """
    api, pub, remote = HfApi(), plan.publication, plan.remote
    with in_words(pub.repo):
        if remote is not None and not plan.changes:
            _set_tag(api, pub, remote, remote.sha, retry_policy, log)
            return Pushed(remote.sha, repository_url(api, pub), "unchanged")
        if plan.edited and (known := _open_proposal(api, pub, retry_policy)):
            return Pushed(known[0], known[1], "pull request")
        made_here = remote is None
        if remote is None:
            remote = _create(api, plan, retry_policy, log)
        try:
            pushed = _commit(api, plan, remote, retry_policy, log)
        except BaseException:
            if made_here:
                _take_away(api, pub, remote, log)
            raise
        if not plan.edited:
            _set_tag(api, pub, remote, pushed.commit, retry_policy, log)
        return pushed


def add_to_collection(
    title: str, publication: Publication, private: bool = False, retry_policy: RetryPolicy = RetryPolicy()
) -> tuple[str, list[str]]:
    """Put an encoder, the one it is held against and their base into a collection of the owner, made if need be.

    Returns:
        The collection's address, and the repositories of the three that are on this hub.

    Raises:
        PublishError: the Hub refuses.
    """
    api, owner = HfApi(), publication.repo.partition("/")[0]
    wanted = {publication.repo: "base" if publication.stage == "base" else (publication.stage or "").upper()}
    for stage, name in (publication.pair or {}).items():
        if stage != publication.stage:
            wanted[name] = stage.upper()
    if publication.base:
        wanted[publication.base] = "base"
    with in_words(title):
        made = retry_policy.call(lambda: api.create_collection(title, namespace=owner, private=private, exists_ok=True))
        added = []
        for name, note in wanted.items():
            if name != publication.repo and not retry_policy.call(partial(api.repo_exists, name)):
                continue
            item = partial(api.add_collection_item, made.slug, name, "model", note=note, exists_ok=True)
            retry_policy.call(item)
            added.append(name)
    return made.url, added


def _compare(
    pub: Publication, remote: Remote | None, retry_policy: RetryPolicy
) -> tuple[list[Change], list[str], str | None]:
    """The changes, the card's difference, and what was done to the remote by hand."""
    here = local_files(pub)
    there = remote.files if remote else {}
    changes = []
    for path in sorted({*here, *there}):
        if path not in here:
            changes.append(Change(path, there[path][0], None))
        elif path not in there:
            changes.append(Change(path, None, here[path].stat().st_size))
        elif not _same(here[path], there[path]):
            changes.append(Change(path, there[path][0], here[path].stat().st_size))
    if remote is None or not changes:
        return changes, [], None
    old = read_remote_file(pub, remote, "README.md", retry_policy).decode().splitlines() if "README.md" in there else []
    new = here["README.md"].read_text().splitlines()
    card = list(difflib.unified_diff(old, new, "there", "here", lineterm="", n=1))
    return changes, card, _edited(pub, remote, changes, retry_policy)


def _edited(pub: Publication, remote: Remote, changes: Sequence[Change], retry_policy: RetryPolicy) -> str | None:
    """What differs from the hashes the remote was sealed with: a hand was there, and it is asked, not overwritten."""
    if not remote.files:
        return None
    try:
        sealed = json.loads(read_remote_file(pub, remote, "provenance.json", retry_policy))["files"]
    except (ValueError, KeyError, TypeError):
        return "the repository there was not made by this package"
    if foreign := sorted((remote.files.keys() ^ sealed.keys()) - {"provenance.json"}):
        return f"{foreign[0]} was put there or taken away by hand"
    for path in [c.path for c in changes if c.before is not None and c.path != "provenance.json"]:
        _, digest, large = remote.files[path]
        if not large:  # git's hash says nothing of the sealed one
            digest = hashlib.sha256(read_remote_file(pub, remote, path, retry_policy)).hexdigest()
        if digest != sealed[path]:
            return f"{'its card' if path == 'README.md' else path} was edited by hand"
    return None


def _same(file: Path, there: tuple[int, str, bool]) -> bool:
    size, digest, large = there
    if file.stat().st_size != size:
        return False
    return (file_sha256(file) if large else git_hash(file.read_bytes())) == digest


def _create(api: HfApi, plan: PushPlan, retry_policy: RetryPolicy, log: Callable[[str], None]) -> Remote:
    pub = plan.publication
    options = {"space_sdk": "gradio"} if pub.type == "space" else {}
    private = plan.private or None  # None leaves it to the owner's setting

    def create() -> object:
        # A try whose answer was lost has made it: that is no conflict.
        return api.create_repo(pub.repo, repo_type=pub.type, private=private, exist_ok=True, **options)  # type: ignore[arg-type]

    retry_policy.call(create, log)
    remote = read_remote(api, pub.repo, pub.type, retry_policy)
    assert remote is not None
    if remote.files:
        raise PublishError(f"{pub.repo} was made by somebody else in between: push again to see what would change.")
    return remote


def _commit(
    api: HfApi, plan: PushPlan, remote: Remote, retry_policy: RetryPolicy, log: Callable[[str], None]
) -> Pushed:
    """Upload, then commit; a try whose answer was lost is looked up before it is tried again."""
    pub = plan.publication
    operations: list[Any] = [
        CommitOperationAdd(c.path, pub.folder / c.path) if c.after is not None else CommitOperationDelete(c.path)
        for c in plan.changes
    ]
    get_session().timeout = retry_policy.timeout_s
    additions = [o for o in operations if isinstance(o, CommitOperationAdd)]
    propose = plan.edited is not None
    # The client itself tries each of these requests again, and skips large files that are there already.
    _uploaded(api, pub, lambda: api.preupload_lfs_files(pub.repo, additions, repo_type=pub.type, create_pr=propose))
    attempt = 1
    while True:
        try:
            get_session().timeout = retry_policy.timeout_s
            made = api.create_commit(
                pub.repo,
                operations,
                commit_message=pub.summary,
                repo_type=pub.type,
                parent_commit=remote.sha,
                create_pr=propose,
            )
            return Pushed(made.oid, made.pr_url or repository_url(api, pub), "pull request" if propose else "commit")
        except HTTPError as error:
            # A try that seemed lost may land late, and is then in this one's way.
            late = attempt > 1 and isinstance(error, HfHubHTTPError) and error.response.status_code == 412
            if not late:
                retry_policy.wait(error, attempt, log)
            if done := _landed(api, plan, remote, retry_policy):
                return done
            if late:
                raise
        attempt += 1


def _landed(api: HfApi, plan: PushPlan, remote: Remote, retry_policy: RetryPolicy) -> Pushed | None:
    """The commit of a try that got no answer, if it is there all the same."""
    pub = plan.publication
    if plan.edited:
        known = _open_proposal(api, pub, retry_policy)
        return Pushed(known[0], known[1], "pull request") if known else None
    now = read_remote(api, pub.repo, pub.type, retry_policy)
    if now is None or now.sha == remote.sha:
        return None
    if _compare(pub, now, retry_policy)[0]:
        raise PublishError(f"{pub.repo} was changed by somebody else in between: push again to see what would change.")
    return Pushed(now.sha, repository_url(api, pub), "commit")


def _open_proposal(api: HfApi, pub: Publication, retry_policy: RetryPolicy) -> tuple[str, str] | None:
    """Commit and address of an open pull request that holds exactly what is to be published."""
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
        files, here = remote_files(info), local_files(pub)
        if here.keys() == files.keys() and all(_same(here[p], files[p]) for p in here):
            return info.sha, proposal.url
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


def _take_away(api: HfApi, pub: Publication, made: Remote, log: Callable[[str], None]) -> None:
    """Delete the repository that this push made and that holds nothing yet."""
    try:
        if api.repo_info(pub.repo, repo_type=pub.type, timeout=RetryPolicy().timeout_s).sha == made.sha:
            api.delete_repo(pub.repo, repo_type=pub.type)
    except (HTTPError, OSError):
        log(f"{pub.repo} was made and is empty; push again, or delete it on its page")


def _uploaded(api: HfApi, pub: Publication, upload: Callable[[], object]) -> None:
    try:
        upload()
    except (HTTPError, OfflineModeIsEnabled):
        raise
    except Exception as error:
        if isinstance(error.__cause__, HTTPError):  # the client wraps what went wrong with a file
            raise error.__cause__ from error
        if not constants.HF_HUB_DISABLE_XET and not has_xet(api, pub):
            raise PublishError(
                f"{api.endpoint} has no Xet storage: set HF_HUB_DISABLE_XET=1, and large files go by git-LFS."
            ) from error
        raise


def _size(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count >= 1e6 else f"{count / 1e3:,.1f} kB"
