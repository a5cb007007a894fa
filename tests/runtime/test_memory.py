"""Free memory: the machine's, bounded by the container's limit."""

import sys

import pytest

from crab_edge import memory

MEMINFO = "MemTotal: 4000 kB\nMemFree: 100 kB\nMemAvailable: 2000 kB\n"


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")

    def write(**files):
        for name, text in files.items():
            (tmp_path / name.replace("_", ".", 1)).write_text(text)

    return write


def test_the_smaller_of_machine_and_container(place):
    place(meminfo=MEMINFO)
    assert memory.available_bytes() == 2000 * 1024
    stat = "anon 600000\ninactive_file 100000\nactive_file 50000\n"
    place(memory_max="1000000\n", memory_current="800000\n", memory_stat=stat)
    assert memory.available_bytes() == 350_000
    place(memory_max="max\n")
    assert memory.available_bytes() == 2000 * 1024


def test_what_cannot_be_measured_is_none(place):
    assert memory.available_bytes() is None
    place(meminfo="nonsense")
    assert memory.available_bytes() is None


@pytest.mark.skipif(sys.platform != "linux", reason="measured on Linux only")
def test_this_machine():
    free = memory.available_bytes()
    assert free is not None and 1 << 20 < free < 1 << 50
