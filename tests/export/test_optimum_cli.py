"""`optimum-cli export crab` through Optimum's own command line."""

import importlib.util
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILE = ROOT / "export" / "optimum_cli" / "register_crab_edge.py"

pytest.importorskip("optimum.commands.optimum_cli")


@pytest.fixture
def optimum(tmp_path_factory, monkeypatch):
    """Optimum's main, with the file where an installation puts it."""
    from optimum.commands import optimum_cli

    installed = importlib.util.find_spec("optimum.commands.register")
    places = [] if installed is None else list(installed.submodule_search_locations or [])
    known = any((Path(place) / FILE.name).is_file() for place in places)
    folder = tmp_path_factory.mktemp("site") / "optimum" / "commands" / "register"
    folder.mkdir(parents=True)
    if not known:
        shutil.copy(FILE, folder)
        monkeypatch.syspath_prepend(str(folder.parents[2]))
    for name in [name for name in sys.modules if name.startswith("optimum.commands.register")]:
        monkeypatch.delitem(sys.modules, name)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["optimum-cli", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            optimum_cli.main()
        return stopped.value.code

    yield run
    for name in [name for name in sys.modules if name.startswith("optimum.commands.register")]:
        sys.modules.pop(name)


def test_it_is_installed_where_optimum_looks():
    tomllib = pytest.importorskip("tomllib")
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert "optimum.commands.register" in setup["packages"]
    folder = ROOT / setup["package-dir"]["optimum.commands.register"]
    assert FILE.parent == folder and not (folder / "__init__.py").exists()


def test_help_lists_the_options(optimum, capsys):
    assert optimum("export", "crab", "--help") == 0
    said = capsys.readouterr().out
    for option in ("--model", "--adapter", "--bits", "--compare", "--overwrite", "--media"):
        assert option in said


def test_export(optimum, tiny, tmp_path, capsys):
    import json

    out = tmp_path / "bundle"
    options = ["--model", tiny.base, "--adapter", tiny.adapter, "--out", out, "--bits", 8, "--method", "rtn"]
    assert optimum("export", "crab", *options, "--json") == 0
    assert json.loads(capsys.readouterr().out)["recipe"]["name"] == "w8"
    assert (out / "bundle.json").is_file()
    assert optimum("export", "crab", *options) == 2
    assert "--overwrite" in capsys.readouterr().err
