"""Ask a server for recorded answers again: does it serve the model that was measured?

Any server with OpenAI's HTTP interface works. Greedy answers of the same model are equal in
float32; a server without the adapters, or with another model, answers differently.
"""

import json
import random
import re
import ssl
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import httpx

from meteora.artifacts import ArtifactId, MeteoraError
from meteora.untrusted.findings import brief, shortened
from pipelines.scoring.outputs import read_outputs
from store.ledger import Ledger

KEY = "METEORA_API_KEY"
"""The environment variable that holds a server's key."""
KEY_TEXT = re.compile("[!-~]*")
"""The characters of a key; with others httpx repeats it in its error."""
AT_ONCE = 8
"""Requests at a time."""
TIMEOUT_SECONDS = 600.0
"""Of one request; a server with many users lets it wait."""
MOST_BYTES = 16 << 20
"""Of one answer."""


class ServerError(MeteoraError):
    """A server does not answer, or not by OpenAI's interface."""


@dataclass(frozen=True)
class RecordedAnswer:
    """The answer of a model to one prompt when it was measured."""

    task: str
    prompt: str
    output: str
    max_new_tokens: int
    templated: bool
    """Whether the prompt was put into the chat template."""
    system_prompt: str | None = None
    """Before the prompt; None is the chat template's default."""


def recorded_answers(ledger: Ledger, router_id: ArtifactId, count: int) -> list[RecordedAnswer]:
    """Up to `count` of a fused model's answers, drawn over all its tasks; always the same ones.

    Conversations are left out: their later answers depend on earlier ones.

    Raises:
        MeteoraError: the ledger has none.
    """
    scores = ledger.scores(
        f"SELECT id FROM scores WHERE subject_id = '{router_id}' ORDER BY task, metric, id"  # noqa: S608
    )
    found, seen = [], set()
    for score in scores:
        if score.turns or score.outputs_sha256 in seen | {""}:
            continue
        seen.add(score.outputs_sha256)  # metrics of one task have the same answers
        for row in read_outputs(ledger.blobs.path_of(score.outputs_sha256)):
            if "output" in row and "asked" in row:  # lm-eval's own tasks keep its prompts and JSON
                spec = score.spec
                found.append(
                    RecordedAnswer(
                        spec.task,
                        row["prompt"],
                        row["output"],
                        spec.max_new_tokens,
                        templated=bool(score.templated),
                        system_prompt=spec.system_prompt,
                    )
                )
    if not found:
        raise MeteoraError(
            f"the ledger has no answers of {router_id}; give the home of its run with --home, and"
            " a recipe with a benchmark"
        )
    random.Random(0).shuffle(found)  # noqa: S311  (a sample, not a secret)
    return found[:count]


class Server:
    """A server with OpenAI's HTTP interface."""

    def __init__(self, url: str, model: str = "", key: str = "") -> None:
        """Ask for the served models.

        Args:
            url: with or without `/v1`
            model: the model's name on the server; empty for the first that the server lists
            key: sent to this server as a bearer token, and in no message; redirects are refused

        Raises:
            ServerError: it does not answer, or lists no model.
        """
        if not url.startswith(("http://", "https://")):
            raise ServerError(
                f"{url} is no address of a server; it begins with http:// or https://"
            )
        if not KEY_TEXT.fullmatch(key):
            raise ServerError(
                f"{KEY} holds a space, a line break or another character that no key has; set it"
                " again"
            )
        self.url = url.rstrip("/").removesuffix("/v1") + "/v1"
        self._key = key
        with _client(key) as client:
            data = self._get(client, "/models").get("data")
        listed = [one for one in data if isinstance(one, dict)] if isinstance(data, list) else []
        names = [one["id"] for one in listed if isinstance(one.get("id"), str)]
        if not model and not names:
            raise ServerError(f"{self.url} lists no model; name one with --model")
        self.model = model or names[0]

    def answers(self, asked: Sequence[RecordedAnswer]) -> list[str]:
        """The server's greedy answers to the prompts, `AT_ONCE` of them at a time.

        Raises:
            ServerError: it does not answer one of them, or not by the interface.
        """
        with _client(self._key) as client, ThreadPoolExecutor(AT_ONCE) as pool:
            return list(pool.map(partial(self._answer, client), asked))

    def _answer(self, client: httpx.Client, asked: RecordedAnswer) -> str:
        body = {"model": self.model, "temperature": 0, "max_tokens": asked.max_new_tokens}
        if not asked.templated:
            found = self._get(client, "/completions", body | {"prompt": asked.prompt})
            return _text(found, self.url, "choices", 0, "text")
        messages = [{"role": "user", "content": asked.prompt}]
        if asked.system_prompt is not None:
            messages.insert(0, {"role": "system", "content": asked.system_prompt})
        found = self._get(client, "/chat/completions", body | {"messages": messages})
        return _text(found, self.url, "choices", 0, "message", "content")

    def _get(
        self, client: httpx.Client, path: str, body: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        url, data = self.url + path, None if body is None else json.dumps(body).encode()
        try:
            with client.stream("GET" if body is None else "POST", url, content=data) as answer:
                text = _read(answer)
        except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:
            raise ServerError(f"{url} does not answer: {brief(error)}") from error
        if not answer.is_success:
            said = text.decode("utf-8", "replace") or answer.headers.get("location", "")
            words = shortened(said.replace(self._key, "***") if self._key else said, 300)
            if answer.status_code == 401 and self._key:
                words += f"; {KEY} holds another key than the server's"
            elif answer.status_code == 401:
                words += f"; put the server's key into {KEY}"
            raise ServerError(f"{url} answers {answer.status_code}: {words}")
        if len(text) > MOST_BYTES:
            raise ServerError(f"{url} answers with more than {MOST_BYTES >> 20} MiB")
        try:
            found = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ServerError(f"{url} does not answer in JSON") from error
        if not isinstance(found, dict):
            raise ServerError(f"{url} answers no JSON object")
        return found


def _client(key: str) -> httpx.Client:
    headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    # this machine is not asked through a proxy
    here: dict[str, None] = dict.fromkeys(("all://127.0.0.1", "all://[::1]", "all://localhost"))
    try:
        # the certificates that this machine trusts, a company's own among them
        trusted = ssl.create_default_context()
        return httpx.Client(timeout=TIMEOUT_SECONDS, headers=headers, mounts=here, verify=trusted)
    except (ImportError, ValueError, httpx.InvalidURL) as error:
        raise ServerError(
            f"the proxy that the environment names cannot be used ({brief(error)}); correct"
            " HTTP_PROXY, HTTPS_PROXY or ALL_PROXY"
        ) from error


def _read(answer: httpx.Response) -> bytes:
    """An answer's bytes, as they come; at most one chunk more than `MOST_BYTES`."""
    read = bytearray()
    for chunk in answer.iter_raw():
        read += chunk
        if len(read) > MOST_BYTES:
            break
    return bytes(read)


def _text(found: Any, url: str, *keys: str | int) -> str:  # noqa: ANN401
    """The text at a path of keys in an answer; null counts as empty."""
    try:
        for key in keys:
            found = found[key]
    except (KeyError, IndexError, TypeError) as error:
        raise ServerError(f"{url} answers without {'.'.join(map(str, keys))}") from error
    if not isinstance(found, str | None):
        raise ServerError(f"{url} answers with {'.'.join(map(str, keys))} that is no text")
    return found or ""
