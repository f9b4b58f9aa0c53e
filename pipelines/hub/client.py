"""One request to the Hub: the endpoint, the token, the deadline."""

from __future__ import annotations

import ipaddress
import os
import re
import time
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import urlsplit

from huggingface_hub import get_token
from huggingface_hub.constants import ENV_VARS_TRUE_VALUES

from meteora.artifacts import COMMIT
from pipelines.hub.errors import (
    HubError,
    HubProtocolError,
    HubRateLimitError,
    HubReferenceError,
    HubTimeoutError,
    HubTokenError,
    InsecureEndpointError,
    hub_error,
)
from pipelines.processes.child import (
    ChildDiedError,
    ChildError,
    ChildProcess,
    ChildTimeoutError,
)
from pipelines.workspace.console import say

if TYPE_CHECKING:
    from pipelines.recipe.recipe import Recipe

WORKER = "pipelines.hub.worker"
MIN_BYTES_PER_SECOND = 500_000
"""A transfer with a lower average rate is stopped."""
LONGEST_WAIT = 330
"""The longest wait in seconds for a rate limit; the Hub counts in windows of five minutes."""
PUBLIC = "https://huggingface.co"


def page_of(source: str, revision: str = "") -> str:
    """The address of a repository, or of a commit of it; empty for a source outside the Hub."""
    owner, _, rest = source.partition("/")
    if ":" in source or not rest or (revision and not COMMIT.fullmatch(revision)):
        return ""
    page = f"{PUBLIC}/{owner}/{rest.partition('/')[0]}"
    return f"{page}/tree/{revision}" if revision else page


@dataclass(frozen=True)
class Hub:
    """A Hub: its endpoint, the token and the deadline of requests.

    A token identifies the user to the server, so only the token in this object is sent, and not the
    one that `hf auth login` saved.
    """

    endpoint: str = ""
    """Empty: `HF_ENDPOINT`, else huggingface.co."""
    token: str | None = field(default=None, repr=False)
    allow_http: bool = False
    """Whether an endpoint may speak plain http and not be on this machine."""
    timeout_seconds: float = 120.0
    """The deadline of a request, after which the worker is killed; a download gets more time."""
    longest_wait: int = LONGEST_WAIT
    """The longest wait for a rate limit, in seconds."""

    def url(self) -> str:
        """The endpoint, without a slash at the end.

        Raises:
            HubReferenceError: It is no address.
            InsecureEndpointError: It speaks plain http over a network.
        """
        url = (self.endpoint or os.environ.get("HF_ENDPOINT") or PUBLIC).rstrip("/")
        try:
            parts = urlsplit(url)
            _ = parts.port  # urlsplit checks the port only when it is read
        except ValueError as error:
            raise HubReferenceError(
                f"the endpoint {without_password(url)} is no address ({error}); write it as"
                " https://HOST, in HF_ENDPOINT or in the recipe's `hub`"
            ) from None
        if parts.scheme == "https" and parts.hostname:
            return url
        if parts.scheme == "http" and (self.allow_http or is_loopback(parts.hostname or "")):
            return url
        raise InsecureEndpointError(
            f"the endpoint {without_password(url)} is not https, so anyone on the way may answer in"
            " its place; use https, or allow http for it if you trust the network"
        )

    def for_bytes(self, num_bytes: int) -> Self:
        """The same Hub, with time for a transfer of this size."""
        seconds = self.timeout_seconds + num_bytes / MIN_BYTES_PER_SECOND
        return replace(self, timeout_seconds=seconds)

    def ask(self, operation: str, repo_id: str, what: str = "", /, **arguments: Any) -> Any:  # noqa: ANN401  (JSON)
        """Run one operation of the worker.

        After a rate limit with a stated time it waits that time, and asks once more: a recipe with
        hundreds of adapters makes more requests than the Hub allows at once.

        Args:
            operation: A name of `worker.OPERATIONS`.
            what: An error message begins with it; empty: with the repository.

        Raises:
            HubError: One of its subclasses, with `retry` true if waiting can help.
        """
        url, what = self.url(), what or repo_id
        if is_offline():
            offline = {"kind": "offline", "status": 0, "text": ""}
            raise self._without_secrets(hub_error(what, offline, url))
        request = {"endpoint": url, "token": self.token or False}
        request |= {"operation": operation, "repo_id": repo_id, **arguments}
        try:
            return self._ask_once(request, what, url)
        except HubRateLimitError as error:
            if not 0 < error.wait_seconds <= self.longest_wait:
                raise
            say(f"{error}; it is asked again in {error.wait_seconds} s, as it says", "note")
            time.sleep(error.wait_seconds)
        return self._ask_once(request, what, url)

    def _ask_once(self, request: dict[str, Any], what: str, url: str) -> Any:  # noqa: ANN401
        try:
            with ChildProcess(WORKER, quiet=True, environment=_environment(url)) as worker:
                return worker.ask(request, deadline_seconds=self.timeout_seconds)
        except ChildTimeoutError:
            text = f"{what}: {url} did not finish within {self.timeout_seconds:.0f} s"
            raise self._without_secrets(HubTimeoutError(f"{text} and was given up")) from None
        except ChildDiedError as error:
            text = f"{what}: {url} was asked in another process, and {error}"
            raise self._without_secrets(HubProtocolError(text)) from None
        except ChildError as error:
            raise self._without_secrets(hub_error(what, error.args[0], url)) from None

    def _without_secrets(self, error: HubError) -> HubError:
        """The error without the token, and without a password in an address."""
        error.args = tuple(without_password(str(text)) for text in error.args)
        if self.token:
            error.args = tuple(text.replace(self.token, "***") for text in error.args)
        return error


def hub_for(
    repo_id: str, token_for: Collection[str], *, endpoint: str = "", allow_http: bool = False
) -> Hub:
    """The Hub for a repository, with the saved token if the repository is one of `token_for`.

    No other code reads the token that `hf auth login` saved, or `HF_TOKEN`.

    Args:
        token_for: Owners, or `owner/name`.
        endpoint: A recipe's. Strangers write recipes, so a token goes only to one that the user
            named in `HF_ENDPOINT`, or to huggingface.co.

    Raises:
        HubTokenError: The token would go to another endpoint.
    """
    trusted = not {repo_id, repo_id.partition("/")[0]}.isdisjoint(token_for)
    hub = Hub(endpoint, token=get_token() if trusted else None, allow_http=allow_http)
    sends = hub.token and endpoint and not is_offline()
    if sends and hub.url() not in {PUBLIC, Hub(allow_http=allow_http).url()}:
        shown = without_password(hub.url())
        raise HubTokenError(
            f"{repo_id}: the recipe would send your saved token to {shown}; if you trust that"
            f" server, set HF_ENDPOINT={shown}, or else take `endpoint` out of the recipe's"
            " `hub`"
        )
    return hub


def hub_of(recipe: Recipe, repo_id: str) -> Hub:
    """The Hub to ask for a repository; the saved token is sent only where the recipe allows it."""
    hub = recipe.hub
    return hub_for(repo_id, hub.token_for, endpoint=hub.endpoint, allow_http=hub.allow_http)


def without_password(text: str) -> str:
    """A text whose addresses have no name and password, as `https://name:password@host` has."""
    return re.sub(r"(?<=://)[^/\s]*@", "", text)


def is_offline() -> bool:
    """Whether `HF_HUB_OFFLINE` or `TRANSFORMERS_OFFLINE` forbids the use of the network."""
    # huggingface_hub parses it in the same way, but only once, at import
    named = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return named.upper() in ENV_VARS_TRUE_VALUES


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _environment(endpoint: str) -> dict[str, str]:
    return {
        "HF_ENDPOINT": endpoint,
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        # Plain HTTP reaches the same files, and stays under the limits that the worker sets.
        "HF_HUB_DISABLE_XET": "1",
    }
