"""Whatever ends an edit, at any point: what was learnt is there, nothing half-written is, and --resume ends in the same
bytes.

One loaded mini serves all; an edit takes part of a second. A killed edit is a fork of this process.
"""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw
from safetensors import safe_open

from layerdiffusion.base import core
from layerdiffusion.interface.cli import main
from layerdiffusion.base.core import _LOCK, BadInput, one_writer
from layerdiffusion.checkpoints import _Checkpoint
from layerdiffusion.pipeline import LayerDiffusion
from layerdiffusion.settings import EditConfig

TEXT = "a dog jumping in a forest"
TOTAL = dict(reference=3, embeddings=5, tuning=4, drawing=3)
STEPS = [
    "--embedding-steps",
    "5",
    "--tuning-steps",
    "4",
    "--steps",
    "3",
    "--seeds",
    "0-1",
    "--tuned-parameters",
    "lora",
    "--lora-rank",
    "1",
]
COMMAND = [
    "edit",
    "example:dog",
    TEXT,
    *["--mask", "mask.png", "--object-picture", "input", "--device", "cpu", "--out", "out"],
    *STEPS,
]
LEARNT = ("embeddings", "tuning")
forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
posix = pytest.mark.skipif(os.name == "nt", reason="signals")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    "Bytes may depend on the number of threads, and a fork has one."
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def loaded():
    method = LayerDiffusion.from_pretrained("mini", "cpu")
    return method.models, method.sam


@pytest.fixture
def place(loaded, tmp_path, monkeypatch):
    "An empty folder with a mask; every command finds the model loaded, and computes everything anew."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(LayerDiffusion, "from_pretrained", classmethod(lambda cls, *a, **k: cls(*loaded)))
    monkeypatch.setattr(_Checkpoint, "every", 1e9)  # nothing is written but what an end writes
    mask = Image.new("L", (64, 64))
    ImageDraw.Draw(mask).ellipse((16, 16, 48, 56), fill=255)
    mask.save("mask.png")
    return tmp_path


def digest(folder=Path("out")):
    "What must not differ between two edits: tensors, pictures, losses and settings."
    settings = json.loads((folder / "edit.json").read_text(encoding="utf-8"))
    with safe_open(str(folder / "edit.safetensors"), "pt") as f:
        tensors = {k: hashlib.sha256(f.get_tensor(k).numpy().tobytes()).hexdigest() for k in sorted(f.keys())}
    pictures = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.glob("*.png")}
    return pictures, tensors, settings["losses"], settings["config"]


WHOLE = []


@pytest.fixture
def whole(place):
    "The digest of an edit that nothing happened to."
    if not WHOLE:
        assert main(COMMAND) == 0
        WHOLE.append(digest())
        for path in Path("out").iterdir():
            path.unlink()
        Path("out").rmdir()
    return WHOLE[0]


@contextmanager
def at(stage, step, act):
    "Do something at an event of the edit, where its progress is shown; gives the events."
    seen = []

    def show(event):
        seen.append((event.stage, event.step))
        if (event.stage, event.step) == (stage, step):
            act()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(core, "progress_bars", lambda **options: show)
        yield seen


def kept(stage):
    "How many steps of a stage lie in its file, and whether it is done."
    file = Path("out") / f"checkpoint-{stage}.safetensors"
    if not file.exists():
        return 0, False
    with safe_open(str(file), "pt") as f:
        return len(f.get_tensor("losses")), "done" in f.metadata()


def check_kept(stage, step):
    "All steps of the stages before are there, and of this one all that were made."
    order = list(TOTAL)
    for other in LEARNT:
        made = step if other == stage else TOTAL[other] if order.index(other) < order.index(stage) else 0
        assert kept(other)[0] == made, (other, kept(other), made)


def check_resume(whole, stage="drawing", step=0):
    "The same command with --resume makes only the steps that are missing, ends in the same bytes, and tidies up."
    with at("", 0, None) as seen:
        assert main([*COMMAND, "--resume"]) == 0
    order = list(TOTAL)
    for name in LEARNT:
        first = step + 1 if name == stage else 1 if order.index(name) > order.index(stage) else TOTAL[name] + 1
        assert [n for s, n in seen if s == name] == list(range(first, TOTAL[name] + 1)), name
    assert digest() == whole
    assert not [p.name for p in Path("out").iterdir() if p.name.startswith((".", "checkpoint"))]
    assert {p.name for p in Path().iterdir()} <= {"out", "mask.png"}


def last(err):
    return [line for line in err.splitlines() if line.strip()][-1]


# An error that nobody expected

POINTS = [
    ("reference", 1),
    ("reference", 3),
    ("embeddings", 1),
    ("embeddings", 3),
    ("embeddings", 5),
    ("tuning", 1),
    ("tuning", 2),
    ("tuning", 4),
    ("drawing", 1),
    ("drawing", 3),
]


def breaks():
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


@pytest.mark.parametrize("stage, step", POINTS)
def test_an_unknown_error_deletes_nothing(place, whole, capsys, stage, step):
    with at(stage, step, breaks):
        assert main(COMMAND) == 1
    said = last(capsys.readouterr().err)
    assert "should not have happened" in said and said.endswith(".")
    if stage == "reference":
        assert not Path("out").exists() and "--resume" not in said
    else:
        assert "--out out --resume goes on" in said
        check_kept(stage, step)
        assert {p.name for p in Path("out").iterdir()} <= {f"checkpoint-{s}.safetensors" for s in LEARNT}
    check_resume(whole, stage, step)


@pytest.mark.parametrize("where", ["pack", "sheet", "save"])
def test_an_unknown_error_after_the_drawing(place, whole, capsys, monkeypatch, where):
    "While the results are packed, put on their sheet, written."
    from layerdiffusion.interface.saving import EditResult

    owner = LayerDiffusion if where == "pack" else EditResult
    with monkeypatch.context() as patch:
        patch.setattr(owner, where, lambda *a, **k: breaks())
        assert main(COMMAND) == 1
    assert "--resume goes on" in last(capsys.readouterr().err)
    check_kept("drawing", 0)
    assert kept("tuning")[1], "the result of the tuning is smaller than what its next step would need"
    check_resume(whole)


def test_an_error_inside_a_step_keeps_whole_steps_only(place, whole, monkeypatch):
    "Half of an optimiser's step is no step: what was written before stays."
    monkeypatch.setattr(_Checkpoint, "every", 0.0)
    monkeypatch.setattr(_Checkpoint, "share", 1.0)
    step, count = torch.optim.Adam.step, []

    def half(self, *args, **kwargs):
        result = step(self, *args, **kwargs)
        count.append(1)
        if len(count) == TOTAL["embeddings"] + 3:
            breaks()
        return result

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.Adam, "step", half)
        assert main(COMMAND) == 1
    check_kept("tuning", 2)
    check_resume(whole, "tuning", 2)


def test_a_number_that_is_none_leaves_nothing_behind(place, capsys):
    "The input is to blame, and nothing long was learnt."
    assert main([*COMMAND, "--tuning-lr", "1e30"]) == 2 and "learning rate" in last(capsys.readouterr().err)
    assert not Path("out").exists()


# Signals


@posix
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
@pytest.mark.parametrize("stage, step", [("reference", 2), ("embeddings", 2), ("tuning", 3), ("drawing", 2)])
def test_stopped(place, whole, capsys, name, stage, step):
    "Kept at once, and the exit code of the signal."
    number = getattr(signal, name)
    before = signal.signal(number, signal.default_int_handler if name == "SIGINT" else signal.SIG_DFL)
    try:
        with at(stage, step, lambda: os.kill(os.getpid(), number)):
            assert main(COMMAND) == 128 + number
    finally:
        signal.signal(number, before)
    said = last(capsys.readouterr().err)
    assert said.startswith(f"layerdiffusion: Stopped by {'Ctrl-C' if name == 'SIGINT' else name}") and said.endswith(
        "."
    )
    if stage != "reference":
        check_kept(stage, step)
    assert Path("out").exists() == (stage != "reference")
    check_resume(whole, stage, step)


def fork(work):
    "A child that does some work; its number."
    child = os.fork()
    if child:
        return child
    try:
        os.dup2(os.open("said", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        os._exit(work() or 0)
    finally:
        os._exit(99)


def end(child):
    "What a child ended with: an exit code, or a signal as a negative number."
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    Path("said").unlink(missing_ok=True)
    return code


def dies():
    os.kill(os.getpid(), signal.SIGKILL)


@forks
@pytest.mark.parametrize(
    "stage, step",
    [("reference", 2), ("embeddings", 1), ("embeddings", 5), ("tuning", 1), ("tuning", 3), ("drawing", 1)],
)
def test_killed(place, whole, monkeypatch, stage, step):
    "Nothing can be written any more: what the checkpoints hold is there. The lock of the dead is no lock."
    monkeypatch.setattr(_Checkpoint, "every", 0.0)
    monkeypatch.setattr(_Checkpoint, "share", 1.0)

    def work():
        with at(stage, step, dies):
            return main(COMMAND)

    assert end(fork(work)) == -signal.SIGKILL
    assert (Path("out") / _LOCK).exists()
    check_kept(stage, step)
    check_resume(whole, stage, step)


@forks
@pytest.mark.parametrize("name", ["seed-0.png", "edit.safetensors", "edit.json"])
def test_killed_while_saving(place, whole, monkeypatch, name):
    "Half of the results are in a hidden folder, which the next run takes away."
    monkeypatch.setattr(_Checkpoint, "every", 0.0)
    monkeypatch.setattr(_Checkpoint, "share", 1.0)

    def work():
        replace = os.replace

        def dying(a, b):
            dies() if Path(b).name == name else replace(a, b)

        os.replace = dying
        return main(COMMAND)

    assert end(fork(work)) == -signal.SIGKILL
    check_kept("drawing", 0)
    check_resume(whole)


# A full disk


@pytest.mark.parametrize("stage", LEARNT)
def test_a_full_disk_costs_the_checkpoints_and_not_the_edit(place, whole, monkeypatch, capsys, stage):
    import safetensors.torch

    monkeypatch.setattr(_Checkpoint, "every", 0.0)
    monkeypatch.setattr(_Checkpoint, "share", 1.0)
    save = safetensors.torch.save_file

    def full(tensors, path, *args):
        if stage in str(path):
            raise OSError(28, "No space left on device")
        save(tensors, path, *args)

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    assert main(COMMAND) == 0
    err = capsys.readouterr().err
    assert err.count("goes on without checkpoints") == 1 and "No space left" in err
    assert digest() == whole


@pytest.mark.parametrize("name", ["sheet.png", "edit.safetensors", "edit.json"])
def test_a_full_disk_at_the_end(place, whole, monkeypatch, capsys, name):
    "Nothing half-written, what was learnt stays, one sentence; with room again, the same bytes."
    import safetensors.torch

    real = dict(sheet=Image.Image.save, save=safetensors.torch.save_file, text=Path.write_text)

    def full(kind):
        def write(*args, **kwargs):
            if any(
                name == Path(a).name or re.fullmatch(r"\.edit-\w+\.json", Path(a).name) and name == "edit.json"
                for a in args
                if isinstance(a, (str, Path)) and len(str(a)) < 300
            ):
                raise OSError(28, "No space left on device")
            return real[kind](*args, **kwargs)

        return write

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", full("sheet"))
        patch.setattr(safetensors.torch, "save_file", full("save"))
        patch.setattr(Path, "write_text", full("text"))
        assert main(COMMAND) == 2
    said = last(capsys.readouterr().err)
    assert "No space left" in said and "--resume goes on" in said
    check_kept("drawing", 0)
    assert not [p for p in Path("out").iterdir() if not p.name.startswith("checkpoint")]
    check_resume(whole)


def test_early_looks_that_cannot_be_written_cost_nothing_else(place, monkeypatch, capsys):
    from layerdiffusion.interface import cli

    def full(*args):
        raise BadInput("'out/looks.png' cannot be written: No space left on device.")

    monkeypatch.setattr(cli, "write_atomic", full)
    assert main([*COMMAND, "--look-every", "2"]) == 0 and "looks.png" in capsys.readouterr().err
    assert Path("out/sheet.png").exists()


# Nobody listens


class Pipe:
    "A stream whose reader goes after some writes, whose disk is full, or whose alphabet is small."

    encoding = "cp1252"

    def __init__(self, after=10**9, error=None):
        self.after, self.error, self.text = after, error, ""

    def write(self, text):
        self.after -= 1
        if self.after < 0:
            raise self.error
        text.encode(self.encoding)
        self.text += text

    def flush(self):
        if self.after < 0:
            raise self.error

    def isatty(self):
        return False


@pytest.mark.parametrize("stdout, stderr", [(1, 10**9), (10**9, 1), (0, 0), (4, 9)])
def test_a_closed_pipe_costs_nothing(place, whole, monkeypatch, stdout, stderr):
    "Readers that have gone, of either stream or both, at the start or in the middle: silently to the end."
    out, err = (Pipe(n, BrokenPipeError(32, "Broken pipe")) for n in (stdout, stderr))
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", err)
        assert main(COMMAND) == 0
    assert digest() == whole and "could not be written" not in out.text + err.text


def test_a_full_disk_under_stdout_is_told_on_stderr(place, whole, monkeypatch):
    out, err = Pipe(1, OSError(28, "No space left on device")), Pipe()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", err)
        assert main(COMMAND) == 0
    assert digest() == whole and "could not be written: No space left" in err.text


@pytest.mark.parametrize("stream", [None, Pipe()])
def test_a_console_without_the_letters(place, whole, monkeypatch, stream):
    "No stream at all, and one of cp1252: a name in Chinese is said as well as it can be."
    from layerdiffusion.base.core import example_path

    Path("狗.png").write_bytes(example_path("dog").read_bytes())
    command = [a if a != "example:dog" else "狗.png" for a in COMMAND if a != "out"][: -1 - len(STEPS)] + STEPS
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        patch.setattr(sys, "stderr", stream)
        assert main([*command, "--out", "狗"]) == 0
        assert main([*command, "--out", "狗", "--seeds", "‘"]) == 2
    assert digest(Path("狗"))[1] == whole[1] and (stream is None or "\\u72d7" in stream.text)


@posix
def test_head(place, loaded):
    "A real pipe, to a program that reads one line, from a command whose console knows ASCII only."
    Path("狗.png").write_bytes(core.example_path("dog").read_bytes())
    code = "import sys; from layerdiffusion.interface.cli import main; sys.exit(main())"
    env = dict(os.environ, PYTHONIOENCODING="ascii", PYTHONPATH=str(Path(core.__file__).parents[1]))
    args = ["edit", "狗.png", *COMMAND[2 : -len(STEPS) - 1], "狗", *STEPS]
    life = subprocess.Popen(
        [sys.executable, "-c", code, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env
    )
    assert life.stdout.readline().startswith(b"Words")
    life.stdout.close()
    life.stderr.close()
    assert life.wait(300) == 0
    assert Path("狗/sheet.png").exists() and not list(Path("狗").glob("checkpoint*"))


# Two writers


def other_writer(folder, go):
    "A thread that holds a folder until `go` is set."
    ready = threading.Event()

    def work():
        with one_writer(folder):
            ready.set()
            go.wait(60)

    thread = threading.Thread(target=work)
    thread.start()
    ready.wait(60)
    return thread


COMMANDS = dict(
    edit=(COMMAND, "out"),
    resume=([*COMMAND, "--resume"], "out"),
    train=(["train-mini", "vae", "--out", "run"], "run/vae"),
    experiment=(["experiment", "alpha", "--out", "run"], "run"),
    export=(["export", "done", "--out", "run"], "run"),
)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_second_writer_is_refused(place, capsys, name):
    "One sentence, exit code 2, and nothing is touched; when the first is done, nothing is left of its lock."
    command, folder = COMMANDS[name]
    if name == "export":
        assert main([*COMMAND[: -len(STEPS) - 1], "done", *STEPS]) == 0
    go = threading.Event()
    thread = other_writer(folder, go)
    Path(folder, "mine").touch()
    capsys.readouterr()
    code, err = main(command), capsys.readouterr().err
    go.set()
    thread.join()
    assert code == 2 and "Another run is writing to" in err and folder in err and len(err.splitlines()) == 1
    assert [p.name for p in Path(folder).iterdir()] == ["mine"]


def test_python_keeps_out_too(place, loaded):
    "edit with a folder, save, and the save of a saved edit."
    method = LayerDiffusion(*loaded)
    tiny = EditConfig(
        embedding_steps=1,
        tuning_steps=1,
        sampling_steps=1,
        object_picture="input",
        tuned_parameters="lora",
        lora_rank=1,
    )
    given = dict(image="example:dog", text=TEXT, mask="mask.png", seeds=[0], config=tiny)
    go = threading.Event()
    thread = other_writer("out", go)
    result = method.edit(**given)
    for call in (lambda: method.edit(**given, folder="out"), lambda: result.save("out")):
        with pytest.raises(BadInput, match="Another run is writing"):
            call()
    go.set()
    thread.join()
    assert not Path("out").exists()
    method.edit(**given, folder="out")
    assert result.save("out") and not (Path("out") / _LOCK).exists()


def test_python_writes_nothing_without_a_folder(place, loaded):
    before = sorted(place.rglob("*"))
    method = LayerDiffusion(*loaded)

    def stop(event):
        if event.stage == "tuning":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="the same call on this object goes on"):
        method.edit(
            "example:dog",
            TEXT,
            mask="mask.png",
            seeds=[0],
            config=EditConfig(embedding_steps=1, tuning_steps=2, sampling_steps=1, object_picture="input"),
            callback=stop,
        )
    assert sorted(place.rglob("*")) == before


@forks
def test_two_at_once(place, whole):
    "Of edits that start together into one folder, one is made whole and the others are refused."
    codes = [end(child) for child in [fork(lambda: main(COMMAND)) for _ in range(3)]]
    assert codes.count(0) >= 1 and set(codes) <= {0, 2}
    assert digest() == whole and not (Path("out") / _LOCK).exists()


@forks
def test_two_at_once_into_new_folders(place, whole):
    "Without --out each has its own."
    command = [a for a in COMMAND if a not in ("--out", "out")]
    assert [end(child) for child in [fork(lambda: main(command)) for _ in range(3)]] == [0] * 3
    assert [digest(Path("edits") / f"dog-{n}") == whole for n in (1, 2, 3)] == [True] * 3


@forks
def test_the_lock_of_a_dead_process(place):
    "Left in the folder by a kill, and no hindrance; taken away by the next."

    def work():
        with one_writer("out"):
            dies()

    assert end(fork(work)) == -signal.SIGKILL and (Path("out") / _LOCK).exists()
    with one_writer("out"):
        pass
    assert [p.name for p in Path("out").iterdir()] == [], "a folder that was there stays"


# How often, how large


def writes(seconds, bytes, steps):
    "The seconds at which a file is written that takes so long, steps being one second each, and the share of all time."
    point, clock, found = _Checkpoint("tuning", "", {}, "anywhere"), [0.0], []
    point.every, point.now, point.begun, point.last, point.cost = 5.0, lambda: clock[0], 0.0, 0.0, bytes / point.speed

    def keep():
        found.append(clock[0])
        clock[0] += seconds
        point.paid(clock[0] - seconds)

    point.keep = keep
    for step in range(steps):
        clock[0] += 1
        point(core.Event("tuning", step + 1, steps))
    return found, len(found) * seconds / clock[0]


@pytest.mark.parametrize(
    "seconds, bytes, steps",
    [(5.0, 10.3e9, 5000), (50.0, 10.3e9, 20000), (0.2, 1e8, 2000), (0.001, 1e5, 500), (30.0, 1e9, 20000)],
)
def test_at_most_a_twentieth_goes_into_checkpoints(seconds, bytes, steps):
    found, share = writes(seconds, bytes, steps)
    assert share <= 0.051 and len(found) >= 0.6 * min(0.05 * steps / seconds, steps / 6), (
        "and not much less, where there is something to win"
    )
    assert all(b - a >= 19.9 * seconds for a, b in zip(found, found[1:], strict=False)), "at no time more"


def test_the_size_is_said_and_an_uninterrupted_run_writes_none(place, whole, monkeypatch, capsys):
    "By the rule as it is: a run this short is not worth a file, and the last step has no rule of its own."
    written = []
    monkeypatch.undo()
    monkeypatch.chdir(place)
    monkeypatch.setattr(_Checkpoint, "write", lambda self, *a, **k: written.append(self.stage))
    assert main(COMMAND) == 0 and not written
    out = capsys.readouterr().out
    assert out.count("MB") == 1 and re.search(r"checkpoint-tuning\.safetensors .*--resume: about [\d,]+ MB", out)
    assert digest() == whole


def test_the_size_is_that_of_the_file(loaded, tmp_path):
    params = [torch.zeros(1000, 100, requires_grad=True)]
    adam = torch.optim.Adam(params)
    params[0].sum().backward()
    adam.step()
    point = _Checkpoint("tuning", "key", {}, tmp_path)
    point.begin(params, adam, [1.0])
    point.write()
    assert abs(point.path.stat().st_size / point.size - 1) < 0.01
