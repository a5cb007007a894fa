"""`crab-edge ask`: what is seen and heard in a clip, or the answer to a question about it."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from crab_edge.results import Answer
    from crab_edge.session import Model, Session


def command(
    items: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MEDIA... [QUESTION]", help="Media of one clip; the question last, in quotes."
        ),
    ] = None,
    task: Annotated[
        list[str] | None, typer.Option("--task", "-t", help="Task to run; repeat it or join with commas.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line for each answer.")] = False,
    video: Annotated[list[Path] | None, typer.Option(help="Use this file's video only.")] = None,
    image: Annotated[list[Path] | None, typer.Option(help="Use this file as a still image.")] = None,
    audio: Annotated[list[Path] | None, typer.Option(help="Use this file's audio only.")] = None,
    sample: Annotated[
        bool, typer.Option("--sample", help="Use the clip that ships with the package.")
    ] = False,
    bundle: Annotated[
        Path | None, typer.Option("--bundle", "-b", help="Model bundle; default: the packaged crab-nano.")
    ] = None,
    engine: Annotated[
        str,
        typer.Option(
            "--engine", "-e", help="Engine, and how: onnxruntime, onnxruntime:cuda, tensorrt, torch:cuda."
        ),
    ] = "auto",
    threads: Annotated[int | None, typer.Option(help="CPU threads; default: all there are.")] = None,
    window: Annotated[
        float,
        typer.Option(
            help="Seconds of the windows that longer clips are cut into, 10 to 60; `plan` says what fits."
        ),
    ] = 10.0,
    low_memory: Annotated[
        bool | None,
        typer.Option(
            "--low-memory/--keep-encoders",
            help="Close the encoders before the decoder opens; default: where memory is short.",
        ),
    ] = None,
    max_minutes: Annotated[float, typer.Option(help="Refuse longer clips; `analyze` takes any.")] = 10.0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 512,
    grammar: Annotated[
        bool,
        typer.Option(
            "--grammar/--no-grammar", help="Hold answers to their task's form, or let the model talk."
        ),
    ] = True,
    router: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.npz|FILE.jsonl",
            help="Write which expert spoke, by layer and token; of several tasks FILE.TASK.npz each.",
        ),
    ] = None,
) -> None:
    """Run every task that applies to a clip, or answer a question about it."""
    started = time.perf_counter()
    from crab_edge_apps._media_arguments import forced_kinds, split_question

    forced = {"video": video or [], "image": image or [], "audio": audio or []}
    words, question = split_question(items or [], media_elsewhere=sample or any(forced.values()))
    names = [name.strip() for entry in task or [] for name in entry.split(",") if name.strip()]
    media = [Path(word) for word in words]
    if sample:
        from crab_edge.bundle import sample_clip

        media.insert(0, sample_clip())
    kinds = forced_kinds(forced, media)
    media += [path for paths in forced.values() for path in paths if path not in media]
    _check(media, names)
    if router is not None:
        from crab_edge.router import check_path

        check_path(router)

    from crab_edge_apps import render
    from crab_edge_apps._text import printable

    how = {"threads": threads, "low_memory": low_memory}
    session = _open(media, kinds, bundle, engine, how, max_minutes, window)
    model = session.model
    how: dict[str, Any] = {"max_new_tokens": max_tokens, "grammar": grammar, "router": router is not None}
    if question is not None and len(names) <= 1 and not as_json:
        answers = [_stream(session, question, names[0] if names else None, how)]
    else:
        answers = _answers(session, question, names, how)
        if not as_json:
            render.heading(session.clip, media)
            for answer in answers:
                render.answer(answer, model)
    if as_json:
        for answer in answers:
            line = json.dumps(to_json(answer, media, model), ensure_ascii=False)
            print(line.encode("utf-8", "backslashreplace").decode())
    else:
        render.notices(answers)
        render.footer(model, time.perf_counter() - started)
    for path in _save_traces(router, answers) if router is not None else ():
        if not as_json:
            print(f"router trace: {printable(str(path))}")


def _check(media: list[Path], names: list[str]) -> None:
    """What can be refused before anything is opened."""
    from crab_edge import tasks
    from crab_edge.errors import InputError

    if not media:
        raise InputError('no media given; use `crab-edge ask CLIP ["QUESTION"]` or `crab-edge ask --sample`')
    for path in media:
        if path.is_dir():
            raise InputError(
                f"{path}: a folder, but ask takes one clip; use `crab-edge analyze {path} --task T --out DIR`"
            )
    for name in names:
        tasks.get(name)


def _open(
    media: list[Path],
    kinds: dict[Path, str],
    bundle: Path | None,
    engine: str,
    how: dict[str, Any],
    max_minutes: float,
    window_s: float,
) -> Session:
    import crab_edge
    from crab_edge.clip import Clip

    # The clip first: its errors are the likelier ones.
    clip = Clip.open(media, kinds=kinds, max_minutes=max_minutes)
    return crab_edge.load(bundle, engine, **how).open(clip, window_s=window_s)


def _answers(session: Session, question: str | None, names: list[str], how: dict[str, Any]) -> list[Answer]:
    from crab_edge import tasks
    from crab_edge.errors import TaskError

    if question is not None:
        names = names or ["avqa"]
        if not any(tasks.get(name).needs_question for name in names):
            raise TaskError(
                f"no task of {', '.join(names)} takes a question; leave it out or use --task avqa"
            )
    if names:
        return session.ask_all(names, question, **how)
    answers = session.ask(**how)
    return answers if isinstance(answers, list) else [answers]


def _save_traces(path: Path, answers: list[Answer]) -> list[Path]:
    """One trace goes to `path`, several to files beside it with the task in their names; those written."""
    traces = [(answer.task, answer.router) for answer in answers if answer.router is not None]
    paths: list[Path] = []
    for task, trace in traces:
        place = path if len(traces) == 1 else path.with_suffix(f".{task}{path.suffix}")
        if place not in paths:
            trace.save(place)
            paths.append(place)
    return paths


def _stream(session: Session, question: str, name: str | None, how: dict[str, Any]) -> Answer:
    """Prints the answer as it comes, then what was understood of it."""
    from crab_edge_apps import render
    from crab_edge_apps._text import printable

    stream = session.stream(question, name, **how)
    for piece in stream:
        sys.stdout.write(printable(piece))
        sys.stdout.flush()
    print()
    render.understood(stream.answer)
    return stream.answer


def to_json(answer: Answer, media: list[Path], model: Model) -> dict[str, Any]:
    """An answer with what it was made from and by."""
    return {
        "media": [str(path) for path in media],
        **answer.to_json(),
        "engine": model.engine.describe(),
        "bundle": model.bundle.identity,
    }
