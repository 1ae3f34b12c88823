# Made by tests/stubs.py: the classes of the module beside it, whole.
"""An edit that is interrupted goes on where it was, and ends with the same pictures to the last byte"""
__all__ = []
import functools
import time
import warnings
from collections.abc import Callable
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
import torch
from .base.core import BadInput, Event, join_callbacks, write_atomic
from .base.sd import Models, optimise
from .interface.saving import patch

def _snapshot(params, optimizer, losses, copy: bool=True) -> dict:
    """Everything a stage needs to go on, as one flat dict of tensors."""
    ...

def _restore(saved: dict, params, optimizer, losses):
    """Put a `_snapshot` back."""
    ...

class _Checkpoint:
    """Keeps a training stage that may be interrupted: in memory, and in a file where a folder is given."""
    share = 0.05
    every = 5.0
    speed = 500000000.0
    now = staticmethod(time.monotonic)

    def __init__(self, stage: str, key: str, kept: dict, folder=None, text: str='', say: Callable | None=None):
        ...

    def begin(self, params, optimizer, losses) -> int:
        """Restore what was kept of this very stage, if anything; gives the step to go on from."""
        ...

    @property
    def size(self) -> int:
        """Bytes of the file, about: each parameter, and the two numbers that Adam keeps of it."""
        ...

    def due(self) -> bool:
        """Whether the file may be written now."""
        ...

    def paid(self, begin: float):
        """Note what a write has taken."""
        ...

    def __call__(self, event: Event):
        ...

    def write(self, tensors: dict | None=None, **note):
        """Write the live stage, or a result, to its file."""
        ...

    def keep(self, tensors: dict | None=None, **note):
        """Write the file; where that fails, say so once: a full disk stops the checkpoints, not the run."""
        ...

    def read(self, done: bool=False) -> dict | None:
        """What the file holds of this very stage; nothing where it is damaged."""
        ...

    def whole(self) -> bool:
        """Whether the live stage is between two steps: Adam counts a step before it is made, the losses after."""
        ...

class Resumable:
    """An object whose training stages may be stopped and gone on with, as `LayerDiffusion` is."""
    models: Models
    unfinished: dict
    learnt: dict
    say: Callable

    @contextmanager
    def checkpoint(self, stage: str, key: str, folder=None, text: str=''):
        """Around a training stage: keeps what was done when it is interrupted, and says how to go on."""
        ...

    def leave(self, point: _Checkpoint, remember: bool=False) -> str:
        """Keep a stage that ends before its last step, in its file or else in memory.

    Says where, empty where there is nothing to keep.
    """
        ...

    def follow(self, point: _Checkpoint):
        """A stage is done that others follow: its small result goes into the file where the stage was long.

    Else only if those are stopped.
    """
        ...

    def keep_learnt(self, folder):
        """Write what the stages learnt that are done, where a run ends before its results are saved."""
        ...

    def _kept_run(self, point: _Checkpoint, callback: Callable | None, losses: list) -> Callable:
        """The loop of Eq. 2, `optimise`, with a checkpoint that it goes on from and tells of each step."""
        ...
