"""What makes the tests come out alike on every machine: set before torch is imported, and inherited by processes.

Two files of tests run at a time (pyproject.toml). Each then has one thread: two threads in each of two processes get in
each other's way on two cores.
"""

import os
import signal

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is fetched; the tests of downloads have a hub of their own
if (
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN
):  # so a shell starts what it puts in the background; children inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ["PYTHONUTF8"] = "1"  # files are UTF-8, whatever language the machine speaks
if "gpu" not in os.environ.get("NB_FLAGS", "").split():
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # the CPU


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    "A file's tests go to one process, for they share what is loaded. Pages share nothing: each goes where time is."
    from xdist.scheduler import LoadFileScheduling

    class PagesApart(LoadFileScheduling):
        def _split_scope(self, nodeid):
            return nodeid if "::test_page_runs[" in nodeid else super()._split_scope(nodeid)

    return PagesApart(config, log) if config.getvalue("dist") == "loadfile" else None
