"""The older place of `rm_scale.demo.assets`, for scripts that import from here."""

from __future__ import annotations

import importlib
from typing import Any


def __getattr__(name: str) -> Any:
    return getattr(importlib.import_module("rm_scale.demo.assets"), name)
