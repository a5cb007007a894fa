"""The page: its parts, their places, and which action answers which event."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr
from crab_edge_apps.demo import markup
from crab_edge_apps.demo.actions import Actions, Changes
from crab_edge_apps.demo.texts import LANGUAGES, for_browser, preferred, say

STATIC = Path(__file__).parent / "static"
# Ours to stream and to queue: Gradio's own queue only passes events on.
_PASS = {"concurrency_limit": None, "show_progress": "hidden", "api_visibility": "private"}


@dataclass
class Parts:
    """The page's components by what they are for. `labelled`: (component, property, key of its text)."""

    header: Any = None
    language: Any = None
    stage: Any = None
    message: Any = None
    file: Any = None
    camera_button: Any = None
    microphone_button: Any = None
    example: Any = None
    camera: Any = None
    microphone: Any = None
    question: Any = None
    task: Any = None
    go: Any = None
    go_all: Any = None
    stop: Any = None
    options: Any = None
    untrained: Any = None
    record: Any = None
    suggestions: Any = None
    answers_heading: Any = None
    live: Any = None
    thread: Any = None
    timeline: Any = None
    pictures: Any = None
    panel: Any = None
    exports: Any = None
    make_video: Any = None
    made_video: Any = None
    router: Any = None
    labelled: list[tuple[Any, str, str]] = field(default_factory=list)

    def all(self) -> list[Any]:
        """Every component."""
        return [part for name, part in vars(self).items() if name != "labelled"]


def build(actions: Actions, language: str | None) -> gr.Blocks:
    """The page. `language`: None follows the browser."""
    first = language or "en"
    with gr.Blocks(title="Crab Edge", analytics_enabled=False, fill_width=True) as blocks:
        parts = _lay_out(actions, first)
        actions.parts = parts
        for part, change in actions.everything(None, first).items():
            if isinstance(change, str):
                part.value = change
        _wire(blocks, actions, parts, language)
    return blocks


def _lay_out(actions: Actions, language: str) -> Parts:
    parts = Parts()

    def words(key: str) -> str:
        return say(language, key)

    def labelled(component: Any, prop: str, key: str) -> Any:
        parts.labelled.append((component, prop, key))
        return component

    def html(name: str, card: bool = False, **options: Any) -> Any:
        classes = ["ce-html", *(["ce-card"] if card else [])]
        return gr.HTML(elem_id=f"ce-{name}", elem_classes=classes, js_on_load=None, **options)

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
                    webcam_options=gr.WebcamOptions(mirror=False),
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
                        actions.choices(None, language),
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
                parts.stop = gr.Button(
                    words("stop"), variant="stop", interactive=False, elem_id="ce-stop", min_width=80
                )
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


def header(language: str) -> str:
    """Name, one line of explanation, and the texts that the page's script shows."""
    texts = "".join(
        f' data-{key.replace("_", "-")}="{markup.text(value)}"' for key, value in for_browser(language).items()
    )
    name = "Crab Edge"
    return (
        f'<header class="ce-header" data-language="{language}"{texts}>{_MARK}'
        f"<div><h1>{name}</h1><p>{markup.text(say(language, 'tagline'))}</p></div></header>"
    )


_MARK = (
    '<svg class="ce-mark" viewBox="0 0 40 40" aria-hidden="true" fill="none" stroke="currentColor" '
    'stroke-width="2.4" stroke-linecap="round" stroke-linejoin="round">'
    '<path d="M9 23c0-6 5-9 11-9s11 3 11 9-5 9-11 9-11-3-11-9z"/><path d="M15 14V9M25 14V9"/>'
    '<path d="M9 20C4 18 3 13 6 8l3 4M31 20c5-2 6-7 3-12l-3 4"/><path d="M9 27l-5 3M31 27l5 3M12 31l-3 4M28 31l3 4"/>'
    '<path d="M16 24c2.500 2 5.500 2 8 0"/></svg>'
)


def _wire(blocks: gr.Blocks, actions: Actions, parts: Parts, language: str | None) -> None:
    every = parts.all()
    for source, event in ((parts.file, "upload"), (parts.camera, "change"), (parts.microphone, "change")):
        getattr(source, event)(actions.open_files, [source, parts.language], every, **_PASS)
    parts.example.click(actions.open_example, [parts.language], every, **_PASS)
    asked = [parts.question, parts.task, parts.record, parts.language]
    parts.go.click(actions.ask, asked, every, **_PASS)
    parts.question.submit(actions.ask, asked, every, **_PASS)
    parts.go_all.click(actions.ask_all, [parts.question, parts.untrained, parts.language], every, **_PASS)
    parts.stop.click(actions.stop, None, None, queue=False, **_PASS)
    parts.make_video.click(actions.make_video, [parts.language], every, **_PASS)

    def toggle(which: str) -> Changes:
        other = "microphone" if which == "camera" else "camera"
        return {getattr(parts, which): gr.update(visible=True), getattr(parts, other): gr.update(visible=False)}

    for which, button in (("camera", parts.camera_button), ("microphone", parts.microphone_button)):
        button.click(lambda which=which: toggle(which), None, [parts.camera, parts.microphone], **_PASS)

    def speak(code: str, request: gr.Request) -> Changes:
        return _translated(actions, parts, code, str(request.session_hash))

    def arrive(request: gr.Request) -> Changes:
        code = language or preferred(request.headers.get("accept-language", ""))
        return {parts.language: code, **_translated(actions, parts, code, str(request.session_hash))}

    parts.language.input(speak, [parts.language], every, **_PASS)
    blocks.load(arrive, None, every, **_PASS)
    blocks.unload(actions.leave)


def _translated(actions: Actions, parts: Parts, language: str, key: str) -> Changes:
    """The whole page in a language."""
    labels = {
        component: gr.update(**{prop: say(language, text)}) for component, prop, text in parts.labelled
    }
    changes = actions.everything(actions.visitors.get(key), language)
    for component, update in labels.items():
        before = changes.get(component)
        changes[component] = {**before, **update} if isinstance(before, dict) else update
    changes[parts.question] = gr.update(
        label=say(language, "question"), placeholder=say(language, "question_hint")
    )
    changes[parts.header] = header(language)
    changes[parts.answers_heading] = markup.heading(say(language, "answers"))
    return changes
