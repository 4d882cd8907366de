"""The page at /, as a real Chromium runs it."""

from __future__ import annotations

import os
import time
from collections import Counter
from itertools import pairwise

import pytest
from openai import OpenAI

from .browser import HOW, MISSING, chromium, show_as
from .opened_page import Page
from .served_process import ServedProcess
from .small_server import serving
from .test_view import block_states

HTML = """<img src=x onerror="hit=1"><b>&amp;"""


@pytest.fixture(scope="module")
def driver():
    if MISSING:
        words = f"needs {' and '.join(MISSING)}: {HOW}"
        if "CI" in os.environ:
            pytest.fail(words)
        pytest.skip(words)
    with chromium() as driver:
        yield driver


@pytest.fixture
def open_page(driver):
    return lambda server: Page(driver, getattr(server, "url", None) or f"http://127.0.0.1:{server.port}")


@pytest.fixture
def slow_server(make_engine):
    """A step takes so long that a person could click."""
    with serving(make_engine(max_batch_size=1)) as server:
        server.slow_down(0.03)
        yield server
        if server.running.error is None:
            server.assert_comes_to_rest()


@pytest.fixture
def page(open_page, slow_server):
    return open_page(slow_server)


@pytest.fixture
def quick_page(open_page, server):
    return open_page(server)


@pytest.fixture
def asked(slow_server, monkeypatch):
    """→ the (chat, SamplingParams) of each request so far"""
    asked, engine = [], slow_server.engine
    prepare = engine.prepare

    def record(prompt, params, **options):
        asked.append((prompt, params))
        return prepare(prompt, params, **options)

    monkeypatch.setattr(engine, "prepare", record)
    return asked


@pytest.fixture(scope="module")
def smollm2():
    server = ServedProcess("smollm2", "--block-size", "16", "--max-model-len", "512", "--quiet")
    yield server
    server.kill()


class TestOnARealModel:
    def test_a_question_streams_its_answer(self, open_page, smollm2):
        page = open_page(smollm2)
        page.settings(temperature="0", max_tokens="30")
        page.js(
            """window.lengths = new Set();
            const note = () => lengths.add(document.querySelector(".answer")?.textContent.length ?? 0);
            new MutationObserver(note).observe(document.getElementById("exchanges"),
                { subtree: true, childList: true, characterData: true });"""
        )
        question = "Tell me how Paris became the capital of France."
        page.ask(question)
        shown = page.answer()
        with OpenAI(base_url=f"{smollm2.url}/v1", api_key="none") as client:
            messages = [{"role": "user", "content": question}]
            answer = client.chat.completions.create(model="smollm2", messages=messages, max_tokens=30, temperature=0)
        assert shown == page.text("#said") == answer.choices[0].message.content and "Paris" in shown
        assert len(page.js("return [...lengths]")) > 5  # it came in pieces
        assert page.text(".facts").startswith(f"{answer.usage.completion_tokens} tokens · first after ")
        assert " tokens/s" in page.text(".facts")
        assert page.console() == []
        names = page.js("return performance.getEntriesByType('resource').map((entry) => entry.name)")
        assert len(names) > 10 and all(name.startswith(smollm2.url) for name in names)

    def test_the_view_shows_its_request_and_then_none(self, open_page, smollm2):
        page = open_page(smollm2)
        page.ask("Tell me a long story about a lighthouse.")
        (request,) = page.wait(lambda: [row for row in page.rows() if row[1] == "decode" and int(row[3]) > 3])
        assert int(request[4]) == -(-(int(request[2]) + int(request[3]) - 1) // 16)
        assert page.text("#brief").startswith("1 running, 0 waiting, ")
        page.find("#stop").click()
        page.wait(lambda: page.text("#brief").startswith("0 running, 0 waiting, "))
        assert page.rows() == [] and page.text("#more") == "None."
        assert page.text("#legend").endswith("unused0 shared0 of one request")
        assert page.console() == []


class TestChat:
    def test_stop_frees_the_request_and_regenerate_answers_anew(self, page, slow_server):
        page.ask("hi")
        page.wait(lambda: page.text(".answer"))
        assert slow_server.engine.cache_manager.num_used
        page.find("#stop").click()
        slow_server.assert_comes_to_rest(2)  # to its end it would take three seconds
        part = page.answer()
        assert part and page.text(".facts").endswith(" · stopped") and page.text(".error") == ""
        assert page.text("#said") == "Stopped."
        page.settings(max_tokens="30")
        page.find("#regenerate").click()
        page.wait(lambda: page.text(".facts").startswith("30 tokens"))
        page.answer()
        assert page.text(".facts").endswith(" · cut at the limit of tokens")
        assert page.js("return document.querySelectorAll('article').length") == 1
        assert page.console() == []

    def test_clear_frees_the_request_too(self, page, slow_server):
        page.ask("hi")
        page.wait(lambda: page.text(".answer"))
        page.find("#clear").click()
        slow_server.assert_comes_to_rest(2)
        assert page.js("return document.getElementById('exchanges').childNodes.length") == 0
        page.settings(max_tokens="2")
        page.ask("ho")
        page.answer()
        assert page.text(".facts").startswith("2 tokens")

    def test_leaving_the_page_frees_the_request(self, page, slow_server):
        page.ask("hi")
        page.wait(lambda: page.text(".answer"))
        page.driver.get("about:blank")
        slow_server.assert_comes_to_rest(2)

    def test_the_conversation_and_the_settings_are_what_is_sent(self, page, asked):
        page.settings(max_tokens="3", temperature="0.5", system="Be odd.")
        page.ask("a")
        first = page.answer()
        page.ask("b")
        second = page.answer()
        assert second
        page.find("#regenerate").click()
        page.answer()
        system, *user = [{"role": "system", "content": "Be odd."}, *({"role": "user", "content": c} for c in "ab")]
        follow_up = [system, user[0], {"role": "assistant", "content": first}, user[1]]
        assert [chat for chat, _ in asked] == [[system, user[0]], follow_up, follow_up]
        assert {(params.max_tokens, params.temperature) for _, params in asked} == {(3, 0.5)}

    def test_enter_sends_and_with_shift_it_is_a_new_line(self, page, asked):
        page.settings(max_tokens="1")
        page.find("#question").send_keys("a\ue008\n\ue008b\n")
        page.wait(lambda: page.text(".facts").startswith("1 token"))
        assert asked[0][0] == [{"role": "user", "content": "a\nb"}]
        assert page.find("#question").get_attribute("value") == ""

    def test_markup_is_text_whoever_writes_it(self, page, slow_server, monkeypatch):
        pieces = iter([HTML, *HTML])  # at once and bit by bit
        monkeypatch.setattr(slow_server.engine, "_detokenize", lambda request, token: next(pieces))
        page.settings(max_tokens=str(1 + len(HTML)))
        page.ask(HTML)
        assert (page.answer(), page.text(".question")) == (2 * HTML, HTML)
        assert page.js("return [document.querySelectorAll('img, b').length, typeof hit]") == [0, "undefined"]
        assert page.console() == []

    @pytest.mark.parametrize(
        "settings, message",
        [({"temperature": "-1"}, "temperature=-1"), ({"max_tokens": "e"}, "Max tokens must be a number.")],
    )
    def test_what_is_wrong_is_said_and_the_next_question_is_answered(self, page, asked, settings, message):
        page.settings(**settings)
        page.ask("a")
        page.wait(lambda: message in page.text(".error[role=alert]:not(:empty)"))
        assert message in page.text("#said") and page.text(".answer") == ""
        page.settings(temperature="1", max_tokens="2")
        page.ask("b")
        assert page.answer()
        assert [chat for chat, _ in asked] == [[{"role": "user", "content": "b"}]]  # what has no answer is not sent

    def test_an_engine_that_dies_is_said_in_the_chat_and_in_the_view(self, page, slow_server):
        page.ask("hi")
        page.wait(lambda: page.text(".answer"))
        slow_server.engine.step = None
        assert page.answer()
        assert "the engine has died" in page.text("article .error")
        page.wait(lambda: "the engine has died" in page.text("#view-error"))

    def test_a_server_that_is_gone_is_said_too(self, open_page, make_engine):
        with serving(make_engine()) as server:
            page = open_page(server)
        page.ask("hi")
        page.answer()
        assert page.text("article .error") == "The server cannot be reached."
        page.wait(lambda: page.text("#view-error") == "The server cannot be reached.")

    @pytest.mark.parametrize("size", [1, 2, 7, 1000])
    def test_events_are_read_wherever_the_stream_is_cut(self, quick_page, size):
        stream = "data: a é😀\r\ndata: 2\r\n\r\n: nothing\ndata:b\ndata:  c\n\n"
        stream += 'id: 1\rdata\r\revent: x\n\ndata: {"d": 1}\n\ndata: cut'
        data = quick_page.js_async(
            """const [stream, size] = arguments;
            const bytes = new TextEncoder().encode(stream);
            let place = 0;
            const body = new ReadableStream({ pull(controller) {
                if (place >= bytes.length) return controller.close();
                controller.enqueue(bytes.slice(place, (place += size)));
            }});
            import("/page/sse.js").then(async ({ eventData }) => {
                const found = [];
                for await (const data of eventData(body)) found.push(data);
                done(found);
            });""",
            stream,
            size,
        )
        assert data == ["a é😀\n2", "b\n c", "", '{"d": 1}']


class TestKey:
    def test_it_is_asked_for_in_the_page_and_sent_with_everything(self, open_page, make_engine):
        with serving(make_engine(), api_keys=["clé-1"]) as server:
            page = open_page(server)
            assert page.is_shown("#key-form") and page.text("#view-error") == "a valid API key is needed"
            page.set("#key", "clé-2\n")
            page.wait(lambda: page.text("#key-error") == "The server does not accept this key.")
            page.set("#key", "clé-1\n")
            page.wait(lambda: page.text("#model") == "smallother/name")
            page.wait(lambda: page.text("#brief").startswith("0 running"))
            assert not page.is_shown("#key-form") and page.text("#view-error") == ""
            page.settings(max_tokens="2")
            page.ask("hi")
            assert page.answer() and page.text("article .error") == ""
            page.driver.refresh()
            page.wait(lambda: page.text("#brief").startswith("0 running"))
            assert not page.is_shown("#key-form")


class TestView:
    def test_requests_that_run_and_wait_with_their_blocks(self, page, slow_server):
        body = {"prompt": "a" * 40, "max_tokens": 80, "ignore_eos": True}
        connections = [slow_server.connect("/generate", body) for _ in range(20)]
        page.wait(lambda: page.text("#brief").startswith("1 running, 19 waiting, "))
        page.wait(lambda: len(page.rows()) == 16 and page.rows()[0][1] == "decode")
        assert page.text("#more") == "and 4 more"
        assert {tuple(row[1:]) for row in page.rows()[1:]} == {("waiting", "40", "0", "0")}
        page.wait(lambda: float(page.text("#brief").split()[-2]) > 3)
        label = page.find("#blocks").get_attribute("aria-label")
        assert label.startswith("128 cache blocks of 16 tokens: ") and label.endswith(" of one request")
        # The colour beside the request is that of its blocks in the picture.
        same = """const first = (context) => context.getImageData(0, 0, 1, 1).data.join();
            const probe = document.createElement("canvas").getContext("2d");
            probe.fillStyle = getComputedStyle(document.querySelector("[data-request]")).backgroundColor;
            probe.fillRect(0, 0, 1, 1);
            return first(probe) === first(document.getElementById("blocks").getContext("2d"));"""
        states = block_states(slow_server.client.get("/view").json())
        assert states[0] == 3 and page.js(same)
        for connection in connections:
            connection.close()
        page.wait(lambda: page.text("#brief").startswith("0 running, 0 waiting, "))

    @pytest.mark.parametrize("blocks", [1, 100, 20_000, 130_000])
    def test_the_picture_has_a_square_for_each_block(self, quick_page, blocks):
        states = [0, 1, 2, 3, 4] * (blocks // 5) if blocks > 1 else [3]
        width, height, colours, last, seconds, places = quick_page.js_async(
            """const [states] = arguments;
            import("/page/blocks.js").then(({ drawBlocks, palette }) => {
                const canvas = document.createElement("canvas");
                document.getElementById("blocks").parentElement.append(canvas);
                const start = performance.now();
                const blockAt = drawBlocks(canvas, states, [7, 8], palette());
                const seconds = (performance.now() - start) / 1000;
                const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
                const colours = {};
                for (const colour of new Uint32Array(data.buffer)) colours[colour] = (colours[colour] ?? 0) + 1;
                const places = new Set();
                for (let y = 0; y < canvas.height; y++)
                    for (let x = 0; x < canvas.width; x++) places.add(blockAt(x, y));
                places.delete(undefined);
                const last = blockAt(canvas.width + 1, canvas.height + 1) ?? null;
                const size = [canvas.clientWidth, canvas.clientHeight];
                canvas.remove();
                done([...size, colours, last, seconds, [...places]]);
            });""",
            states,
        )
        assert sorted(places) == list(range(blocks)) and last is None
        areas = Counter(count for colour, count in colours.items() if colour != "0")
        assert len(colours) - ("0" in colours) == len(set(states))  # each state in a colour of its own
        assert len(areas) == 1 and min(areas) >= blocks // len(set(states))  # and as much of each
        assert width <= 384 and height <= (240 if blocks <= 20_000 else 400)
        assert seconds < 1

    def test_the_server_is_asked_twice_a_second_at_most_and_not_by_a_page_that_is_hidden(self, page, slow_server):
        asked, snapshot = [], slow_server.running.snapshot

        async def record():
            asked.append(time.monotonic())
            return await snapshot()

        slow_server.running.snapshot = record
        page.wait(lambda: len(asked) == 4)
        assert min(b - a for a, b in pairwise(asked)) > 0.45
        page.driver.minimize_window()
        page.wait(lambda: page.js("return document.hidden"))
        count = len(asked)
        time.sleep(1.5)  # nothing is to come, so there is nothing to wait for
        assert len(asked) <= count + 1  # the one that was on its way
        page.driver.set_window_rect(0, 0, 1200, 800)
        page.wait(lambda: len(asked) > count + 2)


CONTRAST = """
const luminance = (colour) => {
    const probe = document.createElement("canvas").getContext("2d");
    probe.fillStyle = colour;
    probe.fillRect(0, 0, 1, 1);
    const [red, green, blue] = [...probe.getImageData(0, 0, 1, 1).data].slice(0, 3).map((byte) => {
        const value = byte / 255;
        return value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
};
const style = getComputedStyle(document.documentElement);
return arguments[0].map((pair) => {
    const [dark, light] = pair.map((name) => luminance(style.getPropertyValue(`--${name}`))).sort((a, b) => a - b);
    return (light + 0.05) / (dark + 0.05);
});
"""
"""The contrast of pairs of colours, by WCAG 2.2."""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width, height", [(1200, 800), (390, 844), (320, 568)])
def test_it_can_be_read_on_a_desk_and_on_a_phone_by_day_and_by_night(quick_page, scheme, width, height):
    page = quick_page
    show_as(page.driver, width, height, scheme)
    page.driver.refresh()
    page.wait(lambda: page.text("#brief").startswith("0 running"))
    page.settings(max_tokens="20")
    page.ask("w" * 40)
    page.answer()
    body = page.js("return getComputedStyle(document.body).backgroundColor")
    assert body == {"light": "rgb(246, 247, 249)", "dark": "rgb(18, 21, 27)"}[scheme]
    on = [("text", "page"), ("text", "surface"), ("quiet", "page"), ("quiet", "surface"), ("error", "page")]
    pairs = [*on, ("error", "surface"), ("text", "question"), ("on-accent", "accent")]
    assert all(ratio >= 4.5 for ratio in page.js(CONTRAST, pairs)), page.js(CONTRAST, pairs)
    assert page.js("return document.getElementById('engine').open") == (width > 1000)
    for unfolded in (False, True):
        page.js("document.querySelectorAll('details').forEach((node) => (node.open = arguments[0]))", unfolded)
        assert page.js("return document.documentElement.scrollWidth") <= width
        assert page.js("return document.querySelector('main').scrollWidth") <= width
        page.find("#send").location_once_scrolled_into_view  # noqa: B018 — it scrolls
        for selector in ("#question", "#send", "#stop", "#clear"):
            box = page.find(selector).rect
            assert box["x"] >= 0 and box["x"] + box["width"] <= width and page.is_shown(selector)
        assert (
            page.js(
                "const box = document.getElementById('send').getBoundingClientRect();"
                "return document.elementFromPoint(box.x + 5, box.y + 5).id"
            )
            == "send"
        )
    assert page.console() == []
