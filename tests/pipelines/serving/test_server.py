"""The server, asked over HTTP by OpenAI's own client and by one that sends anything."""

from __future__ import annotations

import ast
import asyncio
import gc
import json
import logging
import signal
import socket
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import AsyncMock, Mock, patch

import httpx
import openai
import pytest
from fastapi import HTTPException

from meteora.artifacts import MeteoraError
from meteora.model.chat import Chat
from meteora.model.trace import Token
from meteora.routing.layer import routed_layers
from pipelines.evaluation.harness import Harness
from pipelines.scoring.served import RecordedAnswer, Server
from pipelines.serving import limits, model_thread, server
from pipelines.serving.host_names import names_of
from pipelines.serving.requests import ChatRequest, Message
from tests.pages import ROOT, fences
from tests.pipelines import test_soak
from tests.pipelines.serving.conftest import serving

HALF = [{"role": "user", "content": "\ud800"}]
HELLO = [{"role": "user", "content": "hello"}]
TOLD = {"role": "assistant", "content": "4"}


@pytest.fixture(scope="module")
def url(chat):
    with serving(chat) as address:
        yield f"{address}/v1"


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        yield client


def complete(client, **asked):
    asked = {"model": "tiny", "messages": HELLO, "max_tokens": 8, **asked}
    return client.chat.completions.create(**asked)


def post(url, body, **asked):
    return httpx.post(f"{url}/chat/completions", json=body, **asked)


def test_the_model_and_each_of_its_experts_are_models(client, chat) -> None:
    names = [model.id for model in client.models.list()]
    assert names == ["tiny", *(f"tiny:{expert}" for expert in chat.experts)]
    assert client.models.retrieve("tiny:q_and_v").id == "tiny:q_and_v"


def test_of_a_thousand_models_only_a_few_are_named_to_a_client_with_a_wrong_name() -> None:
    models = {f"large:expert-{number}": "" for number in range(1000)}
    with pytest.raises(HTTPException) as refused:
        server._expert_of(models, "large:expert_7")
    assert "(did you mean 'large:expert-7'?)" in refused.value.detail
    assert refused.value.detail.endswith("large:expert-7 (and 992 more)")


def test_as_many_clients_as_there_is_memory_for_wait_and_the_others_get_a_503(
    chat, monkeypatch
) -> None:
    """Connections that ask nothing do not count, such as a browser's that it opens ahead."""
    monkeypatch.setattr(limits, "MOST_REQUESTS", 2)
    half = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{"
    with serving(chat) as address, httpx.Client() as third:
        where = httpx.URL(address)
        here = [socket.create_connection((where.host, where.port)) for _ in range(2)]
        assert third.get(f"{address}/v1/models").status_code == 200
        for one in here:
            one.sendall(half)
        until = time.monotonic() + 10
        while (refused := third.get(f"{address}/v1/models")).status_code != 503:
            assert time.monotonic() < until
        assert "too many requests" in refused.json()["error"]["message"]
        here.pop().close()
        until = time.monotonic() + 10
        while third.get(f"{address}/v1/models").status_code != 200:
            assert time.monotonic() < until
        here.pop().close()


def test_an_answer_is_the_chat_s_own(client, chat) -> None:
    found = complete(client)
    expected = chat.answer(HELLO, max_new_tokens=8)
    assert found.choices[0].message.content == expected.text
    assert found.choices[0].finish_reason == "length"
    assert found.usage.prompt_tokens == expected.num_prompt
    assert found.usage.completion_tokens == 8
    assert not hasattr(found.choices[0], "trace")


def test_a_stream_together_is_the_whole_answer(client) -> None:
    whole = complete(client)
    chunks = list(complete(client, stream=True, stream_options={"include_usage": True}))
    *parts, usage = chunks
    assert "".join(part.choices[0].delta.content or "" for part in parts) == (
        whole.choices[0].message.content
    )
    assert parts[0].choices[0].delta.role == "assistant"
    assert [part.choices[0].finish_reason for part in parts[-2:]] == [None, "length"]
    assert usage.usage.total_tokens == whole.usage.total_tokens
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_conversation_goes_on_in_the_cache(client) -> None:
    first = complete(client)
    more = [*HELLO, first.choices[0].message, {"role": "user", "content": "and now?"}]
    again = complete(client, messages=more)
    assert again.usage.prompt_tokens_details.cached_tokens >= first.usage.prompt_tokens


def test_a_request_names_an_expert_as_its_model(client, chat) -> None:
    found = complete(client, model="tiny:q_and_v", extra_body={"trace": True})
    assert found.model == "tiny:q_and_v"
    assert found.choices[0].message.content == (
        chat.answer(HELLO, expert="q_and_v", max_new_tokens=8).text
    )
    assert {token["expert"] for token in found.choices[0].trace} == {"q_and_v"}


def test_a_trace_gives_the_expert_of_each_token_whole_and_streamed(client) -> None:
    whole = complete(client, extra_body={"trace": True}).choices[0]
    assert "".join(token["text"] for token in whole.trace) == whole.message.content
    streamed = [
        token
        for chunk in complete(client, stream=True, extra_body={"trace": True})
        for token in getattr(chunk.choices[0], "trace", [])
    ]
    assert [(t["text"], t["expert"]) for t in streamed] == (
        [(t["text"], t["expert"]) for t in whole.trace]
    )


def test_the_python_of_the_page_on_serving_works(url, chat, capsys) -> None:
    (code,) = fences(ROOT / "pipelines/docs/serving.md", "python")
    here = code.replace("http://127.0.0.1:8000/v1", url).replace('"quick"', '"tiny"')
    exec(here, {})  # noqa: S102
    *_, trace = capsys.readouterr().out.splitlines()
    assert {token["expert"] for token in ast.literal_eval(trace)} <= {*chat.routed}


def test_a_trace_of_layers_gives_the_expert_of_each(client, chat) -> None:
    whole = complete(client, extra_body={"trace": "layers"}).choices[0]
    found = [(token.text, token.layers) for token in chat.answer(HELLO, max_new_tokens=8).tokens]
    assert [(token["text"], len(token["layers"])) for token in whole.trace] == [
        (text, len(layers)) for text, layers in found
    ]
    for token, (_, layers) in zip(whole.trace, found, strict=True):
        for shown, winner in zip(token["layers"], layers, strict=True):
            assert shown["layer"] == winner.layer
            assert shown["expert"] == chat.experts[winner.expert]
            assert shown["share"] == pytest.approx(winner.share, abs=1e-4)


def test_the_base_is_a_model_of_its_own(client) -> None:
    found = complete(client, model="tiny:(base)", extra_body={"trace": "layers"}).choices[0]
    assert {token["expert"] for token in found.trace} == {"(base)"}
    assert all(token["layers"] == [] for token in found.trace)
    assert found.message.content != complete(client).choices[0].message.content


def test_several_at_once_get_the_answers_that_they_get_alone(client) -> None:
    asked = [
        {"model": model, "messages": [{"role": "user", "content": text}]}
        for model in ("tiny", "tiny:attention")
        for text in ("one", "two", "three")
    ]
    alone = [complete(client, **one).choices[0].message.content for one in asked]
    with ThreadPoolExecutor(len(asked)) as pool:
        together = list(pool.map(lambda one: complete(client, **one), asked))
    assert [one.choices[0].message.content for one in together] == alone


def test_sampling_stops_and_parts_of_content_are_taken(client, chat) -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]
    greedy = complete(client, messages=parts, temperature=0).choices[0].message.content
    assert greedy == chat.answer(HELLO, max_new_tokens=8).text
    drawn = {complete(client, temperature=2, seed=7).choices[0].message.content for _ in "ab"}
    assert len(drawn) == 1
    stopped = complete(client, stop=[greedy[-3:]]).choices[0]
    assert stopped.message.content == greedy[:-3]
    assert stopped.finish_reason == "stop"


def test_parts_of_content_are_lines_as_in_vllm() -> None:
    parts = [{"type": "text", "text": word} for word in ("hello", "world")]
    message = Message.model_validate({"role": "user", "content": parts})
    assert message.plain()["content"] == "hello\nworld"


def test_fields_that_ask_for_nothing_may_be_given(client, url) -> None:
    nothing = {
        "response_format": {"type": "text"}, "tool_choice": "none", "logit_bias": {}, "tools": [],
        "service_tier": "auto", "modalities": ["text"], "parallel_tool_calls": False,
        "top_logprobs": 0, "logprobs": False, "n": 1, "prompt_cache_key": "a",
        "safety_identifier": "b", "prompt_cache_retention": "24h",
        "stream_options": {"include_usage": None, "continuous_usage_stats": False},
    }  # fmt: skip
    unasked = dict.fromkeys(["trace", "functions", "reasoning_effort", "prediction", "audio"])
    defaults = {"tool_choice": "auto", "parallel_tool_calls": True, "service_tier": "default"}
    body = {"model": "tiny", "messages": HELLO, "max_tokens": 8}
    for more in (nothing, dict.fromkeys(nothing), unasked, nothing | defaults):
        found = post(url, body | more)
        assert found.status_code == 200, found.text
        answer = found.json()["choices"][0]["message"]["content"]
        assert answer == complete(client).choices[0].message.content


def test_an_answer_of_no_text_may_stand_in_a_conversation(client) -> None:
    def ask(silence):
        asked = [*HELLO, {"role": "assistant", **silence}, {"role": "user", "content": "and now?"}]
        return complete(client, messages=asked).choices[0].message.content

    assert ask({"content": None}) == ask({}) == ask({"content": ""})
    sent_back = complete(client).choices[0].message.model_dump() | {"content": ""}
    assert ask(sent_back | {"tool_calls": [], "prefix": False}) == ask({})
    with pytest.raises(openai.BadRequestError, match=r"messages\.0\.content"):
        complete(client, messages=[{"role": "user", "content": None}])


@pytest.mark.parametrize(
    ("change", "status", "sentence"),
    [
        ({"model": "other"}, 404, "there is no model 'other'; there are tiny, tiny:all_seven"),
        ({"model": "tiny:nobody"}, 404, "there is no model 'tiny:nobody'"),
        ({"messages": []}, 400, "messages: it is []; it should have at least 1 item"),
        ({"messages": "hello"}, 400, 'messages: it is "hello"; it should be a valid list'),
        (
            {"messages": [{"role": "judge", "content": "x"}]},
            400,
            'messages.0.role: it is "judge"; it should be',
        ),
        ({"messages": [{"role": "user", "content": "x" * 600}]}, 400, "the model takes 512 with"),
        ({"messages": [{"role": "user", "content": "x" * 4_000_001}]}, 400, "messages: they have"),
        ({"temperature": 3}, 400, "temperature: it is 3; it should be less than or equal to 2"),
        ({"max_tokens": 0}, 400, "max_tokens: it is 0; it should be greater than or equal to 1"),
        ({"n": 2}, 400, "n: it is 2; it should be 1"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
            400,
            "response_format.type: it is \"json_schema\"; it should be 'text'",
        ),
        ({"tools": [{"type": "function"}]}, 400, "; it should have at most 0 items"),
        ({"trase": True}, 400, "trase: there is no such field here; leave it out"),
        ({"messages": [{}] * 30_000}, 400, "it has more than 30000 values"),
        ({"messages": HELLO * 15_000}, 400, "it has more than 30000 values"),
        ({"metadata": {str(i): i for i in range(30_000)}}, 400, "it has more than 30000 values"),
        ({"stop": ["a"] * 17}, 400, "; it should have at most 16 items"),
        ({"stop": [""]}, 400, 'stop.0: it is ""; it should have at least 1 character'),
        (
            {"trace": "all"},
            400,
            "trace: it is \"all\"; it should be a valid boolean or be 'layers'",
        ),
        (
            {"messages": [*HELLO, {"role": "user", "content": [{"type": "image_url"}]}]},
            400,
            "messages.1.content.0.type: it is \"image_url\"; it should be 'text'",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            400,
            "messages.0.content.0.text: it is needed, and it is not there",
        ),
        (
            {"messages": [{"role": "user"}]},
            400,
            "messages.0.content: it is needed, and it is not there",
        ),
        ({"messages": [*HELLO, TOLD | {"tool_calls": [{"id": "a"}]}]}, 400, "at most 0 items"),
        ({"messages": [*HELLO, TOLD | {"function_call": {"name": "a"}}]}, 400, "function_call: it"),
        ({"messages": [*HELLO, TOLD | {"audio": {"id": "a"}}]}, 400, "messages.1.audio: it is"),
        ({"messages": [*HELLO, TOLD | {"prefix": True}]}, 400, "messages.1.prefix: it is true"),
        (
            {"stream_options": {"continuous_usage_stats": True}},
            400,
            "stream_options.continuous_usage_stats: it is true",
        ),
        ({"model": None}, 400, "model: it is needed, and it is not there"),
        ({"stream": True, "messages": [{"role": "user", "content": "x" * 600}]}, 400, "takes 512"),
    ],
)
def test_bad_input_is_one_sentence_and_a_status(url, change, status: int, sentence: str) -> None:
    found = post(url, {"model": "tiny", "messages": HELLO, **change})
    assert found.status_code == status
    assert sentence in found.json()["error"]["message"]
    assert not found.json()["error"]["message"].startswith("model.model")


def test_a_text_is_continued_without_a_template_whole_and_streamed(client, chat) -> None:
    asked = {"model": "tiny:q_and_v", "prompt": "hello", "max_tokens": 8}
    found = client.completions.create(**asked, extra_body={"trace": True})
    expected = chat.answer("hello", expert="q_and_v", max_new_tokens=8)
    assert (found.object, found.choices[0].text) == ("text_completion", expected.text)
    assert found.choices[0].finish_reason == "length"
    assert found.usage.prompt_tokens == len(chat.tokenizer("hello").input_ids)
    assert {one["expert"] for one in found.choices[0].trace} == {"q_and_v"}
    options = {"include_usage": True}
    *parts, usage = client.completions.create(**asked, stream=True, stream_options=options)
    assert "".join(part.choices[0].text for part in parts) == expected.text
    assert [part.choices[0].finish_reason for part in parts[-2:]] == [None, "length"]
    assert usage.usage.total_tokens == found.usage.total_tokens
    assert client.completions.create(model="tiny", prompt=["hello"]).usage.completion_tokens == 16


def test_a_base_without_a_chat_template_is_served_as_it_was_measured(chat, monkeypatch) -> None:
    monkeypatch.setattr(chat.tokenizer, "chat_template", None)
    prompts = ["one", "two and two"]
    answers = Harness(chat.model, chat.tokenizer, batch_size=1).generate(prompts, 8)
    with serving(chat) as address:
        refused = post(f"{address}/v1", {"model": "tiny", "messages": HELLO})
        asked = [RecordedAnswer("task", one, "", 8, templated=False) for one in prompts]
        assert Server(address).answers(asked) == [text for text, _ in answers]
    assert refused.status_code == 400
    assert refused.json()["error"]["message"].endswith("or a server at /v1/completions")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"prompt": ["one", "two"]},
            "prompt: it is a list of 2; a request continues one text, so",
        ),
        ({"prompt": [1, 2]}, "a list of one text, and no tokens"),
        ({"prompt": [7]}, "prompt: it is a list of 1; a request continues one text"),
        ({"prompt": []}, "prompt: it is a list of 0; a request continues one text"),
        ({"prompt": None}, "prompt: it is needed, and it is not there"),
        ({"prompt": "x" * 600}, "the model takes 512 with its answer"),
        ({"prompt": "\ud800"}, "; it should be a valid string"),
        ({"echo": True}, "echo: it is true; it should be False"),
        ({"best_of": 2}, "best_of: it is 2; it should be 1"),
        ({"logprobs": 1}, "logprobs: there is no such field here"),
        ({"suffix": "end"}, "suffix: there is no such field here"),
        ({"max_completion_tokens": 8}, "max_completion_tokens: there is no such field here"),
    ],
)
def test_a_text_that_cannot_be_continued_is_one_sentence(url, change, sentence: str) -> None:
    body = json.dumps({"model": "tiny", "prompt": "hello", **change})
    kind = {"content-type": "application/json"}
    found = httpx.post(f"{url}/completions", content=body, headers=kind)
    assert found.status_code == 400
    assert sentence in found.json()["error"]["message"]


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (b"{", "is not JSON"),
        (b'{"model": "tiny", "temperature": NaN, "messages": []}', "a finite number"),
        (b"\xff\xfe", "is not JSON"),
        (b'{"model": "\xe9"}', "it is not UTF-8, or has lists or objects nested too deeply"),
        (b"[" * 100_000, "it is not UTF-8, or has lists or objects nested too deeply"),
        (b'{"seed": ' + b"9" * 5_000 + b"}", "or a number of thousands of digits"),
        (b"[]", "a valid dictionary or object"),
        (b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}', "surrogate"),
    ],
    ids=range(8),
)
def test_a_body_that_is_none_is_refused(url, body: bytes, sentence: str) -> None:
    kind = {"content-type": "application/json"}
    found = httpx.post(f"{url}/chat/completions", content=body, headers=kind)
    assert found.status_code == 400
    assert sentence in found.json()["error"]["message"]


@pytest.mark.parametrize("kind", ["", "text/plain", "application/x-www-form-urlencoded"])
def test_a_body_of_another_type_is_refused_since_a_page_of_another_site_may_send_it(
    url, kind: str
) -> None:
    body = json.dumps({"model": "tiny", "messages": HELLO}).encode()
    headers = {"content-type": kind} if kind else {}
    found = httpx.post(f"{url}/chat/completions", content=body, headers=headers)
    assert found.status_code == 415
    assert found.json()["error"]["message"] == "send it as Content-Type: application/json"


@pytest.mark.parametrize("seed", [2, 1, 7, 0, 5, 19])  # one for each way
def test_the_clients_of_the_soak_are_answered_as_they_expect(url, monkeypatch, seed: int) -> None:
    """It takes ten minutes, so nobody would notice."""
    monkeypatch.setitem(test_soak.HELLO, "model", "tiny")
    test_soak.ask(f"{url}/chat/completions", seed)


@pytest.mark.parametrize("announced", [True, False])
def test_a_body_that_is_too_large_is_refused(url, *, announced: bool) -> None:
    headers = {"content-type": "application/json"}
    if announced:
        headers["content-length"] = "33000000"
    body = (b" " * 1_000_000 for _ in range(33))
    found = httpx.post(f"{url}/chat/completions", content=body, headers=headers)
    assert found.status_code == 413
    assert "at most 32 MB" in found.json()["error"]["message"]


@pytest.mark.parametrize(
    ("seconds", "status", "sentence"),
    [(0.2, 408, "the body did not arrive in 0.2 s"), (60.0, 503, "the server was stopped")],
)
def test_half_a_body_is_not_waited_for(
    chat, monkeypatch, capsys, seconds: float, status: int, sentence: str
) -> None:
    monkeypatch.setattr(limits, "BODY_SECONDS", seconds)
    monkeypatch.setattr(server, "GOODBYE_SECONDS", -4.8)  # 0.2 s for clients when it stops
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{"
    with serving(chat) as address:
        client = socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2])))
        client.sendall(head)
        if seconds < 1:
            client.recv(1, socket.MSG_PEEK)
        else:
            time.sleep(0.2)
    with client, client.makefile("rb") as said:
        first, *_, last = said.read().splitlines()
    assert first.startswith(b"HTTP/1.1 %d" % status)
    assert json.loads(last)["error"]["message"] == sentence
    assert "Traceback" not in capsys.readouterr().err


def test_an_unknown_path_and_method_have_their_status(url) -> None:
    unknown = post(f"{url}/..", {"model": "tiny", "messages": HELLO})  # an address without /v1
    assert unknown.status_code == 404
    assert unknown.json()["error"]["message"] == (
        "there is nothing at /chat/completions; there are /v1/chat/completions, /v1/completions and"
        " /v1/models"
    )
    refused = httpx.get(f"{url}/chat/completions")
    assert refused.status_code == 405
    assert refused.headers["allow"] == "POST"
    said = "/v1/chat/completions takes POST, not GET"
    assert refused.json()["error"]["message"] == said


def test_a_page_of_another_site_gets_nothing(url) -> None:
    port = url.split(":")[2].partition("/")[0]
    rebound = httpx.get(f"{url}/models", headers={"host": f"evil.example:{port}"})
    assert rebound.status_code == 403
    assert "not known as 'evil.example:" in rebound.json()["error"]["message"]
    asked = {"origin": "https://evil.example", "access-control-request-method": "POST"}
    allowed = httpx.options(f"{url}/chat/completions", headers=asked).headers
    assert "access-control-allow-origin" not in allowed


def test_it_answers_under_addresses_and_names_that_are_its_own(chat) -> None:
    """An address cannot be rebound to another one; a name of a stranger's can."""
    known = [
        "127.0.0.1", "127.0.0.1:1", "10.1.2.3:8000", "[::1]:8000", "[fe80::1]", "LOCALHOST:8000",
        "localhost.", socket.gethostname(), "chat.example", "Chat.Example:443",
    ]  # fmt: skip
    strange = [
        "evil.example", "", ":8000", "evil.example:8000", "127.0.0.1.evil.example",
        "chat.example.evil", "x.chat.example", "evil.example@chat.example", "chat.example/x",
        "chat.example:80:80", "[::1", "[chat.example]", "\u00b2.0.0.1", "chat.example,evil",
    ]  # fmt: skip
    with serving(chat, allowed=["chat.example"]) as address:
        for host in known + strange:
            asked = {b"host": host.encode("latin-1")}
            status = httpx.get(f"{address}/v1/models", headers=asked).status_code
            assert status == (200 if host in known else 403), host


@pytest.mark.parametrize(
    "name", ["", "*", "http://chat.example", "chat.example:80", "a b", "[::1]"]
)
def test_what_is_no_name_is_not_allowed_as_one(name: str) -> None:
    with pytest.raises(MeteoraError, match="a name is needed, without scheme, port and wildcard"):
        names_of("0.0.0.0", [name])  # noqa: S104
    with pytest.raises(MeteoraError, match="an address of this machine is needed, or its name"):
        names_of("ä" * 80, [])


def test_a_name_to_listen_on_is_one_of_its_own_and_an_address_is_none() -> None:
    assert names_of("::", []) == ["localhost", socket.gethostname()]
    assert names_of("chat.lan", ["chat.example"])[2:] == ["chat.lan", "chat.example"]


def test_a_client_that_leaves_ends_its_answer(client, url) -> None:
    began = time.perf_counter()
    body = {"model": "tiny", "messages": HELLO, "max_tokens": 400, "stream": True}
    with httpx.stream("POST", f"{url}/chat/completions", json=body) as streamed:
        next(streamed.iter_lines())
    complete(client, max_tokens=1)
    left = time.perf_counter() - began
    began = time.perf_counter()
    complete(client, max_tokens=400)
    assert left < (time.perf_counter() - began) / 2


def test_the_reading_of_a_prompt_ends_when_its_client_has_left(chat, monkeypatch) -> None:
    first, *_, last = routed_layers(chat.model).values()
    begun, left, read = threading.Event(), threading.Event(), []
    client = Mock(is_disconnected=AsyncMock(side_effect=begun.is_set))

    def wait(*_: object) -> None:
        begun.set()
        left.wait(10)

    async def leave() -> list:
        asked = ChatRequest(model="tiny", messages=HELLO)
        items = [item async for item in thread.answer(asked, "", client)]
        left.set()
        return items

    monkeypatch.setattr(model_thread, "LOOK_EVERY_SECONDS", 0.05)
    thread = model_thread.ModelThread(chat)
    with (
        first.register_forward_pre_hook(wait),
        last.register_forward_pre_hook(lambda *_: read.append(1)),
    ):
        assert asyncio.run(leave()) == []
        thread._pool.shutdown()
    assert read == []
    assert chat.answer(HELLO, max_new_tokens=8) == Chat(chat.model, chat.tokenizer).answer(
        HELLO, max_new_tokens=8
    )


def test_a_request_whose_client_has_left_keeps_no_memory_while_it_waits(chat, monkeypatch) -> None:
    monkeypatch.setattr(model_thread, "LOOK_EVERY_SECONDS", 0.01)
    thread, free = model_thread.ModelThread(chat), threading.Event()
    thread._pool.submit(free.wait, 10)  # an answer for somebody else
    asked = ChatRequest(model="tiny", messages=[{"role": "user", "content": "large"}])
    kept = weakref.ref(asked)

    async def leave(request: ChatRequest) -> list:
        client = AsyncMock()
        client.is_disconnected.side_effect = [False, True]
        return [item async for item in thread.answer(request, "", client)]

    assert asyncio.run(leave(asked)) == []
    del asked
    gc.collect()
    assert kept() is None
    free.set()
    thread._pool.shutdown()


class Panic(BaseException):
    """As what the tokenizer raises where its own code breaks: no `Exception`."""


@pytest.mark.parametrize("error", [RuntimeError, Panic])
@pytest.mark.parametrize("stream", [False, True])
def test_a_fault_of_the_model_is_a_sentence_and_the_next_request_is_answered(
    client, chat, url, caplog, *, stream: bool, error: type[BaseException]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error("out of memory")

    log = logging.getLogger("uvicorn.error")
    log.addHandler(caplog.handler)
    with patch.object(chat, "answer", fail):
        found = post(url, {"model": "tiny", "messages": HELLO, "stream": stream})
    assert found.status_code == 500
    assert "out of memory" in found.json()["error"]["message"]
    assert complete(client).choices
    log.removeHandler(caplog.handler)
    assert not caplog.records  # they would have a traceback


def test_a_fault_in_the_middle_of_a_stream_is_its_last_event(chat, url) -> None:
    original = chat.answer

    def fail(*args, on_token, **asked):
        original(*args, on_token=on_token, **asked)
        raise RuntimeError("out of memory")

    with patch.object(chat, "answer", fail):
        body = {"model": "tiny", "messages": HELLO, "stream": True, "max_tokens": 3}
        *_, last = post(url, body).text.strip().split("\n\n")
    assert "out of memory" in json.loads(last.removeprefix("data: "))["error"]["message"]


def answer_without_end(_messages, *, on_token, **_asked):
    while True:  # until nobody waits for it
        on_token(Token("on ", 0, 1.0))
        time.sleep(0.02)


def test_a_server_that_stops_ends_its_answers_with_a_sentence_and_no_fault(
    chat, capsys, monkeypatch, caplog
) -> None:
    monkeypatch.setattr(server, "GOODBYE_SECONDS", 0.2)
    monkeypatch.setattr(chat, "answer", answer_without_end)
    with ThreadPoolExecutor(2) as pool:
        with serving(chat) as address:
            body = {"model": "tiny", "messages": HELLO}
            streamed = pool.submit(post, f"{address}/v1", {**body, "stream": True}, timeout=30)
            waiting = pool.submit(post, f"{address}/v1", body, timeout=30)
            time.sleep(1)
        *_, last = streamed.result().text.strip().split("\n\n")
    assert "the server was stopped" in last
    assert waiting.result().status_code == 503
    error = waiting.result().json()["error"]
    assert (error["message"], error["type"]) == ("the server was stopped", "server_error")
    assert not caplog.records
    assert "Traceback" not in capsys.readouterr().err


def test_a_second_ctrl_c_waits_for_no_answer_and_reports_no_fault(chat, caplog) -> None:
    with (
        patch.object(chat, "answer", answer_without_end),
        server.listen("127.0.0.1", 0) as listening,
        ThreadPoolExecutor(2) as pool,
    ):
        running = server.make_server(chat, "tiny", names_of("127.0.0.1", ()))
        served = pool.submit(running.run, sockets=[listening])
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
        waiting = pool.submit(post, url, {"model": "tiny", "messages": HELLO}, timeout=30)
        time.sleep(0.3)
        began = time.monotonic()
        for _ in range(2):
            running.handle_exit(signal.SIGINT, None)
        served.exception()  # the signal, again
    assert waiting.result().status_code == 503
    assert time.monotonic() - began < server.GOODBYE_SECONDS - 1
    assert not caplog.records


def test_no_address_is_not_every_network() -> None:
    with pytest.raises(MeteoraError, match="--host is empty, which would be every network"):
        server.listen("", 0)


def test_an_address_that_is_taken_is_one_sentence() -> None:
    with (
        server.listen("127.0.0.1", 0) as taken,
        pytest.raises(MeteoraError, match=r"cannot be listened on \(Address already in use\); "),
    ):
        server.listen("127.0.0.1", taken.getsockname()[1])


def test_a_message_of_pydantic_that_does_not_say_what_is_needed_is_passed_on() -> None:
    found = {"type": "union_tag_invalid", "msg": "Input tag 'x' is none of these", "input": {}}
    assert server._sentence(found, []) == found["msg"]
