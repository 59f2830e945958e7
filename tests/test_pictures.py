"""Pictures of a decode: the frames against the trace, the terminal's text, and the page in a real browser."""

import dataclasses
import io
import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console
from rich.text import Text

import djax
from djax.engine.trace import Trace
from djax.errors import OptionError
from djax.pictures import frames, page, terminal

QUESTIONS = [
    "Ben has 20 coins. He finds 3 boxes with 6 coins each. He loses 9. How many coins does Ben have now?",
    "Anna has 12 pens. She buys 7 more. She gives 4 to Tom. How many pens does Anna have now?",
]
HOSTILE = [
    "</script><script>window.hacked=1</script>",
    "<!--",
    "<img src=x onerror=window.hacked=1>",
    "]]>&lt;'\"\\",
    "<!--<script>",
]


@pytest.fixture(scope="module")
def answers(small):
    # Warm-up, refreshes, windows, and an early stop that fills the rest.
    return djax.generate(small, QUESTIONS, trace=True, cache=djax.Vicinity(16, 16, warmup=2), decoder=djax.Threshold(0.97))


@pytest.fixture(scope="module")
def replays(small, answers):
    return [frames.replay(answer, small.tokenizer) for answer in answers]


def agrees(replay, answer, mask_id):
    """The laws of a replay, against the trace it came from."""
    trace, steps = answer.trace, len(replay.forwards)
    assert steps == answer.forwards
    assert not (replay.states(0)[replay.prompt :] != "masked").any()
    for step in range(1, steps):
        shown = np.where(replay.states(step) == "masked", mask_id, replay.tokens)
        np.testing.assert_array_equal(shown, trace.canvas(answer.canvas, replay.prompt, step - 1, mask_id))
    assert not (replay.states(steps) == "masked").any()
    np.testing.assert_array_equal(replay.tokens, answer.canvas)
    assert [f.whole for f in replay.forwards] == trace.whole.tolist()
    assert [f.start for f in replay.forwards] == trace.starts.tolist()
    assert [f.accepted for f in replay.forwards] == [np.count_nonzero(trace.accepted_at == f) for f in range(steps)]
    assert replay.forwards[-1].done == np.count_nonzero(trace.accepted_at >= 0)
    assert replay.forwards[-1].done + replay.filled == replay.generated
    assert (replay.states(steps) == "filled").sum() == replay.filled
    assert {f.start for f in replay.forwards} <= set(replay.borders)
    assert all(f.end in (*replay.borders, len(replay.tokens)) for f in replay.forwards)


def test_frames_are_the_trace(small, answers, replays):
    for answer, replay in zip(answers, replays, strict=True):
        agrees(replay, answer, small.config.mask_id)
        assert replay.filled
        assert {f.whole for f in replay.forwards} == {True, False}
        assert replay.borders[0] == 0


def test_frames_without_early_stop_and_with_blocks_from_the_prompt_on(small):
    options = dict(gen_length=40, early_stop=False, align_blocks=False, decoder=djax.Fixed(4), trace=True)
    answer = djax.generate(small, QUESTIONS[0], **options)
    replay = frames.replay(answer, small.tokenizer)
    agrees(replay, answer, small.config.mask_id)
    assert replay.filled == 0
    assert replay.borders == (0, replay.prompt, replay.prompt + 32)


def test_what_a_forward_proposed_where_it_left_masks(replays):
    replay = replays[0]
    seen = 0
    for step, forward in enumerate(replay.forwards, 1):
        proposed = replay.proposed(step)
        here = range(forward.start, forward.end)
        assert list(proposed) == [p for p in here if replay.states(step)[p] == "masked"]
        assert all(replay.proposals[step - 1, p - forward.start] == token for p, token in proposed.items())
        assert set(proposed.values()) <= set(replay.words)
        seen += len(proposed)
    assert seen


def test_pieces(small, answers, replays):
    replay, answer = replays[0], answers[0]
    generated = replay.pieces[replay.prompt :]
    eos = generated.index("<|endoftext|>")
    assert "".join(generated[:eos]) == answer.text.replace("\n", "↵")
    assert "</role>" in replay.pieces[: replay.prompt]
    tokenizer = small.tokenizer
    euro = tokenizer("€", add_special_tokens=False)["input_ids"]
    assert len(euro) > 1, "the small tokenizer has no token for it, so its bytes stand alone"
    assert "".join(frames.piece(tokenizer, token) for token in euro) == r"\xe2\x82\xac"
    assert frames.piece(tokenizer, tokenizer.convert_tokens_to_ids("Ġ")) == " "
    assert frames.piece(tokenizer, tokenizer.convert_tokens_to_ids("Ċ")) == "↵"
    assert frames.piece(tokenizer, len(tokenizer) + 3) == f"<{len(tokenizer) + 3}>"
    assert frames.piece(None, 7) == " 7"
    assert frames.visible("a\tb\x1b[2J\u202e é\x00") == r"a⇥b\x1b[2J\u202e é\x00"


def test_without_a_tokenizer_pieces_are_ids(answers):
    replay = frames.replay(answers[0], None)
    assert [int(piece) for piece in replay.pieces] == answers[0].canvas.tolist()


def test_a_generation_without_a_trace(small, answers):
    with pytest.raises(OptionError, match=r"trace: expected .* decode with trace=True"):
        frames.replay(dataclasses.replace(answers[0], trace=None), small.tokenizer)


def terminal_console(**options):
    return Console(file=io.StringIO(), force_terminal=True, width=100, _environ={"TERM": "xterm-256color"}, **options)


def printed(console):
    # Cursor movements go first, and frames are put below each other; what is left are colours, which rich takes away.
    return Text.from_ansi(re.sub(r"\x1b\[[?0-9;]*[A-HJKhl]", "", console.file.getvalue()).replace("\r", "\n")).plain


@pytest.mark.parametrize("height", [40, 6])
def test_terminal_animates_and_leaves_the_answer(answers, replays, height):
    console = terminal_console(height=height)
    terminal.show(replays, console, seconds_per_forward=0)
    out = printed(console)
    for answer, replay in zip(answers, replays, strict=True):
        assert answer.text.replace("\n", "↵") in out.replace("\n", "")
        for step in range(len(replay.forwards) + 1):
            assert terminal.status(replay, step) in out
    redrawn = re.findall(r"(?:\x1b\[1A\x1b\[2K)+", console.file.getvalue())
    assert 1 < max(lines.count("A") for lines in redrawn) < height, "a frame fits the terminal, or redrawing would smear"
    assert "answer 2 of 2" in out
    assert "·" in out
    assert "\x1b[1;7;38;" in console.file.getvalue(), "what the present forward accepted stands out"


def test_terminal_frames_keep_their_places(replays):
    replay = replays[0]
    pieces = terminal._pieces(replay)
    rows = terminal._rows(replay, pieces, 60)
    assert [i for row in rows for i in row] == list(range(len(replay.tokens)))
    steps = range(len(replay.forwards) + 1)
    shapes = [[line.cell_len for line in terminal._frame(replay, pieces, rows, step, terminal.COLOURS)] for step in steps]
    assert all(shape == shapes[0] for shape in shapes)
    assert max(shapes[0]) <= 60


def test_terminal_interrupted(replays, monkeypatch):
    def interrupt(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(terminal.time, "sleep", interrupt)
    console = terminal_console(height=40)
    with pytest.raises(KeyboardInterrupt):
        terminal.show(replays, console)
    out = console.file.getvalue()
    assert out.rindex("\x1b[?25h") > out.rindex("\x1b[?25l"), "the cursor is back"


def test_piped_a_line_a_forward(answers, replays):
    console = Console(file=io.StringIO(), force_terminal=False, width=100)
    terminal.show(replays[:1], console)
    out = console.file.getvalue()
    assert "\x1b" not in out
    prompt, *lines = out.splitlines()
    replay = replays[0]
    assert prompt == "prompt: " + "".join(replay.pieces[: replay.prompt])
    assert len(lines) == len(replay.forwards)
    for step, line in enumerate(lines, 1):
        status, canvas = line.split(": ", 1)
        assert status == terminal.status(replay, step)
        if step < len(lines):
            assert canvas.count("·") == replay.generated - replay.forwards[step - 1].done
    assert canvas.startswith(answers[0].text.replace("\n", "↵") + "<|endoftext|>")
    first = replay.forwards[0]
    assert lines[0].startswith(
        f"forward 1/{len(lines)} · whole canvas · block [{first.start}, {first.end}) · +{first.accepted} token"
    )


def test_colours_are_legible_on_black_and_on_white():
    def light(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for colour in terminal.COLOURS:
        assert min(1.05 / (light(colour) + 0.05), (light(colour) + 0.05) / 0.05) > 4.2, colour


def facts(answers):
    return [page.facts(q, a, {"cache": None, "block_length": 32}) for q, a in zip(QUESTIONS, answers, strict=True)]


def hostile(replay):
    """The replay, every piece of it an attack, and the attacks as facts."""
    words = {token: HOSTILE[i % len(HOSTILE)] for i, token in enumerate(replay.words)}
    return dataclasses.replace(replay, words=words), {"question": HOSTILE[0], HOSTILE[2]: HOSTILE[1]}


def test_page_is_one_file_that_appears_whole(tmp_path, answers, replays, monkeypatch):
    file = tmp_path / "decode.html"
    file.write_text("before")
    page.write(file, replays, facts(answers))
    assert [p.name for p in tmp_path.iterdir()] == ["decode.html"]
    html = file.read_text("utf-8")
    assert "@DATA@" not in html
    assert not re.search(r"https?://|//[a-z]+\.|@import|url\(", html), "nothing is fetched"

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(page.os, "replace", full)
    with pytest.raises(OptionError, match=r"--html: .*decode.html cannot be written: No space left on device"):
        page.write(file, replays[:1], facts(answers)[:1])
    assert [p.name for p in tmp_path.iterdir()] == ["decode.html"]
    assert file.read_text("utf-8") == html


def test_page_data_cannot_end_its_script(tmp_path, replays):
    replay, fact = hostile(replays[0])
    page.write(tmp_path / "hostile.html", [replay], [fact])
    html = (tmp_path / "hostile.html").read_text("utf-8")
    data = re.search(r'id="data">(.*?)</script>', html, re.S)[1]
    assert "<" not in data
    assert json.loads(data)[0]["facts"] == fact
    assert set(json.loads(data)[0]["words"].values()) <= set(HOSTILE)
    assert html.count("<script") == 2


def test_page_that_cannot_be_written(tmp_path, replays, answers):
    (tmp_path / "file").write_text("")
    for path, problem in {
        tmp_path / "absent" / "a.html": "the directory .*absent does not exist",
        tmp_path: "is a directory",
        tmp_path / "file" / "a.html": "the directory .*file does not exist",
        tmp_path / ("a" * 300): "cannot be written: File name too long",
    }.items():
        with pytest.raises(OptionError, match=f"--html: expected a file to write, but .*{problem}; name a file"):
            page.check(path)
        with pytest.raises(OptionError, match="--html"):
            page.write(path, replays, facts(answers))
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    page.check(tmp_path / "new.html")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver", reason="the page is read in a browser: pip install selenium")
    from selenium.webdriver.chrome.service import Service

    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("the page is read in a browser: chromium and chromedriver are not both installed")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    switches = ["headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking"]
    switches += ["disable-component-update", "disable-sync", f"user-data-dir={tmp_path_factory.mktemp('chromium')}"]
    for switch in switches:
        options.add_argument(f"--{switch}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=Service(driver))
    browser.set_window_size(1200, 1000)
    browser.set_page_load_timeout(60)
    yield browser
    browser.quit()


@pytest.fixture
def visit(browser, tmp_path):
    """Write a page and open it; afterwards it must have logged nothing and asked for nothing but itself."""

    def visit(replays, facts):
        file = tmp_path / "decode.html"
        page.write(file, replays, facts)
        for kind in ("browser", "performance"):
            browser.get_log(kind)
        browser.get(file.as_uri())
        return browser

    yield visit
    assert browser.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert {url for url in asked if not url.startswith("data:")} == {(tmp_path / "decode.html").as_uri()}
    assert browser.execute_script("return performance.getEntriesByType('resource').map((e) => e.name)") in ([], ["data:,"])


def canvas(browser):
    """Of every position its text and its state."""
    return browser.execute_script(
        """const states = ["prompt", "masked", "accepted", "filled"];
           return [...document.querySelectorAll("#canvas [data-position]")]
             .sort((a, b) => a.dataset.position - b.dataset.position)
             .map((span) => [span.textContent, states.filter((state) => span.classList.contains(state)).join()]);"""
    )


def element(browser, selector):
    return browser.find_element("css selector", selector)


def test_page_steps_as_the_trace_says(visit, answers, replays):
    from selenium.webdriver.common.keys import Keys

    browser = visit(replays[:1], facts(answers)[:1])
    replay, pieces = replays[0], replays[0].pieces
    steps, slider = len(replay.forwards), element(browser, "#step")
    assert int(slider.get_property("value")) == steps, "it opens on the finished canvas"
    assert not element(browser, "#replay").is_displayed()
    assert len(browser.find_elements("css selector", "#bars [data-forward]")) == steps
    slider.send_keys(Keys.HOME)
    for step in range(steps + 1):
        states = replay.states(step)
        assert canvas(browser) == [["" if s == "masked" else p, s] for p, s in zip(pieces, states, strict=True)]
        count = element(browser, "#count").text
        assert slider.get_attribute("aria-valuetext") == count
        present = browser.find_elements("css selector", "#bars .present")
        block = browser.find_elements("css selector", ".block.present")
        if step == 0:
            assert count == f"before forward 1 of {steps}: 0 of {replay.generated} decided"
            assert not present and not block
        else:
            f = replay.forwards[step - 1]
            plural = "" if f.accepted == 1 else "s"
            told = f"forward {step} of {steps}: +{f.accepted} token{plural}, {f.done} of {replay.generated} decided"
            assert count == told + (f", {replay.filled} filled after EOS" if step == steps else "")
            assert [bar.get_attribute("data-forward") for bar in present] == [str(step)]
            assert "whole" in present[0].get_attribute("class") if f.whole else "window" in present[0].get_attribute("class")
            assert [b.find_element("css selector", "h3").text.split("\n") for b in block] == [
                [f"block [{f.start}, {f.end})", "whole canvas" if f.whole else "window"]
            ]
            assert len(browser.find_elements("css selector", ".fresh")) == f.accepted
        # The slider's own keys, and the page's where the slider has no focus.
        (slider if step % 2 else element(browser, "body")).send_keys(Keys.ARROW_RIGHT)
        if not step % 2:
            browser.execute_script("document.activeElement.blur()")
    element(browser, "body").send_keys(Keys.ARROW_LEFT)
    element(browser, '#bars [data-forward="1"]').click()
    assert element(browser, "#count").text.startswith("forward 1 of")


def test_page_tells_about_the_token_pointed_at(visit, answers, replays):
    from selenium.webdriver.common.action_chains import ActionChains

    browser = visit(replays[:1], facts(answers)[:1])
    replay = replays[0]
    step = next(s for s in range(1, len(replay.forwards)) if replay.proposed(s))
    element(browser, f'#bars [data-forward="{step}"]').click()

    def title(position):
        span = element(browser, f'[data-position="{position}"]')
        ActionChains(browser).move_to_element(span).perform()
        assert element(browser, "#about").text == span.get_attribute("title")
        return span.get_attribute("title")

    for position, token in list(replay.proposed(step).items())[:3]:
        says = f'position {position} · masked · forward {step} proposes token {token} "{replay.words[token]}"'
        assert title(position) == says
    position = int(np.flatnonzero(replay.accepted_at == 1)[0])
    token = int(replay.tokens[position])
    assert title(position) == (
        f'position {position} · token {token} "{replay.words[token]}" · accepted by forward 1 · '
        f"confidence {replay.confidence[position]:.4f}"
    )
    assert title(len(replay.tokens) - 1) == f"position {len(replay.tokens) - 1} · masked"
    assert title(0).startswith("position 0 · prompt · token")


def test_page_colours_plays_and_changes_the_answer(visit, answers, replays):
    from selenium.webdriver.support.ui import Select, WebDriverWait

    browser = visit(replays, facts(answers))

    def colours():
        return browser.execute_script(
            "return [...document.querySelectorAll('#canvas .accepted')].map((s) => getComputedStyle(s).backgroundColor)"
        )

    by_forward = colours()
    accepted = replays[0].accepted_at[replays[0].accepted_at > 0]
    assert len(set(by_forward)) == len(set(accepted.tolist()))
    Select(element(browser, "#colour")).select_by_value("confidence")
    by_confidence = colours()
    assert all(a != b for a, b in zip(by_forward, by_confidence, strict=True))
    assert len(set(by_confidence)) > 1
    assert "0.99" in element(browser, "#legend").text
    Select(element(browser, "#colour")).select_by_value("forward")
    assert colours() == by_forward

    play, slider = element(browser, "#play"), element(browser, "#step")
    play.click()
    assert play.text == "Pause"
    WebDriverWait(browser, 20, 0.05).until(lambda _: 0 < int(slider.get_property("value")) < len(replays[0].forwards))
    play.click()
    assert play.text == "Play"

    assert element(browser, "#replay").is_displayed()
    Select(element(browser, "#replay")).select_by_index(1)
    assert [text for text, _ in canvas(browser)] == replays[1].pieces
    assert int(slider.get_property("max")) == len(replays[1].forwards)
    assert QUESTIONS[1] in element(browser, "#facts").text
    assert f"{answers[1].tokens_per_forward:.2f}" in element(browser, "#facts").text


def test_page_shows_hostile_text_as_text(visit, replays):
    replay, fact = hostile(replays[0])
    browser = visit([replay, replay], [fact, fact])
    assert [text for text, _ in canvas(browser)] == replay.pieces
    assert element(browser, "#facts dd").text == HOSTILE[0]
    assert browser.execute_script("return typeof window.hacked") == "undefined"
    assert browser.execute_script("return [document.scripts.length, document.images.length]") == [2, 0]


def test_page_of_a_long_decode_stays_quick(visit):
    length, prompt, block = 4096, 96, 32
    forwards = length - prompt
    at = np.where(np.arange(length) < prompt, -1, np.arange(length) - prompt).astype(np.int32)
    rng = np.random.default_rng(0)
    trace = Trace(
        accepted_at=at,
        confidence=rng.random(length, np.float32),
        proposals=rng.integers(0, 500, (forwards, block), np.int32),
        starts=(prompt + np.arange(forwards) // block * block).astype(np.int32),
        whole=np.arange(forwards) % block == 0,
    )
    answer = SimpleNamespace(trace=trace, canvas=rng.integers(0, 500, length, np.int32), prompt_length=prompt)
    browser = visit([frames.replay(answer, None)], [{"question": "long"}])
    slowest = browser.execute_script(
        """const slider = document.getElementById("step"), took = [];
           for (const step of [0, 1, 2, 2000, 4000, 3999, 0]) {
             const began = performance.now();
             slider.value = step;
             slider.dispatchEvent(new Event("input"));
             document.body.offsetHeight;
             took.push(performance.now() - began);
           }
           return Math.max(...took);"""
    )
    assert element(browser, "#count").text == f"before forward 1 of {forwards}: 0 of {forwards} decided"
    assert slowest < 3000, f"a step took {slowest:.0f} ms"
