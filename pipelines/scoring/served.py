"""Ask a server for recorded answers again: does it serve the model that was measured?

Any server with OpenAI's HTTP interface can be asked. Greedy answers of the same model are equal in
32 bits; a server that leaves adapters out, or another model, gives others.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from meteora.artifacts import ArtifactId, MeteoraError
from pipelines.scoring.outputs import read_outputs

if TYPE_CHECKING:
    from store.ledger import Ledger

AT_ONCE = 8
"""Requests at a time."""
TIMEOUT_SECONDS = 600.0
"""Of one request: servers of many users let one wait."""


class ServerError(MeteoraError):
    """A server does not answer, or not as OpenAI's interface says."""


@dataclass(frozen=True)
class RecordedAnswer:
    """What a model answered when it was measured."""

    task: str
    prompt: str
    output: str
    max_new_tokens: int
    templated: bool
    """Whether the prompt was put into the chat template."""
    system_prompt: str | None = None
    """In front of the prompt; None leaves it to the chat template."""


def recorded_answers(ledger: Ledger, router_id: ArtifactId, count: int) -> list[RecordedAnswer]:
    """A sample of what a fused model answered, drawn over all its tasks; always the same one.

    Without conversations, whose later answers depend on the ones before.

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
        """Find out what it serves.

        Args:
            url: with or without `/v1`
            model: its name there; without it, the first that the server lists

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
        """Its greedy answer to the prompt of a recorded one."""
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
        """Its answers to all, `AT_ONCE` of them at a time."""
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
            text = error.read(300).decode("utf-8", "replace")
            raise ServerError(f"{self.url}{path} answers {error.code}: {text}") from error
        except (URLError, OSError) as error:
            raise ServerError(f"{self.url}{path} does not answer: {error}") from error
        except ValueError as error:
            raise ServerError(f"{self.url}{path} does not answer in JSON") from error
        if not isinstance(found, dict):
            raise ServerError(f"{self.url}{path} answers no JSON object")
        return found


def _field(found: Any, url: str, *keys: str | int) -> str:  # noqa: ANN401
    """A text inside an answer; an empty one may be null."""
    try:
        for key in keys:
            found = found[key]
    except (KeyError, IndexError, TypeError) as error:
        raise ServerError(f"{url} answers without {'.'.join(map(str, keys))}") from error
    return found or ""
