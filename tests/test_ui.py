"""The page in a real browser: what a person does, and what must not happen."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from scripted_model import tokens_of
from web_server import END, ScriptedScheduler, service_of, serving

from nanochat.serving.guard import Access
from nanochat.serving.service import Service

sync_api = pytest.importorskip("playwright.sync_api")
expect = sync_api.expect

CHROMIUM = Path("/usr/bin/chromium")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM.exists(), reason="no /usr/bin/chromium; apt install chromium"),
]

LAST = "article.assistant:last-of-type"
EVIL = "<img src=x onerror=\"document.title='taken'\"><script>document.title='taken'</script>"
CODE = 'def f(x):\n    return x < 2 and "<b>"'
MARKDOWN = (
    f"# Title\nSome **bold** and `x<y`.\n\n- one\n- two\n\n```python\n{CODE}\n```\nEnd.\n\n#### 37"
)
CODE_FIRST = "Here:\n\n```python\nprint(1)\n```\nSome "
OUTPUT = ("<|output_start|>", "42", "<|output_end|>")
SCRIPT: dict[str, list[str]] = {
    "evil": [EVIL],
    "markdown": [MARKDOWN],
    "multiply": ["It is ", "<|python_start|>", "6*7", "<|python_end|>", *OUTPUT, "."],
    "smile": ["\U0001f642 gr\u00fc\u00df dich \U0001f680"],
    "nothing": [],
    "long": ["word " * 200],
    "code first": [CODE_FIRST, "word " * 40],
    "wide": ["a" * 300 + "\n\n```\n" + "b" * 300 + "\n```"],
}


class Answers:
    """The script: by a word of the last question, else counting up."""

    def __init__(self) -> None:
        self.count = 0
        self._numbers: dict[str, int] = {}

    def __call__(self, prompt: str) -> Sequence[int]:
        question = prompt.rsplit("<|user_start|>", 1)[1]
        for word, parts in SCRIPT.items():
            if word in question:
                return tokens_of(*parts, END)
        return tokens_of("Hello, I am number ", str(self.count), ".", END)


class Pace:
    """Lets the engine run, until it is told to hold after so many steps."""

    def __init__(self) -> None:
        self._may_run = threading.Event()
        self._may_run.set()
        self._left: int | None = None

    def __call__(self) -> None:
        if self._left is not None:
            if self._left == 0:
                self._may_run.clear()
            self._left -= 1
        assert self._may_run.wait(30)

    def hold_after(self, steps: int) -> None:
        self._left = steps

    def go_on(self, steps: int | None = None) -> None:
        """Go on, to hold again after so many steps."""
        self._left = steps
        self._may_run.set()


class Site:
    """A server with an engine at a pace of the test's."""

    def __init__(self) -> None:
        self.answers, self.pace = Answers(), Pace()
        self.service: Service = service_of(
            lambda: ScriptedScheduler(self.answers, pace=self.pace), max_rows=1, max_waiting=1
        )
        self.address = ""

    @property
    def num_open(self) -> int:
        return self.service.pool.workers[0].num_open


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    site = Site()
    with serving(site.service) as address:
        site.address = address
        yield site


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=str(CHROMIUM),
            args=["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-dev-shm-usage"],
        )
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Any, site: Site) -> Iterator[Callable[..., Any]]:
    """Opens the page in a profile of its own; no test may leave an error in the console."""
    contexts, troubles = [], []

    def open_it(address: str = "", *, init: str = "", **options: Any) -> Any:
        context = browser.new_context(**options)
        context.set_default_timeout(15_000)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: troubles.append(str(error)))
        if init:
            page.add_init_script(init)
        page.goto(address or site.address)
        return page

    yield open_it
    site.pace.go_on()
    for context in contexts:
        context.close()
    assert troubles == []


def start_asking(page: Any, text: str) -> None:
    page.fill("#text", text)
    page.press("#text", "Enter")


def ask(page: Any, text: str) -> Any:
    """Ask, wait for the whole answer, return its text's place."""
    start_asking(page, text)
    expect(page.locator("article.user").last).to_contain_text(text.split("\n")[0])
    expect(page.locator(LAST)).to_have_attribute("aria-busy", "false")
    return page.locator(f"{LAST} .said")


def delete(page: Any, title: str) -> None:
    page.locator("#chats li", has_text=title).hover()
    page.get_by_role("button", name=f"Delete {title}").click()


# ---- answers -----------------------------------------------------------------------------------


def test_a_question_is_answered_and_nothing_is_fetched_from_elsewhere(
    site: Site, open_page: Callable[..., Any]
) -> None:
    page = open_page()
    hosts = set()
    page.on("request", lambda request: hosts.add(request.url.split("/")[2]))
    expect(page.locator("#model-name")).to_have_text("nanochat d1")
    expect(page.locator("#model-stage")).to_have_text("sft")
    page.reload()
    expect(ask(page, "Who are you?")).to_have_text("Hello, I am number 0.")
    expect(page.locator(f"{LAST} .facts")).to_contain_text("tokens/s")
    expect(page.locator(f"{LAST} .facts")).to_contain_text("21 tokens")
    expect(page.locator("#chats li.current")).to_contain_text("Who are you?")
    expect(page.locator("#announce")).to_contain_text("nanochat answered: Hello")
    assert hosts == {site.address.removeprefix("http://")}


def test_html_and_script_in_an_answer_stay_text(open_page: Callable[..., Any]) -> None:
    page = open_page()
    expect(ask(page, f"evil {EVIL}")).to_have_text(EVIL)
    assert page.locator("#messages img, #messages script, #chats img").count() == 0
    page.click("#tab-inside")
    expect(page.locator("#prompt-tokens")).to_contain_text("onerror")
    page.reload()
    expect(page.locator(f"{LAST} .said")).to_have_text(EVIL)
    assert page.locator("main img:visible, main script").count() == 0
    assert "taken" not in page.title()


def test_a_little_markdown_and_code_that_can_be_copied(open_page: Callable[..., Any]) -> None:
    page = open_page(permissions=["clipboard-read", "clipboard-write"])
    said = ask(page, "markdown")
    expect(said.locator(".heading")).to_have_text("Title")
    expect(said.locator("strong")).to_have_text("bold")
    expect(said.locator("p code")).to_have_text("x<y")
    expect(said.locator("li")).to_have_text(["one", "two"])
    expect(said.locator("pre")).to_have_text(CODE)
    said.get_by_role("button", name="Copy the code").click()
    expect(said.locator(".bar use")).to_have_attribute("href", "#i-done")
    assert page.evaluate("navigator.clipboard.readText()") == CODE
    page.locator(LAST).get_by_role("button", name="Copy the answer").click()
    expect(page.locator(f"{LAST} > .tools use").first).to_have_attribute("href", "#i-done")
    assert page.evaluate("navigator.clipboard.readText()") == MARKDOWN


def test_the_answer_line_of_a_sum_is_no_heading(open_page: Callable[..., Any]) -> None:
    said = ask(open_page(), "markdown")
    expect(said).to_contain_text("#### 37")
    expect(said.locator(".heading")).to_have_count(1)


@pytest.mark.parametrize("box", ["#text", "#try"])
def test_pasted_text_that_is_cut_is_not_cut_silently(
    open_page: Callable[..., Any], box: str
) -> None:
    page = open_page(permissions=["clipboard-read", "clipboard-write"])
    if box == "#try":
        page.click("#tab-inside")
    for length in (8000, 9234):
        page.evaluate("(n) => navigator.clipboard.writeText('a'.repeat(n))", length)
        page.fill(box, "")
        page.focus(box)
        expect(page.locator("#toast")).to_be_hidden()
        page.keyboard.press("Control+V")
        assert len(page.input_value(box)) == 8000
    expect(page.locator("#toast")).to_have_text(
        "At most 8,000 characters fit here: the last 1,234 were left out."
    )


def test_a_call_is_shown_as_expression_and_result_and_sent_back_in_parts(
    open_page: Callable[..., Any],
) -> None:
    page = open_page()
    said = ask(page, "multiply")
    expect(said).to_have_text("It is 6*7=42.")
    expect(said.locator(".call")).to_have_attribute("aria-label", "calculator: 6*7 equals 42")
    with page.expect_request("**/chat/completions") as sent:
        ask(page, "and now?")
    history = sent.value.post_data_json["messages"]
    assert [part["type"] for part in history[1]["content"]] == [
        "text",
        "python",
        "python_output",
        "text",
    ]


def test_a_question_that_begins_like_a_command_is_not_lost(open_page: Callable[..., Any]) -> None:
    page = open_page()
    start_asking(page, "/etc/passwd? long")
    expect(page.locator(".notice")).to_contain_text("There is no command /etc/passwd?")
    expect(page.locator("#text")).to_have_value("/etc/passwd? long")
    ask_from = page.locator("article.user .said")
    expect(ask_from).to_have_count(0)
    start_asking(page, " /etc/passwd? smile")
    expect(ask_from).to_have_text("/etc/passwd? smile")


@pytest.mark.parametrize(
    ("label", "name", "number", "off", "range_"),
    [
        ("Top-p", "top_p", "0.5", 1, "number from 0.01 to 1"),
        ("Top-k", "top_k", "7", "off", "whole number from 1 to 200"),
    ],
)
def test_off_is_a_value_of_top_p_and_top_k(
    open_page: Callable[..., Any], label: str, name: str, number: str, off: Any, range_: str
) -> None:
    page = open_page()
    command = "/" + name.replace("_", "")
    for value, told in ((number, number), ("off", "off"), (number, number), ("OFF", "off")):
        start_asking(page, f"{command} {value}")
        expect(page.locator(".notice").last).to_have_text(f"{label} is now {told}.")
    start_asking(page, f"{command} ")
    expect(page.locator(".notice").last).to_have_text(f"{label} is off.")
    with page.expect_response("**/chat/completions") as answered:
        ask(page, "Who?")
    assert answered.value.status == 200
    assert answered.value.request.post_data_json[name] == off
    start_asking(page, f"{command} never")
    expect(page.locator(".notice").last).to_have_text(f"{label} must be a {range_}, or off.")
    start_asking(page, "/help ")
    expect(page.locator(".notice").last).to_contain_text(f"{command} [")
    page.click("#open-settings")
    expect(page.locator(f"#out-{name.replace('_', '-')}")).to_have_text("off")


def test_top_k_is_switched_off_at_the_end_of_its_dial(open_page: Callable[..., Any]) -> None:
    page = open_page()
    page.click("#open-settings")
    for value, told, sent_as in (("0", "off", "off"), ("3", "3", 3)):
        page.locator("#set-top-k").fill(value)
        expect(page.locator("#out-top-k")).to_have_text(told)
        assert page.evaluate("requestBody([]).top_k") == sent_as


def test_two_windows_keep_each_others_settings(open_page: Callable[..., Any]) -> None:
    page = open_page()
    twin = open_twin(page)
    start_asking(page, "/temperature 0.3")
    start_asking(twin, "/topk 9")
    start_asking(page, "/theme dark")
    twin.reload()
    page.reload()
    for each in (page, twin):
        body = each.evaluate("requestBody([])")
        assert (body["temperature"], body["top_k"]) == (0.3, 9)
        expect(each.locator("html")).to_have_attribute("data-theme", "dark")


# Gives the stream of an answer to the page byte by byte.
BYTES = """
const fetched = window.fetch;
window.fetch = async (path, options) => {
  const response = await fetched(path, options);
  if (path !== "/chat/completions") return response;
  const escaped = /\\\\u[0-9a-f]{4}/g;
  const text = (await response.text()).replace(escaped, (code) => JSON.parse(`"${code}"`));
  const bytes = new TextEncoder().encode(text);
  return new Response(new ReadableStream({
    async start(controller) {
      for (const byte of bytes) {
        controller.enqueue(new Uint8Array([byte]));
        await null;
      }
      controller.close();
    },
  }));
};
"""


def test_characters_and_events_may_be_cut_anywhere_by_the_network(
    open_page: Callable[..., Any],
) -> None:
    said = ask(open_page(init=BYTES), "smile")
    expect(said).to_have_text("\U0001f642 gr\u00fc\u00df dich \U0001f680")


def test_an_empty_answer_is_explained(open_page: Callable[..., Any]) -> None:
    page = open_page()
    expect(ask(page, "nothing")).to_contain_text("without a word")
    expect(ask(page, "And now?")).to_contain_text("Hello")


# ---- stopping, again, otherwise ----------------------------------------------------------------


def test_an_answer_is_stopped_and_written_again(site: Site, open_page: Callable[..., Any]) -> None:
    page = open_page()
    site.pace.hold_after(12)
    start_asking(page, "long")
    expect(page.locator(f"{LAST} .said")).to_contain_text("word word")
    expect(page.locator("#send")).to_have_attribute("aria-label", "Stop")
    page.keyboard.press("Escape")
    expect(page.locator(LAST)).to_contain_text("You stopped this answer.")
    site.pace.go_on()
    expect(page.locator("#send")).to_have_attribute("aria-label", "Send")
    site.answers.count = 7
    ask(page, "Who?")
    site.answers.count = 8
    page.get_by_role("button", name="Write another answer").click()
    expect(page.locator(f"{LAST} .said")).to_have_text("Hello, I am number 8.")
    assert page.locator("article").count() == 4


def test_a_question_is_edited_and_the_rest_begins_anew(
    site: Site, open_page: Callable[..., Any]
) -> None:
    page = open_page()
    for text in ("first", "second"):
        ask(page, text)
    page.locator("article.user").first.hover()
    page.get_by_role("button", name="Edit and ask again from here").first.click()
    page.get_by_label("Edit the question").fill("smile instead")
    page.get_by_role("button", name="Ask again", exact=True).click()
    expect(page.locator(f"{LAST} .said")).to_contain_text("dich")
    assert page.locator("article").count() == 2
    # The arrow key edits the last question; Escape leaves it as it was.
    page.press("#text", "ArrowUp")
    expect(page.get_by_label("Edit the question")).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.locator("article.user .said")).to_have_text("smile instead")


def edit_first(page: Any, text: str) -> None:
    page.locator("article.user").first.hover()
    page.get_by_role("button", name="Edit and ask again from here").first.click()
    page.get_by_label("Edit the question").fill(text)
    page.keyboard.press("Enter")
    expect(page.locator("#text")).to_be_focused()
    expect(page.locator("article.user .said")).to_have_text([text])
    expect(page.locator(LAST)).to_have_attribute("aria-busy", "false")


def test_a_title_follows_the_first_question_until_it_is_given(
    open_page: Callable[..., Any],
) -> None:
    page = open_page()
    ask(page, "first")
    titles = page.locator("#chats .open")
    expect(titles).to_have_text(["first"])
    edit_first(page, "another")
    expect(titles).to_have_text(["another"])
    page.locator("#chats li").hover()
    page.get_by_role("button", name="Rename another").click()
    page.get_by_label("New title").fill("mine")
    page.keyboard.press("Enter")
    edit_first(page, "a third")
    expect(titles).to_have_text(["mine"])


def test_the_keyboard_is_not_lost_with_the_answer_that_is_written_again(
    open_page: Callable[..., Any],
) -> None:
    page = open_page()
    ask(page, "Who?")
    page.get_by_role("button", name="Write another answer").press("Enter")
    expect(page.locator("#text")).to_be_focused()
    expect(page.locator(LAST)).to_have_attribute("aria-busy", "false")
    expect(page.locator("#text")).to_be_focused()


def test_a_reload_in_the_middle_keeps_what_was_written_and_frees_the_slot(
    site: Site, open_page: Callable[..., Any]
) -> None:
    page = open_page()
    site.pace.hold_after(30)
    start_asking(page, "long")
    expect(page.locator(f"{LAST} .said")).to_contain_text("word word")
    page.reload()
    expect(page.locator(f"{LAST} .said")).to_contain_text("word word")
    expect(page.locator(LAST)).to_contain_text("The page was left before")
    site.pace.go_on()
    page.wait_for_function("fetch('/stats').then(r => r.json()).then(s => s.busy_workers === 0)")
    assert site.num_open == 0
    page.get_by_role("button", name="Write another answer").click()
    expect(page.locator(LAST)).to_have_attribute("aria-busy", "false")
    assert page.locator(f"{LAST} .said").inner_text().count("word") > 100  # 512 tokens


def test_what_is_written_already_keeps_focus_and_selection(
    site: Site, open_page: Callable[..., Any]
) -> None:
    page = open_page()
    site.pace.hold_after(len(tokens_of(CODE_FIRST)) + 6)
    start_asking(page, "code first")
    said = page.locator(f"{LAST} .said")
    expect(said).to_contain_text("Some word")
    selected = "getSelection().toString()"
    said.get_by_role("button", name="Copy the code").focus()
    said.locator("p").first.evaluate("(node) => getSelection().selectAllChildren(node)")
    site.pace.go_on(20)
    expect(said).to_contain_text("Some word word word")
    expect(said.get_by_role("button", name="Copy the code")).to_be_focused()
    assert page.evaluate(selected) == "Here:"
    # The same in the paragraph that grows, until the answer is finished.
    grows = said.locator("p").last
    grows.evaluate(
        "(node) => getSelection().setBaseAndExtent(node.firstChild, 0, node.firstChild, 9)"
    )
    site.pace.go_on()
    expect(page.locator(LAST)).to_have_attribute("aria-busy", "false")
    expect(page.locator(f"{LAST} > .tools")).to_contain_text("first after")
    assert page.evaluate(selected) == "Some word"
    expect(said.get_by_role("button", name="Copy the code")).to_be_focused()


# ---- conversations -----------------------------------------------------------------------------


def test_conversations_are_kept_renamed_deleted_and_brought_back(
    open_page: Callable[..., Any],
) -> None:
    page = open_page()
    ask(page, "first talk")
    page.keyboard.press("Control+Shift+O")
    ask(page, "second talk")
    rows = page.locator("#chats li")
    expect(rows).to_have_count(2)
    page.reload()
    expect(page.locator("article.user")).to_have_text("You askedsecond talk")
    rows.nth(1).locator(".open").click()
    expect(page.locator("article.user .said")).to_have_text("first talk")
    rows.nth(1).hover()
    page.get_by_role("button", name="Rename first talk").click()
    page.get_by_label("New title").fill("renamed")
    page.keyboard.press("Enter")
    expect(page.locator("#chats")).to_contain_text("renamed")
    page.get_by_role("button", name="Delete renamed").click(force=True)
    expect(rows).to_have_count(1)
    page.get_by_role("button", name="Undo").click()
    expect(rows).to_have_count(2)
    expect(page.locator("article.user .said")).to_have_text("first talk")


# The page stores a growing answer every 700 ms: so it does at each event.
FAST_CLOCK = "const now = performance.now.bind(performance); performance.now = () => 1e4 * now();"


def test_the_list_keeps_keyboard_and_typing_while_an_answer_streams(
    site: Site, open_page: Callable[..., Any]
) -> None:
    page = open_page(init=FAST_CLOCK)
    ask(page, "first talk")
    page.click("#new-chat")
    site.pace.hold_after(12)
    start_asking(page, "long")
    said = page.locator(f"{LAST} .said")
    expect(said).to_contain_text("word word")
    page.locator("#chats li", has_text="first talk").hover()
    page.get_by_role("button", name="Rename first talk").click()
    page.keyboard.type("renamed")
    site.pace.go_on(15)
    expect(said).to_contain_text("word word word word")
    expect(page.get_by_label("New title")).to_be_focused()
    expect(page.get_by_label("New title")).to_have_value("renamed")
    page.keyboard.press("Enter")
    renamed = page.locator("#chats .open", has_text="renamed")
    expect(renamed).to_be_focused()
    site.pace.go_on()
    expect(page.locator(LAST)).to_have_attribute("aria-busy", "false")
    expect(renamed).to_be_focused()


def test_a_conversation_deleted_while_its_answer_streams_stays_deleted(
    site: Site, open_page: Callable[..., Any]
) -> None:
    page = open_page()
    site.pace.hold_after(30)
    start_asking(page, "long")
    expect(page.locator(f"{LAST} .said")).to_contain_text("word word")
    delete(page, "long")
    expect(page.locator("#send")).to_have_attribute("aria-label", "Send")  # it is stopped
    site.pace.go_on()
    expect(page.locator("#chats li.none")).to_be_visible()
    page.get_by_role("button", name="Undo").click()
    expect(page.locator(LAST)).to_contain_text("You stopped this answer.")
    delete(page, "long")
    page.reload()
    expect(page.locator("#chats li.none")).to_be_visible()


def open_twin(page: Any) -> Any:
    """The same conversation in a second window."""
    twin = page.context.new_page()
    twin.goto(page.url)
    expect(twin.locator("article")).to_have_count(page.locator("article").count())
    return twin


def test_a_window_follows_what_another_one_does_to_its_conversation(
    open_page: Callable[..., Any],
) -> None:
    page = open_page()
    ask(page, "first")
    twin = open_twin(page)
    ask(twin, "second")
    questions = page.locator("article.user .said")
    expect(questions).to_have_text(["first", "second"])
    expect(page.locator(LAST)).to_have_attribute("aria-busy", "false")
    # What is typed into an edited question is not taken away.
    page.press("#text", "ArrowUp")
    page.get_by_label("Edit the question").fill("half a quest")
    ask(twin, "third")
    expect(page.get_by_label("Edit the question")).to_have_value("half a quest")
    page.keyboard.press("Escape")
    expect(questions).to_have_text(["first", "second", "third"])
    ask(page, "fourth")
    twin.reload()
    expect(twin.locator("article.user .said")).to_have_text(["first", "second", "third", "fourth"])
    expect(twin.locator("#chats .open")).to_have_count(1)
    # A new title comes along, and is no conflict.
    twin.locator("#chats li").hover()
    twin.get_by_role("button", name="Rename first").click()
    twin.get_by_label("New title").fill("renamed")
    twin.keyboard.press("Enter")
    expect(page.locator("#chats .open")).to_have_text(["renamed"])
    ask(page, "fifth")
    expect(page.locator("#chats .open")).to_have_text(["renamed"])
    delete(twin, "renamed")
    expect(page.locator("article")).to_have_count(0)
    expect(page.locator("#toast")).to_contain_text("deleted in another window")
    twin.get_by_role("button", name="Undo").click()
    page.locator("#chats .open").click()
    expect(questions).to_have_count(5)
    ask(page, "sixth")
    expect(twin.locator("article.user .said")).to_have_count(6)


DEAF = "addEventListener('storage', (event) => event.stopImmediatePropagation(), true);"


def test_a_window_that_missed_a_change_writes_nothing_over_it(
    open_page: Callable[..., Any],
) -> None:
    page = open_page(init=DEAF)
    ask(page, "first")
    twin = open_twin(page)
    ask(twin, "second")
    ask(page, "other")
    expect(page.locator("#toast")).to_contain_text("Another window changed this conversation")
    expect(page.locator("#chats .open")).to_have_text(["first (2)", "first"])
    page.reload()
    expect(page.locator("article.user .said")).to_have_text(["first", "other"])
    twin.reload()
    expect(twin.locator("article.user .said")).to_have_text(["first", "second"])
    # Whoever asks on in what was deleted elsewhere wants it kept.
    delete(twin, "first (2)")
    ask(page, "more")
    page.reload()
    expect(page.locator("article.user .said")).to_have_text(["first", "other", "more"])


def open_twins_of_an_answer(site: Site, open_page: Callable[..., Any]) -> tuple[Any, Any]:
    """Two windows of a conversation whose answer is being written, in the first, and holds."""
    page = open_page(init=FAST_CLOCK)
    site.pace.hold_after(12)
    start_asking(page, "long")
    expect(page.locator(f"{LAST} .said")).to_contain_text("word word")
    return page, open_twin(page)


def test_a_question_in_a_second_window_does_not_cost_the_answer_in_the_first(
    site: Site, open_page: Callable[..., Any]
) -> None:
    page, twin = open_twins_of_an_answer(site, open_page)
    start_asking(twin, "smile")
    expect(twin.locator("article.user .said")).to_have_text(["long", "smile"])
    site.pace.go_on()
    expect(page.locator(LAST)).to_have_attribute("aria-busy", "false")
    expect(page.locator("#toast")).to_contain_text("both are kept")
    expect(twin.locator(f"{LAST} .said")).to_contain_text("dich")
    for each in (page, twin):
        expect(each.locator("#chats .open")).to_have_count(2)
        each.reload()
    expect(page.locator("article.user .said")).to_have_text(["long"])
    assert page.locator(f"{LAST} .said").inner_text().count("word") > 100
    expect(twin.locator("article.user .said")).to_have_text(["long", "smile"])


def test_a_conversation_deleted_in_another_window_while_it_streams_stays_deleted(
    site: Site, open_page: Callable[..., Any]
) -> None:
    page, twin = open_twins_of_an_answer(site, open_page)
    delete(twin, "long")
    expect(page.locator("#toast")).to_contain_text("deleted in another window")
    expect(page.locator("#send")).to_have_attribute("aria-label", "Send")  # it is stopped
    site.pace.go_on()
    for each in (page, twin):
        each.reload()
        expect(each.locator("#chats li.none")).to_be_visible()


# A stored conversation of so many messages of so many characters.
OLD = """([count, size]) => {
  const messages = Array.from({length: count}, (_, i) => (i % 2
    ? {role: "assistant", parts: [{type: "text", text: "x".repeat(size)}], state: "done"}
    : {role: "user", content: "x".repeat(Math.min(size, 8000))}));
  localStorage.setItem("nanochat.chat.old", JSON.stringify(
    {id: "old", title: "old", updated: 1, messages}));
}"""


# The page cuts at 498 messages, so 104 of 601, and at 30,000 characters; the server cuts what is
# beyond its context of 4,096 tokens, here bytes: all of the long messages.
@pytest.mark.parametrize(
    ("count", "size", "num_sent", "num_dropped"),
    [(600, 1, 497, 104), (12, 3000, 9, 12), (2, 9, 3, 0)],
)
def test_what_is_left_out_of_a_long_conversation_is_told(
    open_page: Callable[..., Any], count: int, size: int, num_sent: int, num_dropped: int
) -> None:
    page = open_page()
    page.evaluate(OLD, [count, size])
    page.reload()
    page.locator("#chats .open", has_text="old").click()
    with page.expect_request("**/chat/completions") as sent:
        ask(page, "Who?")
    assert len(sent.value.post_data_json["messages"]) == num_sent
    notice = page.locator(f"{LAST} .notice")
    expect(notice).to_have_count(1 if num_dropped else 0)
    told = f"the oldest {num_dropped} messages were left out"
    if num_dropped:
        expect(notice).to_contain_text(told)
    page.click("#tab-inside")
    expect(page.locator("#prompt-facts")).to_contain_text("that fit")
    assert (told in page.locator("#prompt-facts").inner_text()) == (num_dropped > 0)


def test_an_answer_longer_than_a_part_is_sent_back_whole(open_page: Callable[..., Any]) -> None:
    page = open_page()
    page.evaluate(OLD, [2, 8001])
    page.reload()
    page.locator("#chats .open", has_text="old").click()
    with page.expect_request("**/chat/completions") as sent:
        expect(ask(page, "Who?")).to_contain_text("Hello")
    parts = sent.value.post_data_json["messages"][1]["content"]
    assert "".join(part["text"] for part in parts) == "x" * 8001


# A stored conversation of so many characters.
STORE = """([title, updated, size]) => {
  const messages = [{role: "user", content: "x".repeat(size)}];
  localStorage.setItem(
    `nanochat.chat.${title}`, JSON.stringify({id: title, title, updated, messages}));
}"""
FILL = """() => {
  let filler = "";
  for (let size = 2 ** 23; size >= 1; size /= 2) {
    try {
      localStorage.setItem("filler", filler + "x".repeat(size));
      filler += "x".repeat(size);
    } catch { /* too much */ }
  }
}"""


def test_what_a_full_storage_costs_is_told(open_page: Callable[..., Any]) -> None:
    page = open_page()
    for title, updated, size in (("oldest", 1, 10_000), ("older", 2, 10_000)):
        page.evaluate(STORE, [title, updated, size])
    page.evaluate(FILL)
    ask(page, "Who?")
    expect(page.locator("#toast")).to_contain_text("storage is full: the oldest conversation, ")
    expect(page.locator("#toast")).to_contain_text("oldest\u201d, was deleted")
    expect(page.locator("#chats .open")).to_have_text(["Who?", "older"])
    page.reload()
    expect(page.locator("article.user .said")).to_have_text("Who?")
    # Nothing is left that could go.
    page.click("#new-chat")
    page.evaluate("for (const key of Object.keys(localStorage)) localStorage.removeItem(key)")
    page.evaluate(FILL)
    ask(page, "Who else?")
    expect(page.locator("#toast")).to_contain_text("what is new is not kept")
    page.get_by_role("button", name="OK", exact=True).click()
    expect(ask(page, "And now?")).to_contain_text("Hello")
    expect(page.locator("#toast")).to_be_hidden()


BLOCKED = """for (const name of ["localStorage", "sessionStorage"]) {
  const get = () => { throw new DOMException("Access is denied", "SecurityError"); };
  Object.defineProperty(window, name, {get});
}"""


def test_without_storage_the_page_works_and_says_what_is_missing(
    open_page: Callable[..., Any],
) -> None:
    page = open_page(init=BLOCKED, viewport={"width": 320, "height": 640})
    expect(page.locator("#toast")).to_contain_text("This browser blocks storage")
    assert page.locator("#toast").bounding_box()["width"] > 280  # as wide as a phone allows
    page.set_viewport_size({"width": 1280, "height": 640})
    page.get_by_role("button", name="OK", exact=True).click()
    expect(page.locator("#chats li")).to_contain_text("not kept")
    ask(page, "first talk")
    page.click("#new-chat")
    ask(page, "second talk")
    page.locator("#chats .open", has_text="first talk").click()
    expect(page.locator("article.user .said")).to_have_text("first talk")
    delete(page, "first talk")
    expect(page.locator("#chats .open")).to_have_text(["second talk"])
    start_asking(page, "/temperature 0.3")
    expect(page.locator(".notice")).to_have_text("Temperature is now 0.3.")
    page.reload()
    expect(page.locator("#toast")).to_contain_text("This browser blocks storage")


# ---- settings and commands ---------------------------------------------------------------------


def test_settings_and_commands_reach_the_server(open_page: Callable[..., Any]) -> None:
    page = open_page()
    page.click("#open-settings")
    page.fill("#set-system", "Be brief.")
    page.locator("#set-top-k").fill("7")
    page.fill("#set-max-tokens", "99")
    page.get_by_role("button", name="Done").click()
    start_asking(page, "/temperature 0.3")
    expect(page.locator(".notice").last).to_have_text("Temperature is now 0.3.")
    start_asking(page, "/topp 5")
    expect(page.locator(".notice").last).to_contain_text("must be a number from 0.01 to 1")
    start_asking(page, "/nonsense")
    expect(page.locator(".notice").last).to_contain_text("There is no command /nonsense")
    page.reload()
    with page.expect_request("**/chat/completions") as sent:
        ask(page, "Who?")
    body = sent.value.post_data_json
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert (body["temperature"], body["top_k"], body["max_tokens"]) == (0.3, 7, 99)
    page.click("#open-settings")
    page.get_by_role("button", name="Back to the server's values").click()
    expect(page.locator("#out-top-k")).to_have_text("50")


def test_commands_are_suggested_and_taken_by_keyboard(open_page: Callable[..., Any]) -> None:
    page = open_page()
    page.fill("#text", "/t")
    expect(page.locator("#commands li")).to_have_count(4)
    page.press("#text", "ArrowDown")
    page.press("#text", "Tab")
    expect(page.locator("#text")).to_have_value("/topk ")
    page.fill("#text", "/help")
    page.press("#text", "Enter")
    expect(page.locator(".notice")).to_contain_text("/system [text]")
    page.fill("#text", "/theme dark")
    page.press("#text", "Enter")
    expect(page.locator("html")).to_have_attribute("data-theme", "dark")
    page.locator("#new-chat").focus()
    page.keyboard.press("?")
    expect(page.locator("#keys")).to_be_visible()


def test_the_theme_follows_the_system(open_page: Callable[..., Any]) -> None:
    for scheme in ("dark", "light"):
        expect(open_page(color_scheme=scheme).locator("html")).to_have_attribute(
            "data-theme", scheme
        )


# ---- looking inside ----------------------------------------------------------------------------


def test_look_inside_shows_tokens_alternatives_and_the_prompt(
    open_page: Callable[..., Any],
) -> None:
    page = open_page()
    ask(page, "smile")
    page.get_by_role("button", name="Look inside this answer").click()
    tokens = page.locator("#answer-tokens button")
    count = len(tokens_of(*SCRIPT["smile"]))
    expect(tokens).to_have_count(count + 1)
    # The end is shown, but not counted, here nor below the answer.
    assert f"{count}\u00a0tokens " in page.locator(f"{LAST} .facts").text_content()
    expect(page.locator("#answer-figures dd").first).to_have_text(str(count))
    tokens.last.click()
    expect(page.locator("#why .small")).to_contain_text("the end")
    tokens.first.click()
    expect(page.locator("#why .small")).to_contain_text(f"token 1 of {count} ")
    expect(page.locator("#why")).to_contain_text("<F0>")
    expect(page.locator("#why")).to_contain_text("77.9 %")  # exp(-0.25)
    expect(page.locator("#why .bars code").nth(1)).to_have_text("A")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#why")).to_contain_text("token 2 of")
    expect(page.locator("#prompt-tokens .special").first).to_have_text("bos")
    expect(page.locator("#prompt-facts")).to_contain_text("9 of the 4,096 tokens")
    page.fill("#try", "abc d")
    expect(page.locator("#try-facts")).to_contain_text("5 tokens for 5 characters")
    expect(page.locator("#try-tokens .token")).to_have_count(5)
    page.reload()
    page.click("#tab-inside")
    expect(tokens.first).to_be_visible()


def test_look_inside_shows_no_other_conversation(open_page: Callable[..., Any]) -> None:
    page = open_page()
    ask(page, "first talk")
    page.click("#new-chat")
    ask(page, "smile, second talk")
    page.locator("#chats .open", has_text="first talk").click()
    page.click("#tab-inside")
    expect(page.locator("#inside-none")).to_contain_text("only those of the newest answer")
    for part in ("#inside-answer", "#inside-prompt"):
        expect(page.locator(part)).to_be_hidden()
    page.click("#new-chat")
    page.click("#tab-inside")
    expect(page.locator("#inside-none")).to_contain_text("No answer yet.")
    page.locator("#chats .open", has_text="second talk").click()
    rate = page.locator(f"{LAST} .facts").inner_text().split("\u00b7")[1].split()[0]
    page.reload()
    page.click("#tab-inside")
    expect(page.locator("#answer-tokens button")).to_have_count(
        len(tokens_of(*SCRIPT["smile"], END))
    )
    figure = page.locator("#answer-figures div", has_text="tokens per second").locator("dd")
    expect(figure).to_have_text(f"{float(rate):.0f}")
    expect(page.locator("#prompt-tokens")).to_contain_text("second")


# ---- a small screen, a reader, trouble ---------------------------------------------------------


def test_nothing_is_wider_than_a_small_phone(open_page: Callable[..., Any]) -> None:
    page = open_page(viewport={"width": 320, "height": 640}, has_touch=True, is_mobile=True)
    expect(page.locator("#model-stage")).to_be_visible()
    expect(page.locator("#welcome img")).to_be_in_viewport(ratio=1)
    ask(page, "wide " + "c" * 200)
    expect(page.locator("#model-name")).to_be_visible()
    expect(page.locator("#brand")).to_be_hidden()  # what is left is the model's own name
    # No line of the figures under an answer begins with a unit.
    expect(page.locator(f"{LAST} .facts")).to_have_text(re.compile(r"\d\u00a0(ms|s)$"))
    width = "document.documentElement.scrollWidth"
    assert page.evaluate(width) == 320
    assert page.evaluate("document.querySelector('#chat').scrollWidth") <= 320
    page.click("#tab-inside")
    expect(page.locator("#prompt-tokens")).to_be_visible()
    assert page.evaluate("document.querySelector('#inside').scrollWidth") <= 320
    page.click("#tab-chat")
    page.click("#menu")
    expect(page.locator("#side")).to_be_in_viewport()
    page.click("#open-settings")
    expect(page.locator("#settings")).to_be_in_viewport()
    assert page.evaluate(width) == 320


# Controls without a name, names and states that lead nowhere or that their role does not have,
# and what only a mouse can scroll.
TROUBLE_FOR_READERS = """() => {
  const isSeen = (node) => node.checkVisibility();
  const all = (query) => [...document.querySelectorAll(query)].filter(isSeen);
  const nameless = all("button, input, textarea, select, dialog, a, [role=img], [role=tabpanel]")
    .filter((node) => !(node.getAttribute("aria-label") || node.labels?.length
      || node.getAttribute("aria-labelledby")
      || (!/^(TEXTAREA|SELECT|DIALOG)$/.test(node.nodeName) && !node.matches("[role=tabpanel]")
        && node.textContent.trim())));
  const lost = ["aria-labelledby", "aria-controls", "aria-activedescendant", "for"]
    .flatMap((name) => all(`[${name}]`).filter((node) => {
      const target = document.getElementById(node.getAttribute(name));
      return !target || (name === "aria-activedescendant" && !isSeen(target));
    }));
  const wrong = all("[aria-expanded]").filter((node) => !node.matches("button, [role=combobox]"));
  const options = all("[role=option]").filter((node) => !node.closest("[role=listbox]"));
  const unreachable = all("*").filter((node) => /auto|scroll/.test(getComputedStyle(node).overflowY)
    && node.scrollHeight > node.clientHeight && node.nodeName !== "TEXTAREA"
    && !node.matches("[tabindex]") && !node.querySelector("button, input, textarea, [tabindex]"));
  return [...nameless, ...lost, ...wrong, ...options, ...unreachable]
    .map((node) => node.outerHTML.slice(0, 80));
}"""


@pytest.mark.parametrize("width", [1280, 320])
def test_every_view_and_dialog_can_be_read_by_screen_readers(
    open_page: Callable[..., Any], width: int
) -> None:
    page = open_page(viewport={"width": width, "height": 640})

    def check(*seen: str) -> None:
        for place in seen:
            expect(page.locator(place).first).to_be_visible()
        assert page.evaluate(TROUBLE_FOR_READERS) == []
        expect(page.locator("h1")).to_have_count(1)
        expect(page.locator("h1")).to_be_visible()

    expect(page.locator("#model-stage")).to_be_visible()
    check("#ideas button", "#text", "#send")
    page.fill("#text", "/t")
    check("#commands li")
    page.press("#text", "Escape")
    check("#text")
    ask(page, "markdown" + " why?" * 300)  # as long a prompt as must be scrolled
    check(".block button", ".user .said", f"{LAST} .tools button", "#text")
    page.locator("article.user").hover()
    page.get_by_role("button", name="Edit and ask again from here").click()
    check(".edit textarea", ".edit button")
    page.keyboard.press("Escape")
    expect(page.get_by_role("main").get_by_role("heading", name="You asked")).to_have_count(1)
    page.click("#tab-inside")
    check("#answer-tokens button", "#prompt-tokens", "#try")
    expect(page.get_by_role("main").get_by_role("tabpanel", name="Look inside")).to_be_visible()
    for dialog in ("#settings", "#keys"):
        if width == 320:
            page.click("#menu")
            check("#new-chat", "#chats .open")
        page.click(f"#open-{dialog[1:]}")
        check(dialog, f"{dialog} button")
        page.keyboard.press("Escape")
    if width == 320:
        page.click("#menu")
    page.locator("#chats li").hover()
    page.get_by_role("button", name="Rename markdown").click()
    check("#chats input")
    page.keyboard.press("Escape")
    delete(page, "markdown")
    check("#toast-button")
    assert page.evaluate("document.documentElement.lang") == "en"


def test_the_skip_link_leads_to_what_is_shown(open_page: Callable[..., Any]) -> None:
    page = open_page()
    ask(page, "Who?")
    for tab, name, target in (
        ("#tab-chat", "Skip to the question field", "#text"),
        ("#tab-inside", "Skip to the tokens", "#inside"),
    ):
        page.click(tab)
        page.get_by_role("link", name=name).focus()
        page.keyboard.press("Enter")
        expect(page.locator(target)).to_be_focused()
        expect(page.locator("article")).to_have_count(2)  # the conversation is still open


def test_a_closed_menu_gives_the_keyboard_back(open_page: Callable[..., Any]) -> None:
    page = open_page(viewport={"width": 320, "height": 640})
    page.click("#menu")
    expect(page.locator("#new-chat")).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.locator("#menu")).to_be_focused()


def test_a_banner_while_the_server_is_gone_and_none_when_it_is_back(
    open_page: Callable[..., Any],
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    site = Site()
    with serving(site.service, port=port) as address:
        page = open_page(address)
        ask(page, "first")
    start_asking(page, "second")
    expect(page.locator("#banner")).to_be_visible()
    expect(page.locator(LAST)).to_contain_text("cannot be reached")
    expect(page.locator("#send")).to_be_disabled()
    with serving(Site().service, port=port):
        expect(page.locator("#banner")).to_be_hidden()
        page.get_by_role("button", name="Write another answer").click()
        expect(page.locator(f"{LAST} .said")).to_have_text("Hello, I am number 0.")


def test_a_full_server_is_told_and_the_question_is_not_lost(
    site: Site, open_page: Callable[..., Any]
) -> None:
    site.pace.hold_after(5)
    pages = [open_page() for _ in range(3)]
    for page in pages[:2]:
        start_asking(page, "long")
        expect(page.locator(LAST)).to_have_attribute("aria-busy", "true")
    pages[0].wait_for_function(
        "fetch('/health').then(r => r.json()).then(h => !h.available_workers)"
    )
    expect(ask(pages[2], "Who?")).to_have_count(1)
    expect(pages[2].locator(f"{LAST} .trouble")).to_contain_text("Many people are asking")
    pages[2].click("#tab-inside")
    expect(pages[2].locator("#inside-none")).to_contain_text("No answer yet.")
    pages[2].click("#tab-chat")
    site.pace.go_on()
    expect(pages[1].locator(LAST)).to_have_attribute("aria-busy", "false")
    pages[2].get_by_role("button", name="Write another answer").click()
    expect(pages[2].locator(f"{LAST} .said")).to_contain_text("Hello")


def test_a_key_is_asked_for_and_used(open_page: Callable[..., Any]) -> None:
    with serving(Site().service, Access(api_key="k3y")) as address:
        page = open_page(address)
        expect(page.locator("#set-key")).to_be_focused()
        page.fill("#set-key", "k3y")
        page.get_by_role("button", name="Done").click()
        expect(ask(page, "Who?")).to_contain_text("Hello")


def test_a_key_is_asked_for_once_and_then_when_a_question_is_refused(
    open_page: Callable[..., Any],
) -> None:
    with serving(Site().service, Access(api_key="k3y")) as address:
        page = open_page(address)
        dialog = page.locator("#settings")
        expect(page.locator("#set-key")).to_be_focused()
        page.get_by_role("button", name="Done").click()
        # So it is every 20 seconds, and when the window is looked at again.
        with page.expect_response("**/health"):
            page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
        page.click("#tab-inside")
        expect(page.locator("#try-facts")).to_contain_text("asks for an API key")
        expect(dialog).to_be_hidden()
        page.click("#tab-chat")
        ask(page, "Who?")
        expect(page.locator("#set-key")).to_be_focused()
        page.fill("#set-key", "k3y")
        page.get_by_role("button", name="Done").click()
        page.get_by_role("button", name="Write another answer").click()
        expect(page.locator(f"{LAST} .said")).to_contain_text("Hello")
        expect(dialog).to_be_hidden()


@pytest.mark.parametrize(
    ("key", "told"),
    [
        (
            "\u043a\u043b\u044e\u0447",
            "only ASCII characters, and the one in the settings has \u201c\u043a\u201d",
        ),
        ("k3\u00ff", "only ASCII characters, and the one in the settings has \u201c\u00ff\u201d"),
        ("k4y", "The API key in the settings is wrong"),
    ],
)
def test_a_wrong_key_is_called_so_and_can_be_corrected(
    open_page: Callable[..., Any], key: str, told: str
) -> None:
    with serving(Site().service, Access(api_key="k3y")) as address:
        page = open_page(address)
        expect(page.locator("#set-key")).to_be_focused()
        page.fill("#set-key", key)
        page.get_by_role("button", name="Done").click()
        ask(page, "Who?")
        expect(page.locator(f"{LAST} .trouble")).to_contain_text(told)
        expect(page.locator("#banner")).to_be_hidden()
        expect(page.locator("#set-key")).to_be_focused()
        page.fill("#set-key", "k3y")
        page.get_by_role("button", name="Done").click()
        page.get_by_role("button", name="Write another answer").click()
        expect(page.locator(f"{LAST} .said")).to_contain_text("Hello")
