"README keeps its form, and what it tells people to type exists."

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from layerdiffusion.evidence.experiments import compare, load_experiment

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
LINES = README.splitlines()
BLOCKS = [(m[1], m[2]) for m in re.finditer(r"^```(\w*)\n(.*?)^```", README, re.M | re.S)]
SHELL = [
    line.strip()
    for kind, text in BLOCKS
    if kind in ("sh", "bash", "shell")
    for line in text.replace("\\\n", " ").splitlines()
    if line.strip()
]
COMMANDS = [part.strip() for line in SHELL if not line.startswith("#") for part in re.split(r"&&|;|\|", line)]
OURS = [c for c in COMMANDS if c.startswith("layerdiffusion ")]


def run(*words):
    env = {**os.environ, "COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
    code = "import sys; from layerdiffusion.interface.cli import main; sys.argv[0] = 'layerdiffusion'; sys.exit(main())"
    return subprocess.run(
        [sys.executable, "-c", code, *words], env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )


def test_form():
    "A picture by line 5, code by line 25, at most 150 lines."
    assert len(LINES) <= 150
    assert any("![" in line or "<img" in line for line in LINES[:5])
    assert any(line.startswith("```") for line in LINES[:25])


def test_links_exist():
    links = re.findall(r'(?:\]\(|src=")(?![a-z]+:|#)([^)"#]+)', README)
    assert links and not [link for link in links if not (ROOT / link).exists()]


def test_two_commands():
    "The first installs and edits a shipped picture, the second installs and tests; CI runs both as they stand here."
    edit, test = [line for line in SHELL if line.startswith("pip install")][:2]
    assert "&& layerdiffusion edit example:" in edit
    assert test.endswith("pytest -q")
    assert test in (ROOT / ".ci/run").read_text(encoding="utf-8").splitlines()


def test_there_are_commands():
    assert OURS


@pytest.mark.parametrize("command", OURS)
def test_command_exists(command):
    "The subcommand and each option are in the program's own help."
    words = shlex.split(command, comments=True)[1:]
    if words[0].startswith("-"):
        return None if run(words[0]).returncode == 0 else pytest.fail(command)
    help = run(words[0], "--help-all" if words[0] == "edit" else "--help")
    assert help.returncode == 0, help.stderr
    missing = [
        w
        for w in words[1:]
        if re.match(r"--?[a-z]", w) and not re.search(rf"(?<![\w-]){re.escape(w.split('=')[0])}(?![\w-])", help.stdout)
    ]
    assert not missing, f"not in `layerdiffusion {words[0]} --help`: {missing}"


def test_python_runs(tmp_path, monkeypatch):
    "README's Python runs, with fewer steps."
    code = "\n".join(text for kind, text in BLOCKS if kind == "python")
    short = code.replace('preset="best")', 'preset="best", embedding_steps=2, tuning_steps=2, sampling_steps=2)')
    assert short != code
    monkeypatch.chdir(tmp_path)
    exec(compile(short, "README.md", "exec"), {"__name__": "readme"})


def say(v):
    return "{:.0f} % [{:.0f} %, {:.0f} %]".format(*(100 * x for x in v))


def test_numbers_are_of_the_records():
    "What README says of edits stands in the records of α and of Table 1: the same edits, with turns and without."
    folder = ROOT / "nbs/results/experiments"
    alpha, table = (load_experiment(name, "paper", "paper", folder) for name in ("alpha", "ablation"))
    valid = {row["setting"]: row["valid"] for record in (alpha, table) for row in record["settings"]}
    assert f"{say(valid['α = 0.7'])} of 200 pictures" in README and valid["α = 0.7"] == valid["(f) whole method"]
    assert f"without turns {say(valid['(i) no turns'])} of 200" in README
    assert ": yes;" in compare(table, "(f) whole method", "(i) no turns") and alpha["edits"] == table["edits"]
    assert max(alpha["settings"][:11], key=lambda row: row["valid"][0])["options"]["alpha"] == 0.7
