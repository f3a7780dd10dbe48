"""Put the repository's ready files into the wheel: `configs/`, `ds_configs/` and `slurm/` under `rm_scale/shipped/`.

They stay at the top of the repository, where people look, and `pip install rm-scale` users have them too. An editable
installation gets no copies (they would go stale): there the files of the checkout are used.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SHIPPED_FOLDERS = ("configs", "ds_configs", "slurm")


class ShippedFilesHook(BuildHookInterface[Any]):
    """Called by hatchling (`[tool.hatch.build.targets.wheel.hooks.custom]`)."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Add the folders to a standard wheel; `version` is "editable" for `pip install -e`."""
        if version == "editable":
            return
        for folder in SHIPPED_FOLDERS:
            files = [path for path in (Path(self.root) / folder).rglob("*") if path.is_file()]
            for path in files:
                if not path.name.endswith(".local.env"):  # what one site keeps to itself
                    name = path.relative_to(self.root).as_posix()
                    build_data["force_include"][name] = f"rm_scale/shipped/{name}"
            if not files:
                self.app.display_warning(f"{folder}/ does not exist: the wheel is built without it")
