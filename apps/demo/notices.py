"""The page's short notices: what is under way, why nothing was done, what went wrong."""

from __future__ import annotations

import traceback
from typing import Any

from crab_edge_apps.demo import markup
from crab_edge_apps.demo.texts import say
from crab_edge_apps.demo.worker import Busy, Tick

from crab_edge.errors import CrabError


def refused(language: str, key: str) -> str:
    """Why nothing was done."""
    return markup.error(say(language, "error"), say(language, key))


def explained(error: Exception, language: str) -> str:
    """An error in one line; what wasn't expected goes to the terminal as well."""
    if isinstance(error, Busy):
        reason = say(language, "busy")
    elif isinstance(error, CrabError):
        reason = " ".join(str(error).split())
    else:
        traceback.print_exception(error)
        reason = say(language, "unexpected", kind=type(error).__name__)
    return markup.error(say(language, "error"), reason)


def status(text: str) -> str:
    """Something is under way."""
    spinner = '<span class="ce-spinner" aria-hidden="true"></span>'
    return f'<p class="ce-status" role="status">{spinner}{markup.text(text)}</p>'


def waiting(event: Any, language: str) -> str | None:
    """How many are ahead in the queue, None where nobody is."""
    ahead = event.ahead if isinstance(event, Tick) else 0
    return say(language, "queued", n=ahead) if ahead else None
