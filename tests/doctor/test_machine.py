"""What the machine is, from the files in which Linux and Jetson Linux say it."""

import pytest

from crab_edge.doctor import machine as module
from crab_edge.engines import _cuda
from tests import fake_cuda

ORIN = (
    "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64, DATE: Wed Jan  8 2025\n"
)


@pytest.mark.parametrize(
    ("text", "release", "jetpack"),
    [
        (ORIN, (36, 4, 3), "6.2"),
        (ORIN.replace("4.3", "4.0"), (36, 4, 0), "6.1"),
        (ORIN.replace("R36", "R39").replace("4.3", "2.0"), (39, 2, 0), "7.2"),
        (ORIN.replace("R36", "R35").replace("4.3", "4.1"), (35, 4, 1), "5"),
        (ORIN.replace("R36", "R99"), (99, 4, 3), "unknown"),
    ],
)
def test_jetson_linux_and_its_jetpack(tmp_path, monkeypatch, text, release, jetpack):
    (tmp_path / "release").write_text(text)
    monkeypatch.setattr(module, "_TEGRA", tmp_path / "release")
    assert module.jetson_linux() == release and module.jetpack(release) == jetpack


def test_another_machine_is_no_jetson(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_TEGRA", tmp_path / "nothing")
    assert module.jetson_linux() is None


@pytest.mark.parametrize(
    ("cuda", "ptx"),
    [
        ((11, 8), "7.8"),
        ((12, 4), "8.4"),
        ((12, 5), "8.5"),
        ((12, 6), "8.5"),
        ((12, 9), "8.8"),
        ((13, 0), "9.0"),
    ],
)
def test_the_newest_ptx_of_a_driver(cuda, ptx):
    assert module.newest_ptx(cuda) == ptx


@pytest.mark.parametrize(
    ("line", "int8", "wide"),
    [
        ("flags\t\t: fpu avx2 avx512f avx512_vnni", "avx512_vnni", "avx512f"),
        ("flags\t\t: fpu avx2 avx_vnni", "avx_vnni", "avx2"),
        ("flags\t\t: fpu sse2", None, None),
        ("Features\t: fp asimd asimddp", "asimddp", "asimd"),
    ],
)
def test_instructions_that_matter(tmp_path, monkeypatch, line, int8, wide):
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{line}\n\nprocessor\t: 1\n{line}\n")
    monkeypatch.setattr(module, "_CPUINFO", tmp_path / "cpuinfo")
    _cuda.driver.cache_clear()
    found = module.machine()
    assert (found.cpu_int8, found.cpu_wide) == (int8, wide)


def test_gpus_are_named_or_missed(tmp_path, monkeypatch):
    (tmp_path / "version").write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (dvs@host)\n"
    )
    monkeypatch.setattr(module, "_DRIVER", tmp_path / "version")
    gpus = [fake_cuda.FakeGpu("Orin", 87, 8 << 30, integrated=True)]
    with fake_cuda.installed(monkeypatch, gpus=gpus, version=12060):
        found = module.machine()
    assert found.driver == "580.65.06" and found.cuda == "12.6" and found.ptx == "8.5"
    (gpu,) = found.gpus
    assert gpu == {"name": "Orin", "capability": "8.7", "memory_bytes": 8 << 30, "integrated": True}
    monkeypatch.undo()
    monkeypatch.setattr(_cuda, "LIBRARY", "libcuda-that-is-nowhere.so.1")
    _cuda.driver.cache_clear()
    found = module.machine()
    assert found.gpus == () and "no NVIDIA driver" in found.gpu_problem
