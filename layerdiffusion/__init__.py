__version__ = "0.1.0"

import os as _os
from importlib import import_module as _import_module

# Before torch is imported: threads that wait give way to other programs, see the page "making it fast".
_os.environ.setdefault("GOMP_SPINCOUNT", "10000")

_home = dict(
    LayerDiffusion="pipeline",
    EditConfig="pipeline",
    EditResult="pipeline",
    load_edit="pipeline",
    preset="settings",
    BadInput="base.core",
    LayerDiffusionError="base.core",
    BadPicture="base.core",
    BadModel="base.core",
    OutOfMemory="base.core",
    PromptCanvas="interface.canvas",
    LayerDiffusionApp="interface.app",
)
__all__ = list(_home)


def __getattr__(name):
    "Import a public name when it is first asked for, so that `import layerdiffusion` stays quick."
    if name not in _home:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(_import_module(f".{_home[name]}", __name__), name)


def __dir__():
    return sorted({*globals(), *_home})
