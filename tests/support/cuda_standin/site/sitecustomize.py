"""Python imports this by itself when the folder is on PYTHONPATH: it waits for `import torch` and adds the stand-in."""

from __future__ import annotations

import importlib.abc
import importlib.util
import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class _Around(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Do something before and after one package is imported for the first time."""

    def __init__(self, package: str, before: str, after: str) -> None:
        self.package = package
        self.before, self.after = before, after
        self._plain: Any = None

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Answer for the package alone."""
        if fullname != self.package:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None:
            self._plain, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """As ever."""
        created: ModuleType | None = self._plain.create_module(spec)
        return created

    def exec_module(self, module: ModuleType) -> None:
        """What comes before, the package, what comes after."""
        import standin

        getattr(standin, self.before)(os.path.dirname(module.__file__ or ""))
        assert module.__spec__ is not None
        module.__spec__.loader = self._plain
        self._plain.exec_module(module)
        getattr(standin, self.after)()


if os.environ.get("RM_SCALE_CUDA_STANDIN", "0") != "0":
    sys.meta_path.insert(0, _Around("torch", "load_kernels", "install"))
    sys.meta_path.insert(0, _Around("bitsandbytes", "hide_devices", "show_devices"))
