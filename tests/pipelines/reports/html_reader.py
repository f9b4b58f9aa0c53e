"""HTML as a browser's parser sees it, and as a browser shows it."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from selenium import webdriver


class Elements(HTMLParser):
    """Every start tag with its attributes, and the text below each kind of element."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        """The innermost open element, and a text in it."""
        self._open: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        self.texts.append((self._open[-1] if self._open else "", data))

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.found)

    def requests(self) -> list[str]:
        """Whatever a browser would fetch by itself: all but links and what lies in the page."""
        return [
            f"{tag} {name}={value}"
            for tag, attributes in self.found
            for name, value in attributes.items()
            if name in {"src", "srcset", "data", "poster", "background", "action", "xlink:href"}
            or (name == "href" and tag != "a")
            if not (value or "").startswith(("#", "data:"))
        ]

    def handlers(self) -> list[str]:
        """Scripts in attributes: there is never a reason for one."""
        return [
            name for _, attributes in self.found for name in attributes if name.startswith("on")
        ]

    def json(self) -> list[Any]:
        """The data that the page carries."""
        return [
            json.loads(text)
            for tag, text in self.texts
            if tag == "script" and text.lstrip().startswith("{")
        ]


def open_page(browser: webdriver.Chrome, folder: Path, html: str) -> None:
    """Show a page, from a file in a folder."""
    page = folder / "page.html"
    page.write_text(html, encoding="utf-8")
    browser.get(page.as_uri())


def resize(browser: webdriver.Chrome, width: int, height: int, *, mobile: bool = False) -> None:
    """Show the page on a screen of this size, in CSS pixels."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": mobile}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def drawings_at(browser: webdriver.Chrome, page: Path, width: int) -> list[str]:
    """The kind of every drawing that is seen on a screen of this width, which the page fits."""
    resize(browser, width, 900, mobile=width < 500)
    browser.get(page.as_uri())
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert browser.get_log("browser") == []
    found: list[str] = browser.execute_script(
        "return [...document.querySelectorAll('svg')].filter((svg) => svg.clientWidth)"
        ".map((svg) => svg.classList[0])"
    )
    return found


def least_contrast(browser: webdriver.Chrome) -> tuple[float, str]:
    """The least contrast of a text on the open page, as WCAG defines it, and where it is."""
    found = browser.execute_script("""
        const pen = new OffscreenCanvas(1, 1).getContext("2d"), found = [];
        const luminance = (colours) => {
            pen.fillStyle = "white";
            pen.fillRect(0, 0, 1, 1);
            for (const [colour, opacity] of colours) {
                [pen.fillStyle, pen.globalAlpha] = [colour, opacity];
                pen.fillRect(0, 0, 1, 1);
            }
            const parts = [...pen.getImageData(0, 0, 1, 1).data].map((part) => part / 255);
            const [r, g, b] = parts.map((x) => (x > 0.04 ? ((x + 0.055) / 1.055) ** 2.4 : x / 13));
            return 0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05;
        };
        for (const one of document.querySelectorAll("body :not(svg *, script, option)")) {
            if (!one.checkVisibility() || !one.matches(":has(> *), .t, [placeholder]") &&
                !one.textContent.trim()) continue;
            const under = [];
            let opacity = 1;
            for (let box = one; box; box = box.parentElement) {
                under.unshift([getComputedStyle(box).backgroundColor, 1]);
                opacity *= getComputedStyle(box).opacity;
            }
            const below = luminance(under);
            for (const part of [null, "::before", "::placeholder"]) {
                const { color } = getComputedStyle(one, part);
                const text = luminance([...under, [color, opacity]]);
                const contrast = Math.max(text, below) / Math.min(text, below);
                found.push([contrast, [one.tagName, one.className, part ?? ""].join(" ")]);
            }
        }
        return found;
    """)
    return min((contrast, where) for contrast, where in found)
