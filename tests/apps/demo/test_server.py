"""The demo as a process and a server: password, visitors' memory, an orderly end."""

import os
import signal
import subprocess
import sys

import httpx
import pytest

pytest.importorskip("gradio", reason="needs gradio: pip install 'crab-edge[demo]'")

from crab_edge_apps.demo import visitors as visitors_module
from crab_edge_apps.demo.server import Server, Settings
from crab_edge_apps.demo.store import PREFIX, Store
from crab_edge_apps.demo.visitors import Visitors

import crab_edge
from crab_edge.errors import InputError


def test_a_password(monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")
    with Server(Settings(port=0, password="geheim ✓"), crab_edge.load(threads=1)) as server:
        login = {"username": "anybody", "password": "geheim ✓"}
        with httpx.Client(base_url=server.url) as client:
            assert client.get("config").status_code == 401
            assert client.post("gradio_api/run/ask", json={"data": []}).status_code == 401
            assert client.post("login", data={**login, "password": "geheim"}).status_code == 400
            assert client.get("config").status_code == 401
            assert client.post("login", data=login).status_code == 200
            assert client.get("config").status_code == 200


def test_few_clips_stay_decoded_and_all_can_be_asked(tmp_path, sample, monkeypatch):
    monkeypatch.setattr(visitors_module, "MOST_VISITORS", 4)
    store = Store(1e9, parent=tmp_path)
    known = Visitors(store, crab_edge.load(threads=1), 1.0)
    for number in range(6):
        known.open(f"visitor {number}", [sample], ["a.mp4"], keep=True)
    assert (
        len(known) == 4 and known.get("visitor 1") is None and len(list(store.root.glob("visitors/*"))) == 4
    )
    held = [known.get(f"visitor {number}") for number in range(2, 6)]
    assert sum(visitor.session is not None for visitor in held) == visitors_module.KEPT_DECODED
    assert held[0].session is None and held[0].facts.sound
    assert known.session(held[0]).ask(task="ave").parsed
    with pytest.raises(InputError, match=r"^b\.mp4: "):
        (tmp_path / "b").write_bytes(b"nothing of the kind")
        known.open("visitor 5", [tmp_path / "b"], ["b.mp4"], keep=True)
    assert known.get("visitor 5").names == ("a.mp4",)
    known.leave("visitor 5")
    assert len(known) == 3 and len(list(store.root.glob("visitors/*"))) == 3
    store.close()


def test_the_command_serves_and_leaves_nothing(tmp_path):
    code = "from crab_edge_apps.cli import main; main()"
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    process = subprocess.Popen(
        [sys.executable, "-c", code, "demo", "--port", "0", "--threads", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    try:
        said = process.stdout.readline()
        url = said.split(" on ")[1].split()[0]
        assert said.startswith("crab-nano/") and url.startswith("http://127.0.0.1:")
        assert httpx.get(url).status_code == 200
        (folder,) = tmp_path.glob(f"{PREFIX}*")
        assert folder.stat().st_mode & 0o077 == 0
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0 and "stopped" in out and err == ""
    assert list(tmp_path.glob(f"{PREFIX}*")) == []
