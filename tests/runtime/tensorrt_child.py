"""The process in which engine files are tried, over the fakes: `command` of the test calls it."""

import sys

import pytest

from crab_edge.engines import _tensorrt_probe
from tests import fake_cuda, fake_tensorrt

if __name__ == "__main__":
    patch = pytest.MonkeyPatch()
    with fake_cuda.installed(patch) as driver:
        fake_tensorrt.installed(patch, driver)
        code = _tensorrt_probe.main(sys.argv[1:])
        assert driver.used == 0, "device memory was left allocated"
    sys.exit(code)
