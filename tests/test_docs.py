"""Holds the pages to the program: every `crab-edge` command that they print must parse, every file that they
link to must be there.
"""

import re
import shlex

import pytest

from tests.conftest import REPOSITORY

PAGES = sorted(
    [REPOSITORY / "README.md", REPOSITORY / "ARCHITECTURE.md", *(REPOSITORY / "docs").glob("*.md")]
)
SHELLS = ("bash", "sh", "console", "shell")
_OPERATORS = {"&&", "||", "|", ";", ">", ">>", "<", "&", "(", ")"}


def commands_in_blocks(text):
    """Arguments of every crab-edge command in shell blocks."""
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.M | re.S):
        if language in SHELLS:
            for line in block.replace("\\\n", " ").splitlines():
                yield from commands_in(line)


def commands_in_sentences(text):
    """Arguments of every crab-edge command in backquotes."""
    for said in re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)):
        yield from commands_in(" ".join(said.split()))


def commands_in(line):
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words = list(lexer)
    for i, word in enumerate(words):
        if word == "crab-edge" or word.endswith("/crab-edge"):
            rest = words[i + 1 :]
            end = next((j for j, other in enumerate(rest) if other in _OPERATORS), len(rest))
            if rest[:end] and not rest[0].startswith("-"):
                yield rest[:end]


def resolved(arguments):
    """The command that `arguments` name, and the rest of them; sub-commands are followed."""
    import typer
    from crab_edge_apps import cli

    command = typer.main.get_command(cli.build(arguments[0].replace("-", "_")))
    path, rest = [cli.NAME], list(arguments)
    while hasattr(command, "commands"):
        assert rest and rest[0] in command.commands, f"no such command: {' '.join([*path, *rest])}"
        command = command.commands[rest[0]]
        path.append(rest.pop(0))
    return command, " ".join(path), rest


def check_options(arguments):
    """Fails unless the verb and all options that are named exist."""
    command, path, rest = resolved(arguments)
    known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    for word in rest:
        if re.match(r"--?[A-Za-z]", word):
            name = word.partition("=")[0]
            assert name in known | {"--help", "-h"}, f"{path} has no option {name}"


def check_parses(arguments):
    """Fails unless the whole command line parses: options, their values' types, what is required."""
    command, path, rest = resolved(arguments)
    check_options(arguments)
    if not {"--help", "-h"} & set(rest):
        command.make_context(path, rest)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_commands_parse(page):
    text = page.read_text(encoding="utf-8")
    for arguments in commands_in_blocks(text):
        check_parses(arguments)
    for arguments in commands_in_sentences(text):
        check_options(arguments)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if "://" not in link:
            assert (page.parent / link).exists(), f"{page.name} links to {link}"


def test_extras_exist():
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    known = set(project["optional-dependencies"])
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        named = re.findall(r"(?:crab-edge|[\"'`]\.)\[([\w,-]+)\]", text)
        assert named or page.name not in ("README.md", "jetson.md", "gpu_bench.md")
        wrong = {extra for names in named for extra in names.split(",")} - known
        assert not wrong, f"{page.name} names extras that don't exist: {wrong}"


def test_the_jetson_image_copies_what_is_there():
    lines = (REPOSITORY / "docker/jetson/Dockerfile").read_text(encoding="utf-8").splitlines()
    copied = [word for line in lines if line.startswith("COPY ") for word in line.split()[1:-1]]
    assert {"crab_edge", "apps", "export", "calibration", "pyproject.toml"} <= set(copied)
    for name in copied:
        assert (REPOSITORY / name).exists(), f"the Dockerfile copies {name}"


def test_commands_are_found():
    text = "Run `crab-edge ask\nclip.mp4 --json`.\n\n```bash\nX=1 .venv/bin/crab-edge verify a  # all\n"
    text += "crab-edge ask a.mp4 'Is it?' \\\n  --task ave | tee log\ncrab-edge --version\n```\n"
    assert list(commands_in_sentences(text)) == [["ask", "clip.mp4", "--json"]]
    assert list(commands_in_blocks(text)) == [["verify", "a"], ["ask", "a.mp4", "Is it?", "--task", "ave"]]


@pytest.mark.parametrize(
    "line",
    [
        "crab-edge dance",
        "crab-edge scenes dance",
        "crab-edge ask a.mp4 --nonsense",
        "crab-edge bench --rounds many",
        "crab-edge import-adapter weights.bin",
    ],
)
def test_wrong_commands_are_caught(line):
    (arguments,) = commands_in(line)
    with pytest.raises(Exception, match=r"(?i)no such command|no option|valid integer|missing"):
        check_parses(arguments)
