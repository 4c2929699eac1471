"""DINO-Reg: training-free registration of 3D medical images with frozen DINOv2 features.

``dinoreg.register(fixed, moving)`` is all that most need; see :mod:`dinoreg.api`. What it takes to run is loaded when it is first
asked for, so that importing the package costs and changes nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from dinoreg.threads import sleep_while_waiting

if TYPE_CHECKING:
    from dinoreg.api import register
    from dinoreg.result import Registration
    from dinoreg.volume import Volume

__version__ = "0.1.0"
__all__ = ["Registration", "Volume", "register"]

_HOMES = {"register": "dinoreg.api", "Registration": "dinoreg.result", "Volume": "dinoreg.volume"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'dinoreg' has no attribute {name!r}")
    sleep_while_waiting()  # before torch is loaded
    return getattr(importlib.import_module(_HOMES[name]), name)
