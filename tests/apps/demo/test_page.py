"""The demo in a real Chromium, with the packaged model: what a visitor does, in a visitor's order."""

import threading
import time

import pytest

import crab_edge
from tests.apps.demo.conftest import visit

VIDEO = "#ce-player video"
NOW = f"document.querySelector('{VIDEO}').currentTime"
LONG = "Write down all you see and all you hear, from the beginning to the end?"


def upload(page, *files):
    page.set_input_files("#ce-left input[type=file]", files)


def opened(page, name):
    page.wait_for_selector(f"#ce-player .ce-name:has-text('{name}')")


def ask(page, question, answers):
    page.fill("#ce-question textarea", question)
    page.press("#ce-question textarea", "Enter")
    page.wait_for_selector(f"#ce-thread > * > * article >> nth={answers - 1}")


@pytest.fixture
def page(watched, demo):
    demo.brake.pause_s = 0.0
    yield watched.page
    demo.brake.pause_s = 0.0


def test_an_empty_page_says_what_to_do(page, pictures):
    page.screenshot(path=pictures / "1-empty.png", full_page=True)
    assert "Drop a video" in page.inner_text("#ce-stage") and "5 MB" in page.inner_text("#ce-stage")
    page.click("#ce-go")
    page.wait_for_selector("#ce-live .ce-error")
    assert "Open a clip first" in page.inner_text("#ce-live")


def said(clip, question):
    """What the packaged model answers without the demo around it."""
    return crab_edge.load().open(clip).ask(question).parsed[0].value


def test_a_clip_is_uploaded_asked_and_asked_again(page, demo, sample, tmp_path, pictures):
    mine = tmp_path / "my <b>guitar & ${7*6}.mp4"
    mine.write_bytes(sample.read_bytes())
    upload(page, mine)
    opened(page, "guitar")
    assert page.inner_text("#ce-player .ce-name") == mine.name
    # Not one file lies under a name that came from outside.
    kept = [path.relative_to(demo.store.root) for path in demo.store.root.rglob("*") if path.is_file()]
    assert sorted(path.name for path in kept) == ["0.mp4", "lock"], kept
    demo.brake.pause_s = 0.15
    page.evaluate(
        """() => { window.streamed = []; new MutationObserver(() => {
            const said = document.querySelector('.ce-stream');
            if (said) window.streamed.push(said.textContent);
        }).observe(document.body, {subtree: true, childList: true, characterData: true}); }"""
    )
    page.fill("#ce-question textarea", "How many different sounds can be heard?")
    page.press("#ce-question textarea", "Enter")
    page.wait_for_selector("#ce-live .ce-stream")
    page.screenshot(path=pictures / "2-streaming.png", full_page=True)
    page.wait_for_selector("#ce-thread article")
    seen = page.evaluate("window.streamed")
    assert any(text and text != seen[-1] and seen[-1].startswith(text) for text in seen)
    first = page.inner_text("#ce-thread article >> nth=0")
    assert said(sample, "How many different sounds can be heard?") in first
    assert "first token" in first and "clip read" in first
    ask(page, "What makes the sound?", 2)
    follow = page.inner_text("#ce-thread article >> nth=0")
    assert "electric guitar" in follow and "prefix reused" in follow
    panel = page.inner_text("#ce-panel")
    share = int(panel.partition("follow-up: ")[2].partition(" %")[0])
    assert share <= 100 and "onnxruntime" in panel and "crab-nano" in panel and "MB" in panel
    raw = page.locator("#ce-thread article >> nth=0").locator("details")
    assert not raw.locator("pre").is_visible()
    raw.locator("summary").click()
    assert "<answer>electric guitar</answer>" in raw.locator("pre").inner_text()
    page.screenshot(path=pictures / "3-answers.png", full_page=True)


def test_all_tasks_the_time_line_and_the_player(page, pictures):
    page.click("#ce-example-button")
    opened(page, "sample.mp4")
    page.fill("#ce-question textarea", "")
    page.click("#ce-go-all")
    page.wait_for_selector(".ce-all")
    cells = page.locator(".ce-cell code").all_inner_texts()
    assert {"ave", "avvp", "avcap"} <= set(cells) and "arig" not in cells
    assert "1 prefixes computed, 2 reused" in page.inner_text(".ce-all") or "reused" in page.inner_text(
        ".ce-all"
    )
    page.click(".ce-all details:has(.ce-skipped) summary")
    skipped = page.inner_text(".ce-skipped")
    assert "task arig needs" in skipped and "needs a question" in skipped and "wasn't trained" in skipped
    # Pictures above what is seen, the spectrogram above what is heard, each with its own events.
    assert page.locator(".ce-seen .ce-frames img").count() == 10
    assert page.locator(".ce-heard .ce-spectrogram").count() == 1
    assert page.locator(".ce-seen .ce-event").count() and page.locator(".ce-heard .ce-event").count()
    page.evaluate(f"{NOW} = 7.5")
    page.click(".ce-seen .ce-event >> nth=0")
    page.wait_for_function(f"{NOW} < 0.2")
    axis = page.locator(".ce-axis").bounding_box()
    page.mouse.click(axis["x"] + axis["width"] / 2, axis["y"] + 5)
    page.wait_for_function(f"Math.abs({NOW} - 5) < 0.2")
    page.screenshot(path=pictures / "4-all-tasks.png", full_page=True)


def test_the_time_line_by_keyboard(page):
    page.focus(".ce-heard .ce-event >> nth=0")
    page.evaluate(f"{NOW} = 7.5")
    page.keyboard.press("Enter")
    page.wait_for_function(f"{NOW} < 0.2")
    page.focus(".ce-axis")
    page.keyboard.press("End")
    page.wait_for_function(f"{NOW} > 9.5")
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    page.wait_for_function(f"Math.abs({NOW} - 0.5) < 0.1")
    assert page.get_attribute(".ce-axis", "aria-valuenow") == "0.5"


def test_exports(page):
    links = page.locator("#ce-exports a")
    assert links.all_inner_texts() == ["JSON", "CSV", "SRT", "VTT"]
    with page.expect_download() as waiting:
        links.nth(2).click()
    assert waiting.value.suggested_filename == "sample.srt"
    assert "00:00:00,000 --> 00:00:10,0" in waiting.value.path().read_text("utf-8")
    page.click("#ce-make-video")
    page.wait_for_selector("#ce-made-video a")
    with page.expect_download() as waiting:
        page.click("#ce-made-video a")
    assert waiting.value.path().read_bytes()[4:8] == b"ftyp"


def test_an_answer_is_stopped_midway(page, demo, pictures):
    page.click("#ce-example-button")
    opened(page, "sample.mp4")
    page.wait_for_selector("#ce-thread .ce-empty")
    demo.brake.pause_s = 0.4
    page.fill("#ce-question textarea", LONG)
    page.click("#ce-go")
    page.wait_for_selector("#ce-live .ce-stream")
    page.click("#ce-stop")
    page.wait_for_selector("#ce-thread article")
    assert "stopped before the answer's end" in page.inner_text("#ce-thread article")
    assert page.inner_text("#ce-live").strip() == ""
    demo.brake.pause_s = 0.0
    ask(page, "What makes the sound?", 2)
    assert "electric guitar" in page.inner_text("#ce-thread article >> nth=0")


def test_files_that_cant_be_used_are_refused_in_words(page, tmp_path, pictures):
    bad = tmp_path / "holiday <i>.mp4"
    bad.write_text("this is no film\n" * 50)
    upload(page, bad)
    page.wait_for_selector("#ce-message .ce-error")
    said = page.inner_text("#ce-message")
    assert (
        "holiday" in said and "not a media file" in said and str(tmp_path) not in said and "/tmp" not in said
    )
    page.screenshot(path=pictures / "5-bad-file.png", full_page=True)
    opened(page, "sample.mp4")  # the clip before is still there
    large = tmp_path / "large.mp4"
    large.write_bytes(b"\0" * 6_000_000)
    upload(page, large)
    page.wait_for_selector(".ce-said .ce-error")
    assert "large.mp4 is larger than 5 MB" in page.inner_text(".ce-said")


def test_a_clip_chosen_while_another_is_read(page, demo, sample, tmp_path, monkeypatch):
    first, second = tmp_path / "wrong.mp4", tmp_path / "right.mp4"
    for path in (first, second):
        path.write_bytes(sample.read_bytes())
    reading, gate, real = threading.Event(), threading.Event(), demo.model.open

    def held(media, **options):
        reading.set()
        assert gate.wait(30)
        return real(media, **options)

    monkeypatch.setattr(demo.model, "open", held)
    upload(page, first)
    assert reading.wait(30)
    page.fill("#ce-question textarea", "What makes the sound?")
    page.click("#ce-go")
    page.wait_for_selector("#ce-live .ce-error:has-text('still being read')")
    upload(page, second)
    page.wait_for_selector(".ce-said:has-text('right.mp4')")
    until = time.monotonic() + 30
    while not demo._decoding._jobs and time.monotonic() < until:
        page.wait_for_timeout(50)
    gate.set()
    opened(page, "right.mp4")
    assert page.inner_text("#ce-live").strip() == "" and page.inner_text("#ce-message").strip() == ""
    ask(page, "What makes the sound?", 1)


def test_a_recording_with_camera_and_microphone(page, pictures):
    page.click("#ce-camera-button")
    page.click("#ce-camera button")  # asks for the camera, which this browser makes up
    page.wait_for_selector("#ce-camera .capture-button")
    page.screenshot(path=pictures / "6-camera.png")
    page.click("#ce-camera .capture-button")
    page.wait_for_timeout(2000)
    page.click("#ce-camera .capture-button:has-text('Stop')")
    page.wait_for_selector("#ce-player .ce-name:has-text('webm')")
    facts = page.inner_text("#ce-stage figcaption")
    assert "with sound" in facts and "×" in facts
    assert page.locator(".ce-spectrogram").count() == 1 and page.locator(".ce-frames img").count() == 10
    page.click("#ce-microphone-button")
    page.wait_for_selector("#ce-microphone")
    page.wait_for_selector("#ce-camera", state="hidden")


def test_chinese(page, pictures):
    page.click("#ce-language label >> nth=1")
    page.wait_for_selector("#ce-timeline h2:has-text('时间线')")
    assert page.inner_text("#ce-go") == "提问" and page.evaluate("document.documentElement.lang") == "zh"
    page.screenshot(path=pictures / "7-chinese.png", full_page=True)
    page.click("#ce-language label >> nth=0")
    page.wait_for_selector("#ce-timeline h2:has-text('Time line')")


def test_a_phone_in_the_dark_and_its_clip_goes_with_it(demo, browser, sample, pictures):
    watched = visit(
        browser,
        demo.url,
        viewport={"width": 360, "height": 740},
        is_mobile=True,
        has_touch=True,
        locale="zh-CN",
        color_scheme="dark",
    )
    page = watched.page
    page.wait_for_selector("h2:has-text('机器')")
    before = set(demo.store.root.rglob("0.mp4"))
    upload(page, sample)
    opened(page, "sample.mp4")
    # What lies under the player doesn't jump when the browser has read the clip.
    page.wait_for_function(f"document.querySelector('{VIDEO}').readyState >= 1")
    unread = page.locator(VIDEO).evaluate(
        """read => {
            const unread = read.cloneNode(false);
            unread.removeAttribute('src');
            read.after(unread);
            const height = unread.getBoundingClientRect().height;
            unread.remove();
            return height;
        }"""
    )
    assert unread == pytest.approx(page.locator(VIDEO).bounding_box()["height"], abs=1)
    (mine,) = set(demo.store.root.rglob("0.mp4")) - before
    page.tap("#ce-go-all")
    page.wait_for_selector(".ce-all")
    page.screenshot(path=pictures / "8-phone.png", full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.context.close()
    watched.check()
    until = time.monotonic() + 20
    while mine.exists() and time.monotonic() < until:
        time.sleep(0.1)
    assert not mine.exists() and not mine.parent.exists()


def test_nothing_left_the_machine(watched, connected):
    assert watched.outside == [] and watched.errors == []
    assert {address for address in connected if not address.startswith("127.")} <= {"localhost", "::1"}
