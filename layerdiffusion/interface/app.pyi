# Made by tests/stubs.py: the classes of the module beside it, whole.
"""The whole edit in one window: a picture, a click, a sentence, a sheet of results, and the line that repeats it"""
__all__ = ['LayerDiffusionApp']
import base64
import contextlib
import functools
import html
import importlib.util
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
import zipfile
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any
from collections.abc import Callable
import torch
from .canvas import Marks, PromptCanvas, picture_bytes, read_marks
from layerdiffusion.base.core import BadInput, Event, Preview, example_path, join_callbacks, list_examples, load_image, package_folder, to_pil, write_atomic, write_json
from ..words import split_text
from ..base.masks import propose_subject
from ..evidence.metrics import Clip, clip_score, subject_likeness
from ..pipeline import DRAWN, LayerDiffusion, check_world, load_edit
from .saving import EditResult, patch, picture_note, pixels
from ..base.sd import decode_latents, encode_text
from ..settings import GROUPS, PAPER, SETTINGS, Declared, EditConfig, preset

@dataclass(frozen=True)
class _Order:
    """All that an edit is made of, as somebody would type it."""
    image: str
    text: str
    parts: dict = field(default_factory=dict)
    marks: dict = field(default_factory=dict)
    reference: str | None = ...
    seeds: tuple = ...
    preset: str = ...
    changes: dict = field(default_factory=dict)
    model: dict = field(default_factory=dict)

    def config(self, card: dict) -> EditConfig:
        """The settings, for a model's card."""
        ...

def span(seeds: tuple) -> range:
    ...

def short(value):
    """A value as it is typed: 40 for 40.0, a list for a tuple of points."""
    ...

def arguments(**values) -> str:
    ...

def _python_lines(order: _Order, redraw: dict | None=None) -> str:
    """An edit as Python."""
    ...

def _option_words(name: str, value) -> list:
    """A setting as it is typed in a terminal."""
    ...

def _shell_line(order: _Order, redraw: dict | None=None, folder: str='edits/1') -> str:
    """An edit for a terminal."""
    ...

def sentence(error: BaseException) -> str:
    """What a person should read instead of a traceback."""
    ...

class _Job:
    """Work in a thread, that stops when it is asked to."""

    def __init__(self, work: Callable, done: Callable):
        ...

    def start(self) -> '_Job':
        ...

    def run(self):
        ...

    def __call__(self, event: Event | None=None):
        """Between two steps: the place to stop."""
        ...

    def stop(self, seconds: float=30.0):
        """Ask it to stop, and wait until it has."""
        ...

    @property
    def alive(self) -> bool:
        ...

def _asked_for(text: str) -> dict:
    """Colour, species, pose and place that a text of mini's world names."""
    ...
_SURE = 0.8

def _verdicts(judge, images: torch.Tensor, text: str) -> list:
    """What the judge says of pictures: first whether somebody is there in one piece, then each thing asked for."""
    ...

def scores(method: LayerDiffusion, result: EditResult) -> list:
    """CLIP score, likeness of the subject and the judge's answers."""
    ...
_MARKS = {True: ('ld-right', '✓'), False: ('ld-not', '✗'), None: ('ld-unsure', '?')}

def _caption(seed: int, score: dict | None) -> str:
    """A picture's seed and scores, as HTML."""
    ...

@dataclass(frozen=True)
class _Dial:
    """A slider of the editor."""
    name: str
    label: str
    low: float
    high: float
    step: float
    paper: float | None
    help: str
    at_once: bool = ...

def _dial_of(setting: Declared) -> _Dial:
    """The slider of a setting, as it was declared."""
    ...
_DIALS = [_Dial('count', 'Pictures', 1, 20, 1, 20, 'How many, one for each seed. The paper draws 20.', True), _Dial('first', 'First seed', 0, 100, 1, None, 'Another seed, another noise to begin with, another picture.', True), *(_dial_of(setting) for setting in SETTINGS.values() if setting.slider)]

def _widgets():
    """ipywidgets, or the sentence that says how to get it."""
    ...

class _Slider:
    """A dial as a row: name, slider with the paper's value marked, number."""

    def __init__(self, dial: _Dial, value: float):
        ...

    @property
    def value(self):
        ...
_FOLDED = {name: setting for name, setting in SETTINGS.items() if not setting.slider and name != 'seed'}

def _field_of(setting: Declared, value):
    """The widget of a setting that has no slider."""
    ...

def _field_row(setting: Declared, widget):
    """A field with its name, and what the paper takes."""
    ...
_MOST = 256

class _Intake:
    """A file that comes from the browser in parts."""

    def __init__(self, taken: Callable, refused: Callable):
        ...

    def hear(self, content: dict, buffers: list) -> bool:
        ...

def _hand_class() -> type:
    """The widget's class, made when it is first needed."""
    ...

def _hand(label: str, help: str, taken: Callable, refused: Callable, whole: bool=False):
    """A button that takes a picture; with `whole` it cares for the page too."""
    ...

def _order_record(order: _Order, marks: Marks) -> dict:
    """An order and its marks as JSON has them."""
    ...

def _read_order(data: dict) -> tuple:
    """An order from JSON."""
    ...

def _note_inside(data: bytes) -> dict | None:
    """The note of an edit inside a PNG file; None where there is none."""
    ...

def _png(picture, note: dict) -> bytes:
    """A picture (tensor) as a PNG file with a note."""
    ...
_TEXTS = dict(dog='a brown dog jumping in a forest', cat='an orange cat lying on a beach', rabbit='a grey rabbit sitting in the snow')
_QUICK = dict(embedding_steps=20, tuning_steps=5, sampling_steps=15)
_LOOKS = {'best': 'Best', 'paper': "The paper's", 'quick': 'Quick look'}

class LayerDiffusionApp:
    """The editor; shown in a notebook as the last thing of a cell."""

    def __init__(self, image='example:dog', text: str | None=None, model: Any='mini', sam: Any=None, device: str | None=None, keep: str | Path | None=None, theme: str='page'):
        ...

    def _ipython_display_(self):
        ...

    @property
    def card(self) -> dict:
        ...

    def make_widgets(self, text: str | None):
        """Everything that can be touched or read."""
        ...

    def make_place(self):
        """What shows the new place, and what chooses it."""
        ...

    def make_settings(self):
        """The preset, the sliders, and the fields of all other settings."""
        ...

    def make_results(self):
        """What runs an edit, and what shows and keeps its pictures."""
        ...

    def layout(self):
        """Picture, sentence and Run; everything else folded or hidden."""
        ...

    def ask_card(self):
        """The sentence and the run."""
        ...

    def place_and_words(self):
        """How the sentence is split, the new place, and a file by its path."""
        ...

    def setting_groups(self) -> list:
        """The preset, and the settings in the groups in which they are declared."""
        ...

    def result_cards(self):
        """Results and history, hidden at first."""
        ...

    def card_of(self, title: str, *inside):
        """A card with its title."""
        ...

    def fold(self, title: str, *inside, opened: bool=False):
        """A button that opens and closes what is below it."""
        ...

    def field(self, label: str, widget):
        """A label over a field."""
        ...

    def head(self, title: str, note: str):
        """A small heading."""
        ...

    def title(self):
        """What this is, and what it runs on."""
        ...

    @contextlib.contextmanager
    def silence(self):
        """Inside, widgets are set without anything following from it."""
        ...

    def tell(self, where: str, what, wrong: bool=False):
        """Say a sentence under a card."""
        ...

    def open_picture(self, image, name: str | None=None, said: str=''):
        """Show a picture on a new canvas."""
        ...

    def check_photo(self):
        """Say at once that a picture is not of mini's world."""
        ...

    def stored(self, name: str, data: bytes) -> tuple:
        """An upload, written down where things are kept."""
        ...

    def take(self, name: str, data: bytes):
        """A file that was chosen, dropped or pasted: a picture, or one that brings its settings back."""
        ...

    def order_of(self, note: dict) -> _Order:
        """The order that a picture of the command line or of Python was made by, as far as its note says."""
        ...

    def set_to(self, order: _Order, marks: Marks, reference: tuple | None=None) -> bool:
        """Set everything to an order; whether its picture was found."""
        ...

    def split(self):
        """Split the sentence, and show both parts."""
        ...

    def check_words(self):
        """Say which words the model does not know."""
        ...

    def parts(self) -> dict:
        """T_a and T_b, where they are not what the rule says."""
        ...

    def given(self) -> dict:
        """Every setting that can be touched, as it stands."""
        ...

    def turn_to(self, config: EditConfig):
        """Set sliders and fields to these settings."""
        ...

    def order(self) -> _Order:
        """What the editor is set to, refused where it cannot be meant."""
        ...

    def set_preset(self):
        """Set the sliders to a preset's values for this model."""
        ...

    def say_preset(self, config: EditConfig):
        """What goes beyond the paper."""
        ...

    def connect(self):
        """What happens when something is touched."""
        ...

    def guard(self, act: Callable, where: str='run'):
        """Do something; whatever goes wrong is said in the card `where`, not raised."""
        ...

    def start(self, work: Callable, done: Callable, kind: str) -> bool:
        """Begin a job; one that only redraws gives way."""
        ...

    def ended(self, job: _Job, done: Callable):
        """In the job's thread, at its end."""
        ...

    def run(self):
        """Make the edit; after a stop with the same settings, go on with it; while another is being made, wait for it."""
        ...

    def begin_run(self, wish: tuple, given: dict):
        """Start a run of what was wished for."""
        ...

    def next_in_queue(self):
        """The first of those that wait."""
        ...

    def forget_queue(self):
        """Nothing waits any more."""
        ...

    def tell_queue(self):
        """Say what waits."""
        ...

    def wish(self) -> tuple:
        """All that the editor is set to; a run that was stopped goes on where it is the same as then."""
        ...

    @contextlib.contextmanager
    def hushed(self):
        """The pipeline need not print what the canvas shows."""
        ...

    def make(self, order: _Order, given: dict, was: list, job: _Job) -> tuple:
        """In the job's thread: the edit, its scores, and warnings."""
        ...

    def finish(self, made: tuple):
        """Show what a run made."""
        ...

    def stop(self):
        """Stop after the present step."""
        ...

    def wait(self, seconds: float=600.0):
        """Until the job has ended, and those that waited for it; for scripts."""
        ...

    def refresh(self):
        """Names and states of the buttons."""
        ...

    def progress(self, event: Event, start: int=0):
        """A callback's news; `start` steps of the stage were done before a stop, and are taken to have been as quick."""
        ...

    def say_stages(self):
        """The bars, and the time that is left in all."""
        ...

    def look(self, pictures, what: str, losses: list | None=None):
        """Show what there is to see of a run: these pictures, or the last ones, and the curve of a loss."""
        ...

    def watch(self, job: _Job) -> Callable:
        """A callback that shows where a job is, and stops it when asked."""
        ...

    def redraw(self):
        """Draw again with what was learnt."""
        ...

    def too_old(self) -> bool:
        """Whether the U-Net of the shown edit was let go."""
        ...

    def draw_again(self, shown: '_Shown', again: dict, job: _Job) -> '_Shown':
        """In the job's thread: other pictures of the same edit."""
        ...

    def draw_place(self):
        """Draw the new place from its words; when there is one, another."""
        ...

    def use_place(self, name: str | None=None, picture=None):
        """Take an uploaded picture for the new place, or none."""
        ...

    def show_place(self, picture, what: str):
        """Show the new place."""
        ...

    def no_draft(self):
        """Forget a drawn place whose words were changed."""
        ...

    def show(self, shown: '_Shown', keep: bool=False):
        """Show a result, with its best picture picked, or the same seed as before."""
        ...

    def cell(self, i: int) -> tuple:
        """A picture of the sheet with its scores and its button."""
        ...

    def pick(self, i: int):
        """Choose a picture."""
        ...

    def save(self):
        """Write the shown result, and the picked picture once more by that name."""
        ...

    def files(self) -> dict:
        """The shown pictures as files, by their names."""
        ...

    def download(self):
        """The picked picture to the browser, as a file."""
        ...

    def download_all(self):
        """All pictures to the browser, in one file."""
        ...

    def write_lines(self):
        """The lines that repeat the shown result."""
        ...

    def show_history(self):
        """The edits so far, each with a way back; those of an earlier page are read when they are wanted."""
        ...

    def past_cell(self, picture: bytes, what: str, act: Callable):
        """An edit of the history, with its button."""
        ...

    def back_to(self, old: '_Shown'):
        """Show an earlier result, with the settings it was made by."""
        ...

    def keep_shown(self, shown: '_Shown') -> list:
        """Save a new edit in the history."""
        ...

    def fetch(self, folder: Path):
        """Back to an edit of an earlier page."""
        ...

    def read_kept(self, folder: Path) -> '_Shown':
        """An edit of the history, read from its folder."""
        ...

    def write_down(self):
        """Keep what is set."""
        ...

    def come_back(self):
        """What an earlier page left: the last edit, and what was set."""
        ...

def _thumbnails() -> str:
    """The style by which the buttons of the examples show their pictures."""
    ...

def box(name: str, *inside):
    """Widgets in a box with a name for the style sheet."""
    ...

def _free_folder(image: str) -> str:
    """edits/NAME-1, or the first such folder that is free."""
    ...

def _read_upload(name: str, data: bytes) -> Any:
    """A picture that was uploaded."""
    ...
_APP_WORDS = {'or a full model with --model': 'or start the editor with a full model: layerdiffusion app --model', ' (in Python object= and background=)': '', 'give the two parts with --object and --background': 'fill in the two fields under Advanced', ', and give the rest to --negative-prompt': '', 'its parts go to --object and --background, what shall not be there to --negative-prompt': 'its parts go into the two fields under Advanced', 'what shall not be there goes to --negative-prompt': 'say only what is there', 'options stand outside the sentence, and --help shows those there are': 'leave it out', 'a picture of the place goes to --reference': 'a picture of the place can be uploaded under Advanced'}

def _app_words(refused: BadInput) -> BadInput:
    """A sentence about options of the command line, as the editor would say it."""
    ...
LayerDiffusionApp.running = property(lambda self: self.job is not None and self.kind == 'run')

@dataclass
class _Shown:
    """A result with what it was made of."""
    order: _Order
    result: EditResult
    scores: list
    seconds: float
    canvas: PromptCanvas
    marks: Marks
    reference: tuple | None = ...
    redraw: dict | None = ...

    def note(self) -> dict:
        """What brings all of it back, as JSON has it."""
        ...

def _magnified(picture, size: int=256) -> bytes:
    """A picture (tensor or Pillow) as a file, its longer side `size` pixels."""
    ...

def _source(picture, size: int) -> str:
    """A picture as an address with no file behind it."""
    ...

def _figure(picture, size: int=320, what: str='') -> str:
    """A picture as HTML."""
    ...
_SLIDE = "this.parentElement.style.setProperty('--at', this.value + '%')"
_LARGE = "const d = this.parentElement.querySelector('dialog'); d.firstElementChild.src = this.parentElement.querySelector('.ld-after').src; d.showModal()"

def _compare(before, after, what: str, size: int=512) -> str:
    """Two pictures on each other with a slider between them, as HTML."""
    ...

def _costs(config: EditConfig, count: int, place: bool=False) -> dict:
    """Roughly how many passes of the U-Net each stage of an edit takes, in their order."""
    ...

def _time_left(costs: dict, stages: dict, pace: dict) -> float | None:
    """How long all the stages will still take."""
    ...

def _clock(seconds: float) -> str:
    """Seconds as people say them, rounded so that nobody takes them for exact."""
    ...
_STAGES = dict(reference='Drawing the new place', target='Looking for a target picture (Eq. 4)', words='Learning words (Eq. 2)', embeddings='Fitting the words (Eq. 2)', tuning='Teaching subject and place (Eq. 4-6)', drawing='Drawing the pictures (Eq. 7, 8)')

def _curve(losses: list) -> str:
    """How a loss went, as a small line."""
    ...

def _worth(score: dict) -> tuple:
    """By what pictures are put in order: in one piece first, then what is right, then both numbers, since judges err."""
    ...
_COPY = "navigator.clipboard.writeText(this.parentElement.querySelector('pre').innerText); this.textContent = 'Copied'; setTimeout(() => this.textContent = 'Copy', 1500)"
_LEARNT, _LARGEST = (8, 200 * 2 ** 20)

def _forget_learnt(folder: Path):
    """Take the U-Net's change out of a saved edit; its pictures and settings stay."""
    ...
_TORNADO = dict(headers={'Content-Security-Policy': "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"}, ws_ping_interval=0, ws_ping_timeout=0)

def begin(folder: str, **options):
    """The code cell of the page: the editor, or the sentence that says why there is none."""
    ...

def _page_itself(theme: str) -> str:
    """What stands in the page before the editor: it waits in the system's colours, and may be left or not."""
    ...

def _write_page(folder: Path, options: dict) -> Path:
    """The notebook for Voila, and its settings beside it."""
    ...

def _free_port(port: int | None=None) -> int:
    """The port that was asked for, or the first free one from 8866."""
    ...
_FREED = ['--MappingKernelManager.cull_idle_timeout=45', '--MappingKernelManager.cull_interval=10']

def _sealed() -> list:
    """Nobody else on this machine reads what goes to a kernel, where Jupyter can do that; a kernel warns where not."""
    ...

def _start_voila(page: Path, port: int, theme: str, browser: bool) -> subprocess.Popen:
    """A process that serves a page."""
    ...

def _answers(server: subprocess.Popen, port: int) -> bool:
    """Wait until a server can be reached; False where it ended before."""
    ...

def serve(theme: str='auto', port: int | None=None, browser: bool=True, say: Callable=print, **options):
    """Serve the editor on this machine until Ctrl-C."""
    ...
