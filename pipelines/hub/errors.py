"""The errors of requests to the Hub, with a sentence for each."""

from __future__ import annotations

from typing import Any, ClassVar

from meteora.artifacts import MeteoraError


class HubError(MeteoraError):
    """A request to the Hub failed; the base class, also for failures of no other kind."""

    retry: ClassVar[bool] = False
    """Whether the same request may succeed later."""


class HubReferenceError(HubError):
    """The text does not name a repository, or a folder in one."""


class InsecureEndpointError(HubError):
    """The endpoint speaks plain http over a network, where anyone may answer in its place."""


class UnusableRepositoryError(HubError):
    """This repository cannot be used; others may be usable."""


class HubNotFoundError(UnusableRepositoryError):
    """There is no such repository, or it is private."""


class HubRevisionError(UnusableRepositoryError):
    """The repository has no such branch, tag or commit."""


class HubFilesError(UnusableRepositoryError):
    """The repository does not have the needed files at that commit."""


class HubGatedError(UnusableRepositoryError):
    """Its owner asks for consent first."""


class HubAccessError(UnusableRepositoryError):
    """The Hub refuses access with this token, or without one."""


class HubDisabledError(UnusableRepositoryError):
    """The Hub has taken the repository away from everybody."""


class HubProtocolError(HubError):
    """The answer is not a Hub's: a mirror's fault, a proxy, or a wrong endpoint."""


class HubSizeError(UnusableRepositoryError):
    """The files are larger than is allowed, or than the Hub itself lists them."""


class HubHashError(UnusableRepositoryError):
    """The downloaded bytes are not those that the repository lists."""


class HubDamageError(HubError):
    """A file of an earlier download has changed on this disk; no verdict on the repository."""


class HubOfflineError(HubError):
    """The network is forbidden, and the files are not on this disk yet."""


class HubDiskError(HubError):
    """The files cannot be written to this disk."""


class HubTokenError(HubError):
    """There is no token to write with, the Hub does not know it, or it may not go there."""


class HubConflictError(HubError):
    """The repository is not, or no longer, in the expected state."""


class TransientHubError(HubError):
    """A fault that may pass by itself."""

    retry = True


class HubRateLimitError(TransientHubError):
    """Too many requests in too short a time."""

    wait_seconds = 0
    """The wait that the Hub asks for; 0 if it states none."""


class HubServerError(TransientHubError):
    """The Hub has a fault of its own."""


class HubConnectionError(TransientHubError):
    """The Hub cannot be reached, or the connection broke."""


class HubTimeoutError(TransientHubError):
    """The Hub did not finish in time, and the request was stopped."""


_SENTENCES: dict[str, tuple[type[HubError], str]] = {
    "offline": (
        HubOfflineError,
        "{what} is not here yet, and HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE forbids downloading it",
    ),
    "gated": (
        HubGatedError,
        "{what} is gated: accept its terms at {endpoint}, log in with `hf auth login`, and name its"
        " owner in the recipe under hub, token_for, or to the command with --token-for",
    ),
    "disabled": (
        HubDisabledError,
        "{what}: {endpoint} has disabled it, so nobody can download it ({status}); use another",
    ),
    "revision": (HubRevisionError, "{what}: {endpoint} has no such revision of it; check it"),
    "entry": (HubFilesError, "{what}: there is no such file or folder at that revision"),
    "auth": (
        HubAccessError,
        "{what} does not exist at {endpoint} or is private (401); check the name; if it is private,"
        " log in with `hf auth login`, and name its owner in the recipe under hub, token_for, or to"
        " the command with --token-for",
    ),
    "token": (
        HubTokenError,  # true for every request, so no verdict on a repository
        "{what}: {endpoint} does not know the token that was sent (401): it is mistyped, or has"
        " expired; log in again with `hf auth login`, or correct HF_TOKEN",
    ),
    "repository": (HubNotFoundError, "{what} does not exist at {endpoint}; check the name"),
    "reference": (HubReferenceError, "{what} is not a name that the Hub takes: {text}"),
    "protocol": (HubProtocolError, "{what}: {endpoint} does not answer as a Hub does: {text}"),
    "oversize": (HubSizeError, "{what}: {endpoint} sent more than it lists; it was stopped"),
    "disk": (HubDiskError, "{what} cannot be written: {text}; make room, or give another folder"),
    "length": (HubConnectionError, "{what}: {endpoint} sent another length than it announced"),
    "access": (HubAccessError, "{what}: {endpoint} refuses access ({status}); check the token"),
    "conflict": (HubConflictError, "{what}: {endpoint} has it in another state ({status}): {text}"),
    "large": (
        HubSizeError,
        "{what}: {endpoint} takes no upload that large (413); ask its owner for more room",
    ),
    "limit": (
        HubRateLimitError,
        "{what}: {endpoint} has had too many requests (429); wait some minutes, or pass a token,"
        " whose limits are higher",
    ),
    "server": (HubServerError, "{what}: {endpoint} has a fault of its own ({status}); try later"),
    "connection": (HubConnectionError, "{what}: {endpoint} cannot be reached: {text}"),
    "": (HubError, "{what}: {endpoint} failed: {text}"),
}


def hub_error(what: str, error: dict[str, Any], endpoint: str) -> HubError:
    """The error to raise for the result of `worker.describe`.

    Its sentence begins with the thing asked for, such as `owner/name at 1a2b3c`.
    """
    status = error["status"]
    of_status = {401: "auth", 403: "access", 404: "repository", 409: "conflict"}
    of_status |= {412: "conflict", 413: "large", 429: "limit", 451: "disabled"}
    kind = error["kind"] or of_status.get(status, "server" if status >= 500 else "")
    error_class, sentence = _SENTENCES[kind]
    text = " ".join(error["text"].split())[:300]
    made = error_class(sentence.format(what=what, endpoint=endpoint, status=status, text=text))
    if isinstance(made, HubRateLimitError):
        made.wait_seconds = error["wait"]
    return made
