"""Two files of tests run at a time (pyproject.toml). Each then has one thread: two threads in each of two processes get in each other's way on two cores."""
import os

if "PYTEST_XDIST_WORKER" in os.environ: os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; their own processes inherit it
