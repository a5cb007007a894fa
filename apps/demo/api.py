"""The page's one endpoint for programs: `gradio_client.Client(url).predict(..., api_name="/ask")`."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
from crab_edge_apps.demo import asking
from crab_edge_apps.demo.turns import Turn
from crab_edge_apps.demo.visitors import Visitor, Visitors
from crab_edge_apps.demo.worker import Job, Worker

from crab_edge.errors import CrabError


def endpoint(visitors: Visitors, answering: Worker, decoding: Worker) -> Callable[..., Any]:
    """The function behind `/ask`: uploaded media in, answers as JSON out; media are removed at the end."""

    async def ask(media: list[dict], question: str = "", task: str = "") -> dict:
        """Answers a question about a clip or runs a task; with neither, every task that applies."""
        key = f"api-{secrets.token_hex(8)}"
        opening: Job | None = None
        try:
            paths, names = visitors.store.uploaded(media)
            opening = decoding.submit(lambda job: _opened(visitors, job, key, paths, names))
            visitor = await opening.wait()
            words, asked_at = question.strip() or None, time.perf_counter()

            def work(job: Job) -> Turn:
                session = visitors.session(visitor)
                if words is None and not task:
                    plan, _ = asking.plan(session, None, untrained=False)
                    return asking.all_tasks(job, session, None, plan, asked_at=asked_at)
                return asking.answer(job, session, words, task or None, router=False, asked_at=asked_at)

            visitor.job = answering.submit(work)
            turn: Turn = await visitor.job.wait()
        except CrabError as error:
            raise gr.Error(" ".join(str(error).split()), print_exception=False) from error
        finally:
            if opening is not None:
                opening.cancel()
            visitors.leave(key)
        model = visitors.model
        return {
            "media": names,
            "bundle": model.bundle.identity,
            "engine": model.engine.describe(),
            "first_token_s": turn.first_token_s,
            "answers": [answer.to_json() for answer in turn.answers],
        }

    return ask


def _opened(visitors: Visitors, job: Job, key: str, paths: list[Path], names: list[str]) -> Visitor:
    visitor = visitors.open(key, paths, names, unwanted=job.cancelled)
    if visitor is None or job.cancelled():  # the client left while its clip was being decoded
        visitors.leave(key)
        for path in paths:
            visitors.store.drop(path)
        raise CrabError("the client left")
    return visitor
