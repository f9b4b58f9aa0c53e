"""The page of `meteora chat --web`, used in a real browser, and refused to other sites."""

import json
import re
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import httpx
import pytest
from selenium import webdriver
from selenium.common.exceptions import JavascriptException
from selenium.webdriver import ActionChains, Keys
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

from meteora.checkpoint.manifest import UnknownExpertError
from meteora.model.chat import Answer
from meteora.model.trace import LayerWinner, Token
from pipelines.serving.page import chat_page
from tests.pipelines.reports.html_reader import Elements, resize
from tests.pipelines.serving.conftest import serving

HOSTILE = "</p></form>'\"><img src=x onerror=alert(1)><script>alert(2)</script>"


def page_of(chat, expert: str = "") -> str:
    return chat_page("tiny", chat.experts, expert=expert, max_new_tokens=8)


@pytest.fixture(scope="module")
def url(chat) -> Generator[str]:
    with serving(chat, page_of(chat)) as address:
        yield f"{address}/"


def test_names_are_text_and_nothing_is_fetched_or_run_that_is_not_the_page_s_own() -> None:
    html = chat_page(HOSTILE, [HOSTILE, "dates"], expert="", max_new_tokens=8)
    page = Elements(html)
    assert page.count("img") == 0
    assert page.count("script") == 1
    assert page.handlers() == page.requests() == []
    assert "://" not in html
    assert 'fetch("v1/' in html, "a proxy may serve the page below a path of its own"
    (policy,) = [str(a["content"]) for _, a in page.found if "http-equiv" in a]
    assert "unsafe" not in policy
    assert len(re.findall(r"'sha256-[\w+/]{43}='", policy)) == 2
    (state,) = [json.loads(str(a["data-state"])) for _, a in page.found if "data-state" in a]
    assert state["model"] == HOSTILE


def test_an_unknown_expert_has_no_page(chat) -> None:
    with pytest.raises(UnknownExpertError, match="there is no expert 'nobody'"):
        page_of(chat, "nobody")


def test_a_page_of_another_name_or_in_a_frame_gets_nothing(url: str) -> None:
    assert httpx.get(url, headers={"host": "evil.example"}).status_code == 403
    assert httpx.get(url).headers["x-frame-options"] == "DENY"


def test_without_a_page_there_is_none(chat) -> None:
    with serving(chat) as address:
        assert httpx.get(f"{address}/").status_code == 404


class Page:
    """The page as a person uses it."""

    def __init__(self, browser: webdriver.Chrome, url: str) -> None:
        self.browser = browser
        browser.get(url)

    def all(self, selector: str) -> list[WebElement]:
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector: str) -> WebElement:
        return self.browser.find_element(By.CSS_SELECTOR, selector)

    def run(self, script: str, *arguments: object) -> Any:
        return self.browser.execute_script(script, *arguments)

    def wait(self) -> None:
        """Until all have answered."""
        WebDriverWait(self.browser, 60).until(lambda _: self.one("[type=submit]").is_displayed())

    def ask(self, question: str) -> None:
        self.one("textarea").send_keys(question, Keys.ENTER)
        self.wait()

    def tokens(self, answer: int = -1) -> list[dict[str, Any]]:
        """Each token of an answer as it is shown."""
        found: list[dict[str, Any]] = self.run(
            "return [...arguments[0].querySelectorAll('.t')].map((span) => ({"
            " text: span.textContent, number: span.dataset.n,"
            " tint: getComputedStyle(span).getPropertyValue('--tint'),"
            " share: span.style.getPropertyValue('--w')}))",
            self.all("article")[answer],
        )
        return found

    def save(self, folder: Path) -> Path:
        """Download the page; returns the file."""
        asked = {"behavior": "allow", "downloadPath": str(folder)}
        self.browser.execute_cdp_cmd("Browser.setDownloadBehavior", asked)
        self.one("#download").click()
        saved = folder / "tiny.html"
        WebDriverWait(self.browser, 20).until(lambda _: saved.exists())
        return saved

    def texts(self) -> list[str]:
        """The text of every answer on the page."""
        return ["".join(t["text"] for t in self.tokens(i)) for i in range(len(self.all("article")))]


@pytest.fixture
def page(browser: webdriver.Chrome, url: str) -> Page:
    return Page(browser, url)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


@pytest.mark.browser
def test_an_answer_has_the_colours_of_the_legend_and_each_token_its_layers(
    page: Page, chat
) -> None:
    page.ask("hello")
    expected = chat.answer([user("hello")], max_new_tokens=8).tokens
    shown = page.tokens()
    assert [one["text"] for one in shown] == [token.text for token in expected]
    legend = [
        (
            item.find_element(By.CSS_SELECTOR, ".name").text,
            item.find_element(By.CSS_SELECTOR, ".share").text,
            page.run("return getComputedStyle(arguments[0]).getPropertyValue('--tint')", item),
        )
        for item in page.all(".legend li")
    ]
    assert [name for name, *_ in legend] == list(chat.experts)
    for one, token in zip(shown, expected, strict=True):
        assert one["number"] == str(token.expert + 1)
        assert float(one["share"]) == pytest.approx(token.share, abs=1e-4)
        assert one["tint"] == legend[token.expert][2] != ""
    numbers = [sum(token.expert == e for token in expected) for e in range(len(legend))]
    assert [int(share) for _, share, _ in legend] == numbers

    ActionChains(page.browser).move_to_element(page.all("article .t")[2]).perform()
    tip = page.one(".tip").text
    assert json.dumps(expected[2].text, ensure_ascii=False) in tip
    for winner in expected[2].layers:
        assert chat.experts[winner.expert] in tip
    assert re.findall(r"layers? ([\d–]+)", tip) in (["0–1"], ["0", "1"])
    page.one("article .text").send_keys(Keys.ARROW_RIGHT)
    assert page.one(".tip").text.startswith(json.dumps(expected[0].text, ensure_ascii=False))
    page.one("article .text").send_keys(Keys.ESCAPE)
    assert not page.one(".tip").is_displayed()


@pytest.mark.browser
def test_fused_base_and_an_expert_answer_side_by_side_each_with_its_own_history(
    page: Page, chat
) -> None:
    def answer(*messages, expert="") -> str:
        return chat.answer(list(messages), expert=expert, max_new_tokens=8).text

    page.ask("hello")
    first = answer(user("hello"))
    page.one("[value='(base)']").click()
    page.one("select").send_keys("q_and_v")
    for question in ("and now?", "why?"):
        page.ask(question)
    assert [box.text for box in page.all("h3")] == ["fused", *["fused", "base", "q_and_v"] * 2]
    begun = [user("hello"), assistant(first), user("and now?")]
    experts = ("", "(base)", "q_and_v")
    second = [answer(*begun, expert=expert) for expert in experts]
    third = [
        answer(*begun, assistant(before), user("why?"), expert=expert)
        for expert, before in zip(experts, second, strict=True)
    ]
    assert page.texts() == [first, *second, *third]
    assert len(set(second)) == 3

    page.one("#reset").click()
    assert page.all("article") == []
    for box in ("[value='(base)']", "#one"):
        page.one(box).click()
    page.ask("hello")
    assert page.texts() == [first]


@pytest.mark.browser
def test_hostile_text_stays_text_in_the_page_and_in_a_saved_one(page: Page, chat, tmp_path) -> None:
    def answer(_messages, *, on_token, **_asked) -> Answer:
        tokens = (Token(HOSTILE, 0, 1.0), Token("\u2028\n\x1b", 1, 0.5))
        for token in tokens:
            on_token(token)
        return Answer("", tokens, truncated=False, num_new=2, num_prompt=1, num_cached=0)

    with patch.object(chat, "answer", answer):
        page.ask(HOSTILE)
    shown = page.tokens()
    assert shown[0]["text"] == HOSTILE
    assert page.one(".asked").text == HOSTILE
    assert page.all("img") == []
    with pytest.raises(JavascriptException, match="TrustedHTML"):
        page.run("document.body.innerHTML = '<b>'")

    offline = Page(page.browser, page.save(tmp_path).as_uri())
    assert offline.tokens() == shown
    assert not offline.one("form").is_displayed()
    assert offline.all("img") == []
    offline.all("article .t")[0].click()
    assert json.dumps(HOSTILE) in offline.one(".tip").text


@pytest.mark.browser
def test_what_is_refused_is_shown_and_the_conversation_goes_on_without_it(page: Page, chat) -> None:
    page.ask("x" * 600)
    assert "the model takes 512 with its answer" in page.one(".note.error").text
    page.one("textarea").send_keys("  ", Keys.ENTER)
    assert len(page.all("article")) == 1
    page.ask("hello")
    assert page.texts()[1] == chat.answer([user("hello")], max_new_tokens=8).text


@pytest.mark.browser
def test_an_answer_is_stopped_and_stays_in_the_history_as_far_as_it_went(page: Page, chat) -> None:
    def answer(_messages, *, on_token, **_asked) -> Answer:
        while True:  # until the client has left
            on_token(Token("on ", 0, 1.0))
            time.sleep(0.2)  # a page that draws slower than that never comes to the button

    with patch.object(chat, "answer", answer):
        page.one("textarea").send_keys("hello", Keys.ENTER)
        WebDriverWait(page.browser, 60).until(lambda _: len(page.all("article .t")) > 3)
        page.one("#stop").click()
        page.wait()
        assert page.one(".note").text == "cut here"
    begun = page.texts()[0]
    page.ask("and now?")
    messages = [user("hello"), assistant(begun), user("and now?")]
    assert page.texts()[1] == chat.answer(messages, max_new_tokens=8).text


@pytest.mark.browser
def test_on_a_phone_in_the_dark_nothing_is_wider_than_the_screen(page: Page) -> None:
    resize(page.browser, 390, 800, mobile=True)
    dark = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", dark)
    page.one("[value='(base)']").click()
    page.ask("y" * 300)
    assert page.run("return document.documentElement.scrollWidth") == 390
    paper = page.run("return getComputedStyle(document.body).backgroundColor")
    assert max(map(int, re.findall(r"\d+", paper))) < 60
    first, second = (box.rect for box in page.all("article"))
    assert second["y"] > first["y"] + first["height"]


@pytest.mark.browser
def test_a_long_name_of_an_expert_is_whole_among_the_layers_of_a_token(page: Page) -> None:
    page.run(
        "const span = document.querySelector('#turns').appendChild(document.createElement('span'));"
        "const layers = [{ from: 0, to: 0, expert: 'x'.repeat(100) }];"
        "span.token = { text: 'a', expert: 'x', share: 1, layers };"
        "show(span);"
    )
    wide, shown = page.run("return [tip.scrollWidth, tip.clientWidth]")
    assert wide <= shown


@pytest.mark.browser
def test_a_tab_that_is_loaded_again_still_has_its_conversation(page: Page) -> None:
    page.ask("5 6")
    before, legend = page.texts(), page.one(".legend").text
    page.browser.refresh()
    assert (page.texts(), page.one(".legend").text) == (before, legend)
    asked = page.run("return messagesFor('', state.turns, 'and')")
    assert [message["content"] for message in asked] == ["5 6", *before, "and"]
    waiting = {"question": "7", "answers": [{"expert": "", "tokens": [], "waits": True}]}
    page.run("state.turns.push(arguments[0]); keep()", waiting)
    page.browser.refresh()
    assert page.all(".note")[-1].text == "stopped"
    page.one("#reset").click()
    page.browser.refresh()
    assert page.texts() == []


@pytest.mark.browser
def test_a_tab_that_is_loaded_again_during_an_answer_has_what_came_of_it(
    page: Page, chat, tmp_path
) -> None:
    def answer(_messages, *, on_token, **_asked) -> Answer:
        while True:  # until the client has left
            on_token(Token("on ", 0, 1.0))
            time.sleep(0.1)

    with patch.object(chat, "answer", answer):
        page.one("[value='(base)']").click()
        page.one("textarea").send_keys("5 6", Keys.ENTER)
        WebDriverWait(page.browser, 20).until(lambda _: len(page.all("article .t")) > 3)
        assert [turn["question"] for turn in page.run("return kept()")] == ["5 6"]  # of a crash
        saved = page.save(tmp_path)
    for address in (page.browser.current_url, saved.as_uri()):
        page.browser.get(address)
        assert page.one("[type=submit]").is_displayed() == (address != saved.as_uri())
        assert page.one(".asked").text == "5 6"
        assert page.texts()[0].startswith("on on on on ")
        assert str(len(page.tokens(0))) in page.one(".legend").text
        assert [note.text for note in page.all(".note")] == ["cut here", "stopped"]


@pytest.mark.browser
def test_a_tab_keeps_a_token_of_many_layers_in_few_characters(page: Page, chat) -> None:
    layers = tuple(LayerWinner(layer, 1, 0.5) for layer in range(100))
    token = Token("on", 1, 0.5, layers)

    def answer(_messages, *, on_token, **_asked) -> Answer:
        on_token(token)
        return Answer("on", (token,), truncated=False, num_new=2, num_prompt=1, num_cached=0)

    with patch.object(chat, "answer", answer):
        page.ask("hello")
    assert page.run("return sessionStorage.getItem(KEY).length") < 300
    page.all("article .t")[0].click()
    assert "layers 0–99" in page.one(".tip").text


@pytest.mark.browser
def test_arrow_keys_bring_a_token_into_sight(page: Page) -> None:
    tokens = [{"text": f"{i}\n", "expert": "q_and_v", "share": 1, "layers": []} for i in range(99)]
    answers = [{"expert": "", "tokens": tokens, "waits": False, "cut": False, "error": ""}]
    page.run("state.turns.push(arguments[0]); keep()", {"question": "7", "answers": answers})
    page.browser.refresh()
    page.run("scrollTo(0, 0)")
    page.one("article .text").send_keys(*[Keys.ARROW_RIGHT] * 90)
    top, floor = page.run("return [at, dock].map((one) => one.getBoundingClientRect().top)")
    assert 0 < top < floor
    assert page.one(".tip").text.startswith(json.dumps("89\n"))


@pytest.mark.browser
def test_an_expert_with_two_spaces_in_its_name_answers_alone(browser, chat, monkeypatch) -> None:
    monkeypatch.setattr(chat, "experts", ("a  b", *chat.experts[1:]))
    answer = Answer("", (), truncated=False, num_new=1, num_prompt=1, num_cached=0)
    asked = Mock(return_value=answer)
    monkeypatch.setattr(chat, "answer", asked)
    with serving(chat, page_of(chat, "a  b")) as address:
        Page(browser, f"{address}/").ask("hello")
    assert asked.call_args.kwargs["expert"] == "a  b"


@pytest.mark.browser
def test_an_answer_without_text_says_so(page: Page, chat) -> None:
    silent = Answer("", (), truncated=False, num_new=1, num_prompt=1, num_cached=0)
    with patch.object(chat, "answer", return_value=silent):
        page.ask("hello")
    assert page.one(".note").text == "no text"


@pytest.mark.browser
def test_text_from_right_to_left_ends_on_the_left(page: Page) -> None:
    page.ask("\u05e9\u05dc\u05d5\u05dd?")
    first, last = page.run(
        "const text = document.querySelector('.asked').firstChild;"
        "return [0, text.length - 1].map((at) => {"
        " const one = new Range(); one.setStart(text, at); one.setEnd(text, at + 1);"
        " return one.getBoundingClientRect().x; })"
    )
    assert last < first


@pytest.mark.browser
def test_a_page_of_another_site_reads_nothing_and_asks_nothing(
    browser: webdriver.Chrome, url: str, chat
) -> None:
    asked = """
        const [url, body, done] = arguments, method = "POST", mode = "no-cors";
        const headers = {"content-type": "application/json"};
        Promise.allSettled([
            fetch(url),
            fetch(url + "v1/models"),
            fetch(url + "v1/chat/completions", {method, body, headers}),
            fetch(url + "v1/chat/completions", {method, body: new Blob([body]), mode}),
        ]).then((all) => done(all.map((one) => one.value?.type ?? "refused")));
    """
    body = json.dumps({"model": "tiny", "messages": [user("hello")]})
    with serving(chat) as other, patch.object(chat, "answer") as answer:
        browser.get(f"{other}/v1/models")
        found = browser.execute_async_script(asked, url, body)
    assert found == ["refused", "refused", "refused", "opaque"]
    answer.assert_not_called()


@pytest.mark.browser
def test_a_server_that_is_gone_is_a_sentence(browser: webdriver.Chrome, chat) -> None:
    with serving(chat, page_of(chat, "q_and_v")) as address:
        page = Page(browser, f"{address}/")
        page.ask("hello")
        assert page.one("h3").text == "q_and_v"
    page.ask("hello?")
    assert page.all(".note.error")[-1].text == "the server does not answer"


@pytest.mark.browser
@pytest.mark.parametrize(
    ("status", "body", "sentence"),
    [
        (502, "<h1>Bad Gateway</h1>", "a proxy or another server answered (status 502)"),
        (200, "<h1>Log in</h1>\n\n<form>", "a proxy or another server answered (status 200)"),
        (429, '{"error": "slow"}', "a proxy or another server answered (status 429)"),
        (403, '{"error": {"message": "not you"}}', "not you"),
    ],
)
def test_a_proxy_that_answers_in_the_server_s_place_is_a_sentence(
    page: Page, status: int, body: str, sentence: str
) -> None:
    answer = "const [body, status] = arguments; fetch = async () => new Response(body, { status })"
    page.run(answer, body, status)
    page.ask("hello")
    assert page.one(".note.error").text == sentence


@pytest.mark.browser
@pytest.mark.parametrize(("width", "height"), [(360, 640), (320, 200)], ids=["phone", "enlarged"])
def test_an_answer_is_in_sight_whatever_the_screen_s_size(
    page: Page, width: int, height: int
) -> None:
    resize(page.browser, width, height, mobile=True)
    for question in ("5 6", "6 7", "7 8"):
        page.ask(question)
    token, top = page.run(
        "const last = [...document.querySelectorAll('article .t')].at(-1).getBoundingClientRect();"
        "return [last.toJSON(), dock.getBoundingClientRect().top]"
    )
    assert 0 <= token["top"] < token["bottom"] <= min(top, height)


@pytest.mark.browser
@pytest.mark.parametrize(("width", "height"), [(320, 480), (640, 320)], ids=["phone", "turned"])
def test_the_layers_of_a_token_are_whole_on_a_small_screen(
    page: Page, width: int, height: int
) -> None:
    resize(page.browser, width, height, mobile=True)
    names = page.run("return state.experts")
    layers = [{"from": i, "to": i, "expert": names[i % len(names)]} for i in range(32)]
    token = {"text": "5\n", "expert": names[0], "share": 1, "layers": layers}
    answers = [{"expert": "", "tokens": [token] * 40, "waits": False, "cut": False, "error": ""}]
    page.run("state.turns.push(arguments[0]); keep()", {"question": "7", "answers": answers})
    page.browser.refresh()
    for place in range(0, 40, 5):
        box, room = page.run(
            "const span = document.querySelectorAll('article .t')[arguments[0]];"
            "span.scrollIntoView({ block: 'nearest' }); show(span);"
            "return [tip.getBoundingClientRect().toJSON(), tip.clientHeight - tip.scrollHeight]",
            place,
        )
        assert 0 <= box["top"] < box["bottom"] <= height
        assert 0 <= box["left"] < box["right"] <= width
        assert room >= 0
    shown = page.one(".tip").text
    assert [shown.count(name) for name in names[1:]] == [1] * (len(names) - 1)
    assert f"layers 1, {1 + len(names)}, " in shown


@pytest.mark.browser
def test_who_sends_by_the_button_can_type_on(page: Page) -> None:
    page.one("textarea").send_keys("5 6")
    page.one("[type=submit]").click()
    page.wait()
    ActionChains(page.browser).send_keys("and", Keys.ENTER).perform()
    page.wait()
    assert [box.text for box in page.all(".asked")] == ["5 6", "and"]


@pytest.mark.browser
def test_the_enter_that_ends_a_composition_sends_nothing(page: Page) -> None:
    page.one("textarea").send_keys("5 6")
    page.run(
        "const asked = { key: 'Enter', keyCode: arguments[0], cancelable: true };"
        "field.dispatchEvent(new KeyboardEvent('keydown', asked))",
        229,
    )
    assert page.all(".asked") == []
