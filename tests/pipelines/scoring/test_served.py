"""A server is asked recorded prompts again, and every answer that differs is named."""

import json
import re
from collections.abc import Generator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from meteora.artifacts import (
    BaseSpec,
    BenchmarkSpec,
    FusedSpec,
    MeteoraError,
    RouterSpec,
    Score,
    ScoreTurn,
)
from meteora.checkpoint.manifest import MANIFEST
from pipelines.scoring import served
from pipelines.scoring.outputs import write_outputs
from pipelines.scoring.served import Server, ServerError, recorded_answers
from store.ledger import Ledger
from tests.conftest import World
from tests.pipelines.cli.command_line import done, meteora

BASE = BaseSpec("tiny/base", "a" * 40)
FUSED = FusedSpec(BASE.id, (), ())
ROUTER = RouterSpec(FUSED.id, "gate", 1, 1.0)
TURN = ScoreTurn(1, 1.0, 9.0, 9.0, 2.0, 0.1)
PROMPTS = [f"question {i}" for i in range(4)]


def right(prompt: str) -> str:
    return f" the answer to {prompt}"


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    """Answers of one subject to a task in the chat template, with two metrics, and to another."""
    ledger = Ledger(tmp_path / "home")
    for spec in (BASE, FUSED, ROUTER):
        ledger.record_artifact(spec, weights_sha256="", run_id="r")
    for task, metrics in (("chat", ("exact_match", "rouge1")), ("plain", ("exact_match",))):
        rows = [
            {"prompt": f"{task} {p}", "output": right(f"{task} {p}"), "asked": "{}"}
            for p in PROMPTS
        ]
        write_outputs(rows, tmp_path / "outputs")
        sha256 = ledger.blobs.put(tmp_path / "outputs", move=True)
        for metric in metrics:
            spec = BenchmarkSpec(ROUTER.id, task, "f" * 64, metric, 0, 8, 0, BASE.id)
            score = Score(
                spec, 0.5, 0.1, 0.0, 1.0, 4, sha256, "lm-eval", 1.0, templated=task == "chat"
            )
            ledger.record_score(score, run_id="r")
    write_outputs([{"prompt": "a whole prompt", "output": '[["4"]]'}], tmp_path / "outputs")
    spec = BenchmarkSpec(ROUTER.id, "lm-eval's own", "f" * 64, "acc", 0, 8, 0, BASE.id)
    sha256 = ledger.blobs.put(tmp_path / "outputs", move=True)
    ledger.record_score(Score(spec, 0.5, 0.1, 0.0, 1.0, 1, sha256, "lm-eval", 1.0), run_id="r")
    ledger.ingest()
    return ledger


class Handler(BaseHTTPRequestHandler):
    """OpenAI's interface: right answers, but for prompts that `wrong` names."""

    wrong: frozenset[str] = frozenset()
    asked: list[tuple[str, dict]] = []  # noqa: RUF012

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Print nothing."""

    def do_GET(self) -> None:
        self._answer({"data": [{"id": "fused"}, {"id": "other"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append((self.path, body))
        if body["model"] == "broken":
            self.send_error(500)
            return
        chat = self.path == "/v1/chat/completions"
        prompt = body["messages"][-1]["content"] if chat else body["prompt"]
        text = None if prompt in self.wrong else right(prompt)
        self._answer({"choices": [{"message": {"content": text}} if chat else {"text": text}]})

    def _answer(self, body: dict) -> None:
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def running(handler: type[BaseHTTPRequestHandler]) -> Generator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def url() -> Generator[str]:
    Handler.asked, Handler.wrong = [], frozenset()
    with running(Handler) as url:
        yield url


def test_every_answer_is_asked_once_as_it_was_recorded(ledger: Ledger, url: str) -> None:
    asked = recorded_answers(ledger, ROUTER.id, 100)
    assert len(asked) == 8  # two metrics of one task have the same answers
    assert recorded_answers(ledger, ROUTER.id, 3) == asked[:3]
    assert Server(url).answers(asked) == [one.output for one in asked]
    assert {path for path, _ in Handler.asked} == {"/v1/chat/completions", "/v1/completions"}
    for _, body in Handler.asked:
        assert (body["model"], body["temperature"], body["max_tokens"]) == ("fused", 0, 8)
    assert Server(f"{url}/v1/", "other").model == "other"


def test_a_system_prompt_is_asked_too_and_no_conversation(
    ledger: Ledger, url: str, tmp_path: Path
) -> None:
    for task, asked_under, turns in (("pirate", "Arr.", ()), ("talk", None, (TURN,))):
        write_outputs(
            [{"prompt": task, "output": right(task), "asked": "{}"}], tmp_path / "outputs"
        )
        sha256 = ledger.blobs.put(tmp_path / "outputs", move=True)
        spec = BenchmarkSpec(
            ROUTER.id, task, "f" * 64, "exact_match", 0, 8, 0, BASE.id, system_prompt=asked_under
        )
        score = Score(
            spec, 1.0, 0.0, 1.0, 1.0, 1, sha256, "lm-eval", 1.0, templated=True, turns=turns
        )
        ledger.record_score(score, run_id="r")
    ledger.ingest()
    asked = recorded_answers(ledger, ROUTER.id, 100)
    assert {one.task for one in asked} == {"chat", "plain", "pirate"}
    Server(url).answers(asked)
    systems = [body["messages"][:-1] for _, body in Handler.asked if "messages" in body]
    assert [found for found in systems if found] == [[{"role": "system", "content": "Arr."}]]


def test_what_was_never_measured_and_who_does_not_answer_is_named(
    ledger: Ledger, url: str, tmp_path: Path
) -> None:
    with pytest.raises(MeteoraError, match="the ledger has no answers of"):
        recorded_answers(Ledger(tmp_path / "other"), ROUTER.id, 3)
    with pytest.raises(ServerError, match="begins with http"):
        Server("file:///etc")
    with pytest.raises(ServerError, match="does not answer"):
        Server("http://127.0.0.1:9")
    with pytest.raises(ServerError, match="answers 500"):
        Server(url, "broken").answers(recorded_answers(ledger, ROUTER.id, 1))


def reply(body: str, length: int | None = None) -> bytes:
    length = len(body) if length is None else length
    return f"HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n{body}".encode()


CONTENT = json.dumps({"choices": [{"message": {"content": [{"type": "text", "text": "4"}]}}]})


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (b"SSH-2.0-OpenSSH_9\r\n\r\n", "does not answer: illegal status line"),
        (reply("{}", 100), "does not answer: peer closed"),
        (reply("<html>"), "does not answer in JSON"),
        (reply("[" * 100_000), "does not answer in JSON"),
        (reply("[]"), "answers no JSON object"),
        (reply('{"data": null}'), "lists no model"),
        (reply('{"data": ["x", {"id": 1}]}'), "lists no model"),
        (reply(" " * 300_000), "answers with more than"),
        (reply(CONTENT), "choices.0.message.content that is no text"),
        (reply("{}"), "without choices.0.message.content"),
    ],
    ids=range(10),
)
def test_a_server_of_another_kind_is_one_sentence(
    answer: bytes, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served, "MOST_BYTES", 200_000)
    of_a_question = "choices" in sentence

    class Stranger(Handler):
        def do_GET(self) -> None:
            self.wfile.write(reply('{"data": [{"id": "m"}]}') if of_a_question else answer)

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.wfile.write(answer)

    asked = served.RecordedAnswer("task", "prompt", "output", 4, templated=True)
    with running(Stranger) as url, pytest.raises(ServerError, match=re.escape(sentence)):
        Server(url).answers([asked])


@pytest.mark.parametrize(
    "url", ["http://", "http://127.0.0.1:9/my server", "http://[::1", f"http://{'a' * 70}/"]
)
def test_an_address_of_no_server_is_one_sentence(url: str) -> None:
    with pytest.raises(ServerError, match="does not answer"):
        Server(url)


def test_this_machine_is_asked_without_a_proxy_and_a_proxy_that_is_none_is_named(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    for name in ("HTTP_PROXY", "http_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert Server(url).model == "fused"
    with pytest.raises(ServerError, match="does not answer"):
        Server(url.replace("127.0.0.1", "127.0.0.2"))
    monkeypatch.setenv("ALL_PROXY", "gopher://127.0.0.1:9")
    with pytest.raises(ServerError, match="the proxy that the environment names"):
        Server(url)


class Guarded(Handler):
    """Answers who has its key, and repeats the key to who has another."""

    def do_GET(self) -> None:
        if self._may():
            super().do_GET()

    def do_POST(self) -> None:
        if self._may():
            super().do_POST()

    def _may(self) -> bool:
        sent = self.headers.get("Authorization", "nothing")
        if sent == "Bearer sk-right":
            return True
        data = f"{sent} is wrong".encode()
        self.send_response(401)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
        return False


def test_a_key_is_sent_and_never_shown(
    ledger: Ledger, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = json.loads(world.manifest.to_json()) | {"router_id": ROUTER.id}
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    monkeypatch.delenv("METEORA_API_KEY", raising=False)
    with running(Guarded) as url:
        command = "verify", tmp_path, "--served", url
        said = meteora(*command, home=ledger.home)
        assert "answers 401: nothing is wrong; put the server's key into METEORA" in said.stderr
        monkeypatch.setenv("METEORA_API_KEY", "sk-right")
        done(*command, "--home", ledger.home)
        monkeypatch.setenv("METEORA_API_KEY", "sk-other")
        said = meteora(*command, home=ledger.home)
        assert "answers 401: Bearer *** is wrong; METEORA_API_KEY holds another" in said.stderr
        for odd in ("sk-right\r\n", "sk-right ", "sk-ri\xe9"):
            with pytest.raises(ServerError, match="METEORA_API_KEY holds a space") as error:
                Server(url, key=odd)
            assert "sk-" not in str(error.value)
    assert "sk-" not in said.stdout + said.stderr


def test_a_key_follows_no_redirect() -> None:
    followed = []

    class Elsewhere(Handler):
        def do_GET(self) -> None:
            followed.append(self.headers.get("Authorization"))
            super().do_GET()

    with running(Elsewhere) as other:

        class Redirecting(Handler):
            def do_GET(self) -> None:
                self.send_response(307)
                self.send_header("Location", f"{other}{self.path}")
                self.send_header("Content-Length", "0")
                self.end_headers()

        with running(Redirecting) as url, pytest.raises(ServerError, match="answers 307: http"):
            Server(url, key="sk-right")
    assert followed == []


def test_the_command_counts_equal_answers_and_fails_below_all(
    ledger: Ledger, url: str, world: World, tmp_path: Path
) -> None:
    manifest = json.loads(world.manifest.to_json()) | {"router_id": ROUTER.id}
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    command = "verify", tmp_path, "--served", url, "--answers", "8"
    said = meteora(*command, home=ledger.home)
    assert (said.returncode, said.stderr) == (0, "")
    assert said.stdout == f"8 of 8 answers of fused at {url}/v1 are the recorded ones\n"
    Handler.wrong = frozenset({"chat question 1"})
    said = meteora(*command, home=ledger.home)
    assert said.returncode == 1
    assert said.stdout.startswith("chat: 'chat question 1' was answered ' the answer to chat")
    assert "7 of 8 answers" in said.stdout
    said = meteora(*command, "--json", home=ledger.home)
    assert said.returncode == 1
    found = json.loads(said.stdout)
    assert (found["num_asked"], found["model"]) == (8, "fused")
    assert [one["prompt"] for one in found["differ"]] == ["chat question 1"]
    assert meteora("verify", "--served", url, home=ledger.home).returncode == 2
    said = meteora(*command, home=tmp_path / "typo")
    assert "typo: there is no store in it" in said.stderr
    assert not (tmp_path / "typo").exists()
