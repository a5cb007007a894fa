"""The page: its parts, their places, and which action answers which event."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr
from crab_edge_apps.demo import markup
from crab_edge_apps.demo.actions import Actions
from crab_edge_apps.demo.api import endpoint
from crab_edge_apps.demo.render import Changes, Parts, Renderer, choices, header
from crab_edge_apps.demo.texts import LANGUAGES, preferred, say

if TYPE_CHECKING:
    from crab_edge_apps.demo.visitors import Visitors
    from crab_edge_apps.demo.worker import Worker

    from crab_edge.session import Model

# What the page is made in; it changes when the browser prefers another language.
FIRST = "en"
STATIC = Path(__file__).parent / "static"
# Ours to stream and to queue: Gradio's own queue only passes events on.
_PASS: dict[str, Any] = {"concurrency_limit": None, "show_progress": "hidden", "api_visibility": "private"}
# What doesn't stream isn't queued either: one request with its answer.
_DIRECT: dict[str, Any] = {"queue": False, **_PASS}

# The model sees 224 x 224 pixels; Gradio would ask for 1920 x 1440.
_CAMERA = {"video": {"width": {"ideal": 640}, "height": {"ideal": 480}}, "audio": True}


@dataclass(frozen=True)
class Shown:
    """What the page says about itself. `language`: None follows the browser."""

    max_mb: float
    max_minutes: float
    language: str | None


def build(model: Model, visitors: Visitors, workers: tuple[Worker, Worker], shown: Shown) -> gr.Blocks:
    """The page over a model. `workers`: for answering and for decoding."""
    first = shown.language or FIRST
    with gr.Blocks(title="Crab Edge", analytics_enabled=False, fill_width=True) as blocks:
        parts = _lay_out(first)
        renderer = Renderer(model, parts, (shown.max_mb, shown.max_minutes))
        for part, change in renderer.everything(None, first).items():
            if isinstance(change, str):
                part.value = change
        # Before the page's own events, one of which would take the name.
        gr.api(endpoint(visitors, *workers), api_name="ask", concurrency_limit=None)
        _wire(blocks, Actions(visitors, *workers, renderer, parts), parts, shown.language)
    return blocks


def _lay_out(language: str) -> Parts:
    parts = Parts()

    def words(key: str) -> str:
        return say(language, key)

    def labelled(component: Any, prop: str, key: str) -> Any:
        parts.labelled.append((component, prop, key))
        return component

    def html(name: str, card: bool = False, **options: Any) -> Any:
        classes = ["ce-html", *(["ce-card"] if card else [])]
        plain: dict[str, Any] = {"js_on_load": None, "apply_default_css": False}
        return gr.HTML(elem_id=f"ce-{name}", elem_classes=classes, **plain, **options)

    with gr.Row(elem_id="ce-top"):
        parts.header = html("header", value=header(language))
        parts.language = gr.Radio(
            [(name, code) for code, name in LANGUAGES.items()],
            value=language,
            show_label=False,
            container=False,
            elem_id="ce-language",
            min_width=150,
            scale=0,
        )
    with gr.Row(elem_id="ce-main", equal_height=False):
        with gr.Column(scale=5, min_width=320, elem_id="ce-left", elem_classes="ce-card"):
            parts.stage = html("stage")
            parts.message = html("message")
            with gr.Row(elem_id="ce-sources"):
                parts.file = labelled(
                    gr.UploadButton(
                        words("file"),
                        file_count="multiple",
                        variant="primary",
                        elem_id="ce-file",
                        size="md",
                        min_width=110,
                    ),
                    "label",
                    "file",
                )
                for name in ("camera", "microphone", "example"):
                    button = gr.Button(words(name), elem_id=f"ce-{name}-button", size="md", min_width=90)
                    setattr(parts, name if name == "example" else f"{name}_button", button)
                    labelled(button, "value", name)
            parts.camera = labelled(
                gr.Video(
                    sources=["webcam"],
                    include_audio=True,
                    # Mirroring would need the ffmpeg program, and would show the model a mirror image.
                    webcam_options=gr.WebcamOptions(mirror=False, constraints=_CAMERA),
                    label=words("camera_label"),
                    visible=False,
                    height=300,
                    elem_id="ce-camera",
                ),
                "label",
                "camera_label",
            )
            parts.microphone = labelled(
                gr.Audio(
                    sources=["microphone"],
                    type="filepath",
                    label=words("microphone_label"),
                    visible=False,
                    editable=False,
                    elem_id="ce-microphone",
                ),
                "label",
                "microphone_label",
            )
        with gr.Column(scale=6, min_width=320, elem_id="ce-right", elem_classes="ce-card"):
            with gr.Row(elem_id="ce-asking"):
                parts.question = labelled(
                    gr.Textbox(
                        label=words("question"),
                        placeholder=words("question_hint"),
                        lines=1,
                        max_lines=4,
                        max_length=2000,
                        elem_id="ce-question",
                        scale=3,
                        min_width=220,
                    ),
                    "label",
                    "question",
                )
                parts.task = labelled(
                    gr.Dropdown(
                        choices(None, language),
                        value="",
                        label=words("task"),
                        elem_id="ce-task",
                        scale=2,
                        min_width=200,
                    ),
                    "label",
                    "task",
                )
            parts.suggestions = html("suggestions")
            with gr.Row(elem_id="ce-buttons"):
                parts.go = gr.Button(words("go"), variant="primary", elem_id="ce-go", min_width=100)
                parts.go_all = gr.Button(words("go_all"), elem_id="ce-go-all", min_width=110)
                parts.stop = gr.Button(words("stop"), variant="stop", elem_id="ce-stop", min_width=80)
                for part, key in ((parts.go, "go"), (parts.go_all, "go_all"), (parts.stop, "stop")):
                    labelled(part, "value", key)
            parts.options = labelled(
                gr.Accordion(words("options"), open=False, elem_id="ce-options"), "label", "options"
            )
            with parts.options:
                for name, key in (("record", "router_record"), ("untrained", "untrained_too")):
                    box = gr.Checkbox(False, label=words(key), container=False, elem_id=f"ce-{name}")
                    setattr(parts, name, box)
                    labelled(box, "label", key)
            parts.answers_heading = html("answers-heading", value=markup.heading(words("answers")))
            with gr.Column(elem_id="ce-talk"):
                parts.live = html("live")
                parts.thread = html("thread")
    parts.timeline = html("timeline", card=True)
    parts.pictures = html("pictures", card=True)
    with gr.Row(elem_id="ce-bottom", equal_height=True):
        with gr.Column(scale=6, min_width=320, elem_classes="ce-card"):
            parts.panel = html("panel")
        with gr.Column(scale=5, min_width=320, elem_classes="ce-card"):
            parts.exports = html("exports")
            parts.make_video = labelled(
                gr.Button(words("export_video"), visible=False, elem_id="ce-make-video", size="md"),
                "value",
                "export_video",
            )
            parts.made_video = html("made-video")
    parts.router = html("router", card=True)
    return parts


def _wire(blocks: gr.Blocks, actions: Actions, parts: Parts, language: str | None) -> None:
    every, changed = parts.all(), parts.about_answers()
    # Raw file data: our own check of the paths, and no file of Gradio's making beside them. While one clip
    # opens another may be chosen.
    raw: dict[str, Any] = {"preprocess": False, "trigger_mode": "multiple", **_PASS}
    parts.file.upload(actions.open_files, [parts.file, parts.language], every, **raw)
    for recorder in (parts.camera, parts.microphone):
        recorder.change(actions.open_recording, [recorder, parts.language], every, **raw)
    parts.example.click(actions.open_example, [parts.language], every, **_PASS)
    one = [parts.question, parts.task, parts.record, parts.language]
    for asked in (
        parts.go.click(actions.ask, one, parts.live, **_PASS),
        parts.question.submit(actions.ask, one, parts.live, **_PASS),
        parts.go_all.click(
            actions.ask_all, [parts.question, parts.untrained, parts.language], parts.live, **_PASS
        ),
    ):
        asked.then(actions.told, [parts.language], changed, **_DIRECT)
    parts.stop.click(actions.stop, None, parts.live, **_DIRECT)
    parts.make_video.click(actions.make_video, [parts.language], parts.made_video, **_PASS)

    def toggle(which: str) -> Changes:
        other = "microphone" if which == "camera" else "camera"
        shown, hidden = getattr(parts, which), getattr(parts, other)
        return {shown: gr.update(visible=True), hidden: gr.update(visible=False)}

    for which, button in (("camera", parts.camera_button), ("microphone", parts.microphone_button)):
        button.click(lambda which=which: toggle(which), None, [parts.camera, parts.microphone], **_DIRECT)

    def arrive(request: gr.Request) -> Changes:
        wanted = language or preferred(request.headers.get("accept-language", ""))
        if wanted == (language or FIRST):
            return {parts.language: gr.skip()}
        return {parts.language: wanted, **actions.speak(wanted, request)}

    parts.language.input(actions.speak, [parts.language], every, trigger_mode="always_last", **_DIRECT)
    blocks.load(arrive, None, every, **_DIRECT)
    blocks.unload(actions.leave)
