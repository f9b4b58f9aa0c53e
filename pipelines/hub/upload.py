"""Put a bundle of files on the Hub; no reader ever sees half of it.

    main     ──●───────────────────────────────●── all of it at once ─ tag
               └─ staging ──●── one commit ─ checked ┘

Every step first checks whether it is done already, because a commit may have happened although its
reply was lost. So a stopped publication can be repeated, and continues at the unfinished step.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

from meteora.artifacts import AdapterRef
from meteora.checkpoint.manifest import MANIFEST
from pipelines.hub.client import Hub, hub_for
from pipelines.hub.errors import (
    HubConflictError,
    HubError,
    HubHashError,
    HubNotFoundError,
    HubProtocolError,
    HubServerError,
    HubTokenError,
    TransientHubError,
)
from pipelines.hub.listing import list_folder
from pipelines.recipe.publish import MAIN, STAGING
from pipelines.workspace.console import say

if TYPE_CHECKING:
    from pipelines.hub.bundle import Bundle
    from pipelines.hub.snapshot import ListedFile
    from pipelines.recipe.recipe import Recipe
    from pipelines.workspace.context import RunContext

Found = TypeVar("Found")
LOOK_SECONDS = 20.0
"""The deadline of a dry run's look at the Hub, which it can do without."""

PAUSES = (2.0, 10.0, 60.0)
RESULTS = ".eval_results"
"""The only folder of a publication, for the Hub's leaderboards."""
NEUTRAL = {".gitattributes", ".gitignore", "README.md", "LICENSE", "LICENSE.md", "LICENSE.txt"}
"""Files of any repository; one with only these counts as empty."""


@dataclass(frozen=True)
class Repository:
    """A repository on the Hub to publish to; transient errors are retried."""

    repo_id: str
    hub: Hub
    pauses: Sequence[float] = PAUSES
    """Average seconds before each new attempt after a transient error."""
    _trees: dict[str, dict[str, ListedFile]] = field(default_factory=dict, init=False, repr=False)
    """The files of each commit, which never change."""

    def publish(
        self,
        bundle: Bundle,
        *,
        private: bool,
        tag: str,
        check: Callable[[str], None],
        onto: str = "",
        known: Collection[str] = (),
    ) -> str:
        """Put the bundle on main, and return its commit there.

        Args:
            private: Whether only people whom the owner allows may see the repository.
            tag: The name by which exactly this bundle can be downloaded.
            check: Called with a commit of the bundle, before main shows it. An exception from it
                ends the publication.
            onto: The commit that main must be at; if empty, one of `known`.
            known: The commits that this machine published there before.

        Raises:
            HubConflictError: The repository has other contents, or has moved.
            HubHashError: The Hub lists other bytes than were sent.
            HubError: The Hub does not answer, or refuses; main then shows all of it or nothing.
        """
        if not self.hub.token:
            raise HubTokenError(
                f"publishing to {self.repo_id} needs a token that may write there; log in with"
                " `hf auth login`, or set HF_TOKEN"
            )
        self._ensure_exists(private=private)
        refs = self._refs()
        head = self._head(refs)
        there = self._files(head)
        if tag in refs:
            self._refuse_taken(tag, refs[tag], bundle)  # before main changes
        branch = f"{STAGING}{bundle.digest[:16]}"
        if not bundle.missing(there) and not bundle.stale(there):
            check(head)
            self._tag(tag, head, bundle)
            # left by a publication that was stopped after main showed it
            self._delete_branches({branch} & set(refs))
            return head
        self._refuse_foreign_files(bundle, there, head, onto, known)
        if MANIFEST in there and head not in {onto, *known}:
            say(f"{self.repo_id}: this {_replaces(head, known)}", "note")
        staged = self._stage(bundle, branch, head)
        check(staged)
        live = self._commit_to_main(bundle, head, staged)
        self._tag(tag, live, bundle)
        # older staging branches of others can no longer go to main, which has moved
        self._delete_branches({branch, *(name for name in refs if name.startswith(STAGING))})
        return live

    def shows(self) -> str:
        """The commit on main, if it is a publication; else empty.

        Raises:
            HubError: The Hub does not answer, or has no such repository.
        """
        head = self._refs().get(MAIN, "")
        return head if head and MANIFEST in self._files(head) else ""

    def _ensure_exists(self, *, private: bool) -> None:
        """Create the repository unless it exists; refuse one of the other visibility."""

        def look() -> bool | None:
            try:
                return self._ask("is_private")
            except HubNotFoundError:
                return None

        is_private = self._until(look, lambda: self._ask("create_repository", private=private))
        if is_private != private:
            words = ("private", "public") if private else ("public", "private")
            raise HubConflictError(
                f"{self.repo_id} is {words[1]} and is to be published {words[0]}; change that in"
                " the repository's settings, or say which is meant (`private:` in a recipe,"
                " --public on the command line)"
            )

    def _refuse_foreign_files(
        self,
        bundle: Bundle,
        there: Mapping[str, ListedFile],
        head: str,
        onto: str,
        known: Collection[str],
    ) -> None:
        others = set(there) - NEUTRAL
        if MANIFEST not in there and others:
            some = ", ".join(sorted(others - set(bundle.names) or there)[:5])
            raise HubConflictError(
                f"{self.repo_id} holds something else than a fused checkpoint ({some}), which would"
                " be overwritten; give the name of a new repository"
            )
        expected = {onto} if onto else set(known)
        if expected and head not in expected:
            raise HubConflictError(
                f"{self.repo_id} has moved: main is at {head}, and what is expected there is"
                f" {', '.join(sorted(expected))}; look at what changed, and if it may be replaced,"
                f" publish with --onto {head}"
            )

    def _stage(self, bundle: Bundle, branch: str, head: str) -> str:
        """Commit the bundle to a branch of its own, check its hashes; return the commit."""

        def opened() -> str | None:
            return self._refs().get(branch)

        start = self._until(
            opened, lambda: self._ask("create_branch", branch=branch, revision=head)
        )

        def committed() -> str | None:
            at = self._refs().get(branch)
            if at is None:
                raise HubConflictError(
                    f"{self.repo_id}: another publication has replaced this one meanwhile; look at"
                    " what is there, and publish again"
                )
            files = self._files(at)
            if at == start and (bundle.missing(files) or bundle.stale(files)):
                return None
            return at

        def commit() -> None:
            missing = bundle.missing(self._files(start))
            self._commit(
                branch,
                start,
                add={path: str(bundle.folder / path) for path in missing},
                delete=bundle.stale(self._files(start)),
                num_bytes=sum(bundle.files[path].size for path in missing),
            )

        staged = self._until(committed, commit)
        if wrong := bundle.missing(self._files(staged)):
            self._delete_branches({branch})
            raise HubHashError(
                f"{self.repo_id}: the Hub lists other bytes for {', '.join(wrong)} than were sent;"
                " main does not show them, publish again"
            )
        return staged

    def _commit_to_main(self, bundle: Bundle, head: str, staged: str) -> str:
        """Copy the staged files to main, which is still at `head`, in one commit; no upload."""

        def shown() -> str | None:
            at = self._head(self._refs())
            if at == head:
                return None
            if bundle.missing(self._files(at)):
                raise HubConflictError(
                    f"{self.repo_id} has moved meanwhile: main was at {head} and is at {at};"
                    " nothing of this publication is visible, look at what changed and publish"
                    f" with --onto {at}"
                )
            return at

        def commit() -> None:
            there = self._files(head)
            self._commit(
                MAIN,
                head,
                copy=bundle.missing(there),
                copy_from=staged,
                delete=bundle.stale(there),
            )

        return self._until(shown, commit)

    def _commit(self, branch: str, parent: str, *, num_bytes: int = 0, **changes: object) -> None:
        """Commit once; `changes` are arguments of `worker.commit`."""
        self.hub.for_bytes(num_bytes).ask(
            "commit",
            self.repo_id,
            branch=branch,
            parent=parent,
            message="Publish a fused checkpoint",
            **changes,
        )

    def _tag(self, name: str, commit: str, bundle: Bundle) -> None:
        tagged = self._until(
            lambda: self._refs().get(name),
            lambda: self._ask("create_tag", tag=name, revision=commit),
        )
        self._refuse_taken(name, tagged, bundle)

    def _refuse_taken(self, tag: str, commit: str, bundle: Bundle) -> None:
        if bundle.missing(self._files(commit)):
            raise HubConflictError(
                f"{self.repo_id}: {tag} names commit {commit}, which holds another model, and a tag"
                " is for one; publish with another tag or without one, or remove it there"
            )

    def _delete_branches(self, branches: Collection[str]) -> None:
        for branch in branches:
            with suppress(HubError):  # it does no harm, and the next publication removes it
                self._ask("delete_branch", branch=branch)

    def _until(self, look: Callable[[], Found | None], act: Callable[[], object]) -> Found:
        """Call `act` until `look` finds a result; `look` comes first, and again after errors."""
        pauses = iter(self.pauses)
        while True:
            try:
                if (found := look()) is not None:
                    return found
                conflict = None
                try:
                    act()
                except HubConflictError as error:  # perhaps done by a try whose reply was lost
                    conflict = error
                if (found := look()) is not None:
                    return found
                unseen = f"{self.repo_id}: what was written there is not visible yet"
                raise conflict or HubServerError(unseen)
            except TransientHubError as error:
                if (pause := next(pauses, None)) is None:
                    raise
                say(f"{error}; it is tried again in about {pause:.0f} s", "note")
                time.sleep(pause * random.uniform(0.5, 1.5))  # noqa: S311  (jitter)

    def _head(self, refs: Mapping[str, str]) -> str:
        commit = refs.get(MAIN)
        if commit is None:
            raise HubProtocolError(
                f"{self.repo_id} has no branch {MAIN}; commit a file to it first"
            )
        return commit

    def _refs(self) -> dict[str, str]:
        return self._ask("refs")

    def _files(self, commit: str) -> dict[str, ListedFile]:
        """The files and folders at the top of a commit, and in its folder of results, by path."""
        if commit not in self._trees:
            ref = AdapterRef(self.repo_id, commit)
            listed = list_folder(self.hub, ref, "")
            if any(entry.path == RESULTS for entry in listed):
                listed += list_folder(self.hub, ref, RESULTS)
            self._trees[commit] = {entry.path: entry for entry in listed}
        return self._trees[commit]

    def _ask(self, operation: str, **arguments: object) -> Any:  # noqa: ANN401
        return self.hub.ask(operation, self.repo_id, **arguments)


def hub_to_publish(recipe: Recipe, repo_id: str) -> Hub:
    """The Hub of a recipe's publication, with the saved token: a recipe that names it allows it."""
    hub = recipe.hub
    return hub_for(repo_id, [repo_id], endpoint=hub.endpoint, allow_http=hub.allow_http)


def describe_destination(context: RunContext) -> str:
    """Where a run publishes to, and the model that it replaces there, if the Hub tells.

    Raises:
        HubTokenError: The recipe would send the saved token to a server of its own choice.
    """
    section = context.recipe.publish
    assert section is not None  # noqa: S101  (the caller checks it)
    text = f"{section.repo}, {'private' if section.private else 'public'}"
    hub = hub_to_publish(context.recipe, section.repo)
    with suppress(HubError):  # such as that there is no such repository yet
        brief = replace(hub, timeout_seconds=LOOK_SECONDS, longest_wait=0)
        if head := Repository(section.repo, brief).shows():
            known = {one.revision for one in context.ledger.publications(section.repo)}
            text += f"; {_replaces(head, known)}"
    return text


def _replaces(head: str, known: Collection[str]) -> str:
    """What a publication does with the model that main shows, without `onto`."""
    verb = "refuses to replace" if known and head not in known else "replaces"
    whose = "published" if head in known else "did not publish"
    return f"{verb} revision {head[:12]}, which this home {whose}"
