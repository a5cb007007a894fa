"""`crab-edge demo`: the model on a page of its own, served by this machine.

The page's parts, one job a file: `page` lays it out and `actions` answers its events; `stage`, `timeline`,
`answers` and `panel` turn results into HTML; `worker` lets one answer run at a time; `visitors` knows who has
which clip open; `store` is the private folder; `guard` and `server` decide who gets in.
"""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer


class Language(str, Enum):
    """The page's languages."""

    en = "en"
    zh = "zh"


def command(
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
    host: Annotated[str, typer.Option(help="Address to listen on; the default is this machine only.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes any free one.")] = 7860,
    share: Annotated[
        bool, typer.Option("--share", help="Open a public tunnel through gradio.live (leaves this machine).")
    ] = False,
    password: Annotated[
        str | None,
        typer.Option(
            envvar="CRAB_EDGE_PASSWORD",
            show_envvar=True,
            help="Ask for this password; better given by the environment, where `ps` doesn't show it.",
        ),
    ] = None,
    language: Annotated[
        Language | None, typer.Option(help="The page's language; default: what the browser prefers.")
    ] = None,
    max_mb: Annotated[float, typer.Option(help="Largest file that may be uploaded, in MB.")] = 200.0,
    max_minutes: Annotated[float, typer.Option(help="Longest clip.")] = 10.0,
    waiting: Annotated[int, typer.Option(min=1, help="Questions that may wait for the model.")] = 8,
    grammar: Annotated[
        bool, typer.Option("--grammar/--no-grammar", help="Hold answers to their task's form.")
    ] = True,
) -> None:
    """Serve a page for asking about clips; nothing on it comes from or goes to the internet."""
    from crab_edge_apps.demo.server import Settings, serve

    serve(
        Settings(
            bundle=bundle,
            engine=engine,
            threads=threads,
            host=host,
            port=port,
            share=share,
            password=password,
            language=language.value if language else None,
            max_mb=max_mb,
            max_minutes=max_minutes,
            waiting=waiting,
            grammar=grammar,
        )
    )
