"""What makes the tests come out alike on every machine. All of it is set before torch is imported, and processes inherit it.

Two files of tests run at a time (pyproject.toml). Each then has one thread: two threads in each of two processes get in
each other's way on two cores.
"""
import os

import pytest

if "PYTEST_XDIST_WORKER" in os.environ: os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is fetched; the tests of downloads have a hub of their own
os.environ["PYTHONUTF8"] = "1"  # files are UTF-8, whatever language the machine speaks
if "gpu" not in os.environ.get("NB_FLAGS", "").split(): os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # as everywhere: on the CPU


def pytest_collection_modifyitems(items):
    "The tests of a file go to one process, for they share what is loaded; pages share nothing and fill both processes to the end."
    for item in items:
        alone = getattr(item, "originalname", "") == "test_page_runs"
        item.add_marker(pytest.mark.xdist_group(item.nodeid if alone else item.path.name))
