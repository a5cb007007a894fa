"""`crab-edge VERB ...`: each module here with a function `command` (or its own name) or an `app` is a verb.

A verb's module is imported only when it is asked for, and imports what is heavy inside its function, so that
`crab-edge --help` answers at once. Errors are one line on stderr and an exit code: 1 our fault, 2 the user's
input, 3 a check below its threshold, 130 interrupted.
"""

from __future__ import annotations

import importlib
import logging
import os
import pkgutil
import shlex
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import crab_edge_apps
import typer
from crab_edge_apps._text import printable

from crab_edge import __version__
from crab_edge.errors import CrabError

NAME = "crab-edge"
EXTRAS = {
    "cpu": ("onnxruntime",),
    "train": ("torch", "transformers", "peft", "accelerate", "safetensors", "scipy", "soundfile"),
    "qlora": ("bitsandbytes",),
    "export": ("onnx", "onnxscript", "onnx_ir", "optimum"),
    "segment": ("cv2",),
    "demo": ("gradio",),
    "ray": ("ray",),
}
INTRODUCTION = "Ask audio-visual language models about clips, on this machine."


def verbs() -> list[str]:
    """Names of the modules that may hold a verb."""
    names = (module.name for module in pkgutil.iter_modules(crab_edge_apps.__path__))
    return sorted(name for name in names if name != "cli" and not name.startswith("_"))


def build(only: str | None = None) -> typer.Typer:
    """The application; with `only`, that verb alone (enough to run it, and quicker)."""
    app = typer.Typer(
        name=NAME,
        help=INTRODUCTION,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    def show_version(wanted: bool) -> None:
        if wanted:
            print(f"{NAME} {__version__}")
            raise typer.Exit()

    @app.callback()
    def _root(
        version: bool = typer.Option(
            False, "--version", help="Print the version and leave.", callback=show_version, is_eager=True
        ),
        debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error."),
    ) -> None:
        pass

    found = verbs()
    for name in [only] if only in found else found:
        module = importlib.import_module(f"crab_edge_apps.{name}")
        verb = name.replace("_", "-")
        function = getattr(module, "command", None) or getattr(module, name, None)
        if callable(function):
            app.command(verb)(function)
        elif isinstance(getattr(module, "app", None), typer.Typer):
            app.add_typer(module.app, name=verb)
    return app


def run(arguments: Sequence[str]) -> int:
    """Runs one command line; the exit code. Nothing but `CrabError` and usage errors counts as expected."""
    arguments = list(arguments)
    debug = "--debug" in arguments[:1] or bool(os.environ.get("CRAB_EDGE_DEBUG"))
    first = next((argument for argument in arguments if not argument.startswith("-")), None)
    try:
        command = typer.main.get_command(build(first.replace("-", "_") if first else None))
        result = command.main(args=arguments, prog_name=NAME, standalone_mode=False)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except KeyboardInterrupt:
        return _fail("interrupted", 130, debug)
    except BrokenPipeError:
        # The reader of our output has left; there is nobody to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except CrabError as error:
        return _fail(str(error), error.exit_code, debug)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        extra = next((name for name, packages in EXTRAS.items() if package in packages), None)
        if extra is None:
            return _unexpected(error, arguments, debug)
        way = f"`pip install 'crab-edge[{extra}]'`"
        return _fail(f"this command needs {package}, which isn't installed; run {way}", 2, debug)
    except Exception as error:
        if _is_usage_error(error):
            return _fail(f"{_usage(error)} (see `{_where(error)} --help`)", 2, debug)
        if type(error).__name__ == "Abort":
            return _fail("interrupted", 130, debug)
        return _unexpected(error, arguments, debug)


def _unexpected(error: Exception, arguments: list[str], debug: bool) -> int:
    again = shlex.join([NAME, "--debug", *arguments])
    return _fail(f"unexpected {type(error).__name__}: {error}; the traceback: `{again}`", 1, debug)


def _fail(message: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    sys.stdout.flush()
    print(f"{NAME}: error: {printable(' '.join(message.split()), keep='')}", file=sys.stderr)
    return code


def _is_usage_error(error: Exception) -> bool:
    # Newer typer carries its own copy of click, so the class depends on its version.
    return hasattr(error, "format_message") and hasattr(error, "exit_code")


def _usage(error: Any) -> str:
    return str(error.format_message()).strip().rstrip(".") or "wrong usage"


def _where(error: Any) -> str:
    context = getattr(error, "ctx", None)
    return str(context.command_path) if context is not None else NAME


def main() -> None:
    """Entry point of the `crab-edge` script."""
    # bitsandbytes reports an optional kernel for CPUs as missing whenever PEFT imports it: nothing that the
    # user did or could change.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
