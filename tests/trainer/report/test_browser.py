"""report.html in headless Chromium, driven through the DevTools protocol over a pipe.

This needs no package, only the browser.
"""

import fcntl
import itertools
import json
import os
import select
import shutil
import subprocess
import time

import pytest
from advised import made_up

from pipeline.store import write_json
from trainer.report.advice_page import advice_html
from trainer.report.page import write_report

BROWSER = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-pipe",
]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="no Chromium here: apt-get install chromium"),
]


class Chromium:
    """One page of a browser of its own.

    It reads NUL-terminated JSON from file descriptor 3 and writes it to 4.
    """

    def __init__(self, profile):
        theirs_in, self.ours_out = os.pipe()
        self.ours_in, theirs_out = os.pipe()
        # Away from 3 and 4, where the child's ends go.
        theirs_in, theirs_out = (
            fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (theirs_in, theirs_out)
        )

        def give():
            os.dup2(theirs_in, 3)
            os.dup2(theirs_out, 4)

        self.process = subprocess.Popen(
            [BROWSER, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
            preexec_fn=give,
            pass_fds=(3, 4),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self.numbers, self.events, self.rest, self.session = itertools.count(1), [], b"", None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)[
            "sessionId"
        ]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method, **parameters):
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.ours_out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.read()
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]

    def read(self, timeout=60):
        until = time.monotonic() + timeout
        while b"\0" not in self.rest:
            ready, _, _ = select.select([self.ours_in], [], [], max(until - time.monotonic(), 0))
            assert ready, f"Chromium said nothing for {timeout} s"
            part = os.read(self.ours_in, 1 << 16)
            assert part, "Chromium ended"
            self.rest += part
        line, self.rest = self.rest.split(b"\0", 1)
        message = json.loads(line)
        if "method" in message:
            self.events.append(message)
        return message

    def open(self, url, width, height, dark=False):
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=2,
            mobile=width < 500,
        )
        scheme = "dark" if dark else "light"
        self.call(
            "Emulation.setEmulatedMedia",
            features=[{"name": "prefers-color-scheme", "value": scheme}],
        )
        self.events.clear()
        self.call("Page.navigate", url=url)
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.read()

    def evaluate(self, expression):
        answer = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, answer
        return answer["result"]["value"]

    def named(self, *methods):
        return [event["params"] for event in self.events if event["method"] in methods]

    def close(self):
        os.close(self.ours_out)
        os.close(self.ours_in)
        self.process.terminate()
        self.process.wait(30)


@pytest.fixture
def browser(tmp_path):
    chromium = Chromium(tmp_path / "profile")
    yield chromium
    chromium.close()


SIZES = pytest.mark.parametrize(
    "width, height, dark", [(390, 844, False), (1280, 900, True), (1920, 1080, False)]
)


def loaded_page(browser):
    """What a page has become once its pictures are there."""
    return browser.evaluate("""(async () => {
        const images = [...document.images];
        await Promise.all(images.map(image => image.decode().catch(() => {})));
        return {
            images: images.length, broken: images.filter(image => !image.naturalWidth).length,
            scripts: document.scripts.length,
            overflow: document.documentElement.scrollWidth - innerWidth,
            cut: [...document.querySelectorAll("main *, header *")].filter(element => {
                const box = element.getBoundingClientRect();
                return box.width && box.right > innerWidth + 1
                    && !element.closest(".scroll, svg, .phrase");
            }).map(element => element.textContent.slice(0, 40)).slice(0, 3),
            silent: [...document.querySelectorAll(".scroll")].filter(
                frame => frame.scrollWidth > frame.clientWidth + 1
                    && getComputedStyle(frame, "::before").content === "none").length,
            narrow: [...document.querySelectorAll("tbody th")].filter(head => {
                const box = head.getBoundingClientRect();
                return box.width && box.width < 60 && head.innerText.trim().length > 8;
            }).map(head => head.innerText),
            first: document.querySelector("h1").innerText.trim().split("\\n")[0],
            smallest: Math.min(...[...document.querySelectorAll("svg.plot text")].map(
                text => text.getBoundingClientRect().height)),
        };
    })()""")


def check_quiet(browser, file):
    """No error, no warning, and no request but for the file itself."""
    shown = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Page.javascriptDialogOpening")
    assert browser.named(*shown) == []
    levels = {message["entry"]["level"] for message in browser.named("Log.entryAdded")}
    assert not levels & {"error", "warning"}
    requests = browser.named("Network.requestWillBeSent")
    urls = {event["request"]["url"] for event in requests}
    assert {url.split(":")[0] for url in urls} <= {"file", "data"}
    assert {url for url in urls if url.startswith("file")} == {file.as_uri()}


def check_readable(loaded, scripts):
    assert loaded["scripts"] == scripts
    assert loaded["cut"] == [], "cut off at the right"
    assert loaded["narrow"] == [], "names are broken into their letters"
    assert loaded["overflow"] <= 0, "the page scrolls sideways"
    assert loaded["smallest"] >= 7, "text in a plot is too small to read"


@SIZES
@pytest.mark.parametrize("advised", [False, True])
def test_report_opens_without_error_request_or_missing_picture(
    glyphs, tmp_path, browser, width, height, dark, advised
):
    run, images = glyphs
    if advised:
        write_json(run.root / "advice.json", made_up())
    write_report(run, tmp_path, images)
    browser.open((tmp_path / "report.html").as_uri(), width, height, dark)
    loaded = loaded_page(browser)
    check_readable(loaded, scripts=1)
    assert loaded["silent"] == 0, "a table scrolls and does not say so"
    assert loaded["images"] > 80 and loaded["broken"] == 0
    assert "beats the ensemble" in loaded["first"] or loaded["first"].startswith(
        "The ensemble makes"
    )
    check_quiet(browser, tmp_path / "report.html")


@SIZES
def test_the_page_of_an_advice_opens_without_error_or_request(
    tmp_path, browser, width, height, dark
):
    advice = made_up()
    (tmp_path / "advice.html").write_text(advice_html(advice), encoding="utf-8")
    browser.open((tmp_path / "advice.html").as_uri(), width, height, dark)
    loaded = loaded_page(browser)
    check_readable(loaded, scripts=0)
    assert loaded["first"].replace("\u2060", "") == advice["sentence"]
    check_quiet(browser, tmp_path / "advice.html")


COLUMN = """(() => {
    const table = document.querySelector("#classes table");
    const head = table.tHead.rows[0].cells[%d];
    head.click();
    return [head.getAttribute("aria-sort"),
            [...table.tBodies[0].rows].map(row => row.cells[%d].textContent.trim())];
})()"""


def test_a_click_on_a_head_sorts_by_size_and_a_second_one_turns_it_round(
    hand_worked, tmp_path, browser
):
    write_report(hand_worked, tmp_path)
    browser.open((tmp_path / "report.html").as_uri(), 1280, 900)
    way, texts = browser.evaluate(COLUMN % (3, 3))
    assert way == "ascending" and [int(text) for text in texts] == [0, 1, 1, 1, 2, 2]
    way, texts = browser.evaluate(COLUMN % (3, 3))
    assert way == "descending" and [int(text) for text in texts] == [2, 2, 1, 1, 1, 0]
    check_quiet(browser, tmp_path / "report.html")


def test_what_is_printed_is_light_and_nothing_in_it_scrolls(glyphs, tmp_path, browser):
    run, images = glyphs
    write_report(run, tmp_path, images)
    browser.open((tmp_path / "report.html").as_uri(), 1000, 900, dark=True)
    dark = [{"name": "prefers-color-scheme", "value": "dark"}]
    browser.call("Emulation.setEmulatedMedia", media="print", features=dark)
    printed = browser.evaluate("""({
        page: getComputedStyle(document.body).backgroundColor,
        nav: getComputedStyle(document.querySelector("nav")).display,
        frames: [...document.querySelectorAll(".scroll")].map(
            frame => getComputedStyle(frame).overflowX + getComputedStyle(frame).maxHeight),
    })""")
    assert printed["page"] == "rgb(255, 255, 255)" and printed["nav"] == "none"
    assert set(printed["frames"]) == {"visiblenone"}
