"""Ask a server for recorded answers again: does it serve the model that was measured?

Any server with OpenAI's HTTP interface works. Greedy answers of the same model are equal in
float32; a server without the adapters, or with another model, answers differently.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from meteora.artifacts import ArtifactId, MeteoraError
from pipelines.scoring.outputs import read_outputs

if TYPE_CHECKING:
    from store.ledger import Ledger

AT_ONCE = 8
"""Requests at a time."""
TIMEOUT_SECONDS = 600.0
"""Of one request; a server with many users lets it wait."""


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
    """A sample of a fused model's answers, drawn over all its tasks; always the same one.

    Conversations are left out: their later answers depend on earlier ones.

    Args:
        count: answers in the sample; all of them if there are fewer

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

    def __init__(self, url: str, model: str = "") -> None:
        """Ask for the served models.

        Args:
            url: with or without `/v1`
            model: the model's name on the server; empty for the first that the server lists

        Raises:
            ServerError: it does not answer, or lists no model.
        """
        if not url.startswith(("http://", "https://")):
            raise ServerError(
                f"{url} is no address of a server; it begins with http:// or https://"
            )
        self.url = url.rstrip("/").removesuffix("/v1") + "/v1"
        listed = [entry["id"] for entry in self._get("/models").get("data", [])]
        if not model and not listed:
            raise ServerError(f"{self.url} lists no model; name one with --model")
        self.model = model or listed[0]

    def answer(self, asked: RecordedAnswer) -> str:
        """The server's greedy answer to the prompt of a recorded answer."""
        body = {"model": self.model, "temperature": 0, "max_tokens": asked.max_new_tokens}
        if not asked.templated:
            found = self._get("/completions", body | {"prompt": asked.prompt})
            return _field(found, self.url, "choices", 0, "text")
        messages = [{"role": "user", "content": asked.prompt}]
        if asked.system_prompt is not None:
            messages.insert(0, {"role": "system", "content": asked.system_prompt})
        found = self._get("/chat/completions", body | {"messages": messages})
        return _field(found, self.url, "choices", 0, "message", "content")

    def answers(self, asked: Sequence[RecordedAnswer]) -> list[str]:
        """The server's answers to all prompts, `AT_ONCE` of them at a time."""
        with ThreadPoolExecutor(AT_ONCE) as pool:
            return list(pool.map(self.answer, asked))

    def _get(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        data = None if body is None else json.dumps(body).encode()
        request = Request(  # noqa: S310  (the scheme was checked)
            self.url + path, data, {"Content-Type": "application/json"}
        )
        try:
            with urlopen(request, timeout=TIMEOUT_SECONDS) as answer:  # noqa: S310
                found = json.load(answer)
        except HTTPError as error:
            with error:
                text = error.read(300).decode("utf-8", "replace")
            raise ServerError(f"{self.url}{path} answers {error.code}: {text}") from error
        except OSError as error:
            raise ServerError(f"{self.url}{path} does not answer: {error}") from error
        except ValueError as error:
            raise ServerError(f"{self.url}{path} does not answer in JSON") from error
        if not isinstance(found, dict):
            raise ServerError(f"{self.url}{path} answers no JSON object")
        return found


def _field(found: Any, url: str, *keys: str | int) -> str:  # noqa: ANN401
    """The text at a path of keys in an answer; null counts as empty."""
    try:
        for key in keys:
            found = found[key]
    except (KeyError, IndexError, TypeError) as error:
        raise ServerError(f"{url} answers without {'.'.join(map(str, keys))}") from error
    return found or ""
