"""`optimum-cli export crab`: the command `crab-edge export` under Optimum's command line.

Optimum reads every file of its namespace `optimum.commands.register`; this folder is installed there, and has
no `__init__.py` because a namespace must not have one. Optimum imports it at each of its starts, so what is
heavy waits for `run`.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from typing import Any

import typer
from crab_edge_apps import export
from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand


class CrabExportCommand(BaseOptimumCLICommand):
    """Takes the options of `crab-edge export`, whatever they are in the installed version."""

    COMMAND = CommandInfo(name="crab", help="Export Crab+ (Qwen2.5-Omni with I-LoRA) to a Crab Edge bundle.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Optimum's hook: declare the options."""
        parser.description = export.command.__doc__
        for option in _options():
            how: dict[str, Any] = {"dest": option.name, "help": (option.help or "").replace("%", "%%")}
            if option.is_flag:
                how["action"] = "store_true"
            else:
                how |= {"required": option.required, "metavar": option.name.upper()}
                how["action"] = "append" if option.multiple else "store"
            parser.add_argument(*option.opts, **how)

    def run(self) -> None:
        """Optimum's hook: hand the options over; exit codes and messages are those of `crab-edge`."""
        from crab_edge_apps.cli import run

        arguments = ["export"]
        for option in _options():
            value = getattr(self.args, option.name)
            if option.is_flag:
                arguments += [option.opts[0]] if value else []
            elif value is not None:
                values = value if option.multiple else [value]
                arguments += [part for entry in values for part in (option.opts[0], str(entry))]
        sys.exit(run(arguments))


def _options() -> list[Any]:
    app = typer.Typer(add_completion=False)
    app.command()(export.command)
    return [option for option in typer.main.get_command(app).params if option.name != "help"]


REGISTER_COMMANDS = [(CrabExportCommand, ExportCommand)]
