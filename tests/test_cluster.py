"""Experiments on a Ray cluster: two nodes of one core each on this machine, as `ray.cluster_utils.Cluster` makes them.

Skipped where Ray is not installed: pip install "layerdiffusion[ray]".
"""

import json
import os
import signal
import threading
import time
from collections import deque

import pytest

from layerdiffusion.base.core import BadInput
from layerdiffusion.evidence import experiments
from layerdiffusion.evidence.cluster import Cluster, _next_cell
from layerdiffusion.evidence.experiments import EXPERIMENTS, _RUN_SIZES, _Setting, load_experiment, run_experiments


def test_who_draws_what():
    "A worker stays with its edit, then takes one that is free, then helps where most is left."
    todo = {0: deque("ab"), 1: deque("cdefg"), 2: deque("hi")}
    asked = [(0, {0, 1}), (None, {0, 1}), (3, {0, 1, 2}), (2, {0, 1, 2}), (2, {0, 1}), (0, {1})]
    assert [_next_cell(todo, *a) for a in asked] == [(0, "a"), (2, "h"), (1, "g"), (2, "i"), (1, "f"), (0, "b")]
    assert _next_cell({0: deque()}, 0, set()) == (None, None)


def test_what_it_refuses(monkeypatch):
    import builtins

    for wrong, words in ((dict(device="cuda:1"), "'cuda:1'"), (dict(model="nowhere"), "nowhere")):
        with pytest.raises(BadInput, match=words):
            Cluster(**wrong)
    real = builtins.__import__

    def without(name, *args):
        if name == "ray":
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(BadInput, match=r"layerdiffusion\[ray\]"):
        Cluster()


def test_the_command_refuses_an_address_alone(capsys):
    from layerdiffusion.interface.cli import main

    assert main(["experiment", "alpha", "--address", "auto"]) == 2
    assert "--engine ray" in capsys.readouterr().err


@pytest.fixture(scope="module", autouse=True)
def tiny():
    "Four settings, three edits, one picture each, in a second or two a cell."
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(_RUN_SIZES, "tiny", dict(edits=3, seeds=1, share=0.2))
        settings = [_Setting(f"SDEdit {s}", "sdedit", dict(strength=s)) for s in (0.3, 0.5, 0.7)]
        settings.append(_Setting("again", "sdedit", dict(strength=0.5)))  # the cell of another name
        patch.setitem(EXPERIMENTS, "four", lambda of: settings)
        yield


@pytest.fixture(scope="module")
def nodes():
    "Two of one core each, and what can take the second away."
    ray = pytest.importorskip("ray", reason="Ray is not installed; pip install 'layerdiffusion[ray]'")
    from ray.cluster_utils import Cluster as Nodes

    os.environ |= dict(RAY_USAGE_STATS_ENABLED="0", RAY_worker_niceness="0")
    there = Nodes()
    try:
        there.head = started(there, include_dashboard=False)
        there.second = started(there)
        ray.init(address=there.address, log_to_driver=False, logging_level="ERROR")
        yield there
    finally:
        ray.shutdown()
        there.shutdown()


def started(nodes, **how):
    "A node; on a machine that is busy with other things Ray gives up early, so twice."
    try:
        return nodes.add_node(num_cpus=1, **how)
    except Exception:
        return nodes.add_node(num_cpus=1, **how)


def run(folder, engine=None):
    return run_experiments(["four"], "tiny", ["paper"], folder, 1, engine=engine)["four", "paper"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    "The record of a process without Ray."
    return run(tmp_path_factory.mktemp("alone"))


def comparable(record):
    "A record but for what may differ: times, workers, and last digits."
    kept = {k: v for k, v in record.items() if k not in ("settings", "workers", "environment")}
    kept |= {k: v for k, v in record["environment"].items() if k != "date"}
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in record["settings"]]
    return json.dumps(kept, sort_keys=True), json.loads(json.dumps(rows), parse_float=lambda x: round(float(x), 2))


def test_the_same_record(nodes, alone, tmp_path, capsys):
    "With Ray and without, and a bar that says how many cells are done and how long the rest will take."
    engine = Cluster(device="cpu")
    assert engine.workers == 2 and len({engine.ray.get(a.environment.remote())["device"] for a in engine.actors}) == 1
    record = run(tmp_path, engine)
    assert comparable(record) == comparable(alone) and record["workers"] == 2
    assert load_experiment("four", "tiny", "paper", tmp_path) == record
    said = capsys.readouterr().err
    assert "12/12" in said and "cell" in said and "<" in said


def test_no_node_left(nodes, tmp_path):
    "A sentence, and the next run goes on."
    engine = Cluster(device="cpu")

    def away():
        while not list((tmp_path / "cells").glob("*.json")):
            time.sleep(0.02)
        for actor in engine.actors[:]:
            engine.ray.kill(actor)

    threading.Thread(target=away, daemon=True).start()
    with pytest.raises(BadInput, match="No worker of the cluster is left"):
        run(tmp_path, engine)
    assert list((tmp_path / "cells").glob("*.json"))


def test_ctrl_c(nodes, alone, tmp_path):
    "Ends the workers, keeps the cells; the same command goes on without Ray."
    engine = Cluster(device="cpu")

    def press():
        while not list((tmp_path / "cells").glob("*.json")):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background ignores it
    try:
        threading.Thread(target=press, daemon=True).start()
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, engine)
    finally:
        signal.signal(signal.SIGINT, before)
    done = {p: p.read_bytes() for p in (tmp_path / "cells").glob("*.json")}
    assert done and all(p.with_suffix(".webp").exists() for p in done)
    for _ in range(600):
        if engine.ray.available_resources().get("CPU") == 2:
            break
        time.sleep(0.1)
    else:
        pytest.fail("the workers are still there")
    assert comparable(run(tmp_path)) == comparable(alone)


def test_an_error_in_a_cell(nodes, tmp_path):
    "Comes out as the sentence it is."
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(EXPERIMENTS, "four", lambda of: [_Setting("none", "sdedit", dict(strength=2.0))])
        with pytest.raises(BadInput, match="strength is 2"):
            run(tmp_path, Cluster(device="cpu"))


def test_too_many_workers(nodes):
    with pytest.raises(BadInput, match="the cluster has 2"):
        Cluster(workers=3, device="cpu")
    with pytest.raises(BadInput, match="GPU"):
        Cluster(device="cuda")


def test_a_node_that_goes_away(nodes, alone, tmp_path):
    "Last, and in mid-run: what was finished stays as it is, what it was at is drawn by the other, and the run ends."
    engine, kept = Cluster(device="cpu"), {}

    def away():
        while len(done := sorted((tmp_path / "cells").glob("*.json"))) < 3:
            time.sleep(0.02)
        kept.update({p.name: p.read_bytes() for p in done})
        nodes.remove_node(nodes.second, allow_graceful=False)

    threading.Thread(target=away, daemon=True).start()
    record = run(tmp_path, engine)
    assert comparable(record) == comparable(alone)
    assert len(kept) >= 3 and len(engine.actors) == 1
    rows = experiments._packed_lines(tmp_path)
    assert all(rows[name.removesuffix(".json")].encode() == text for name, text in kept.items())
