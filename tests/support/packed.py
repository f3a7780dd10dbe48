"""A small virtual environment to pack: the real one takes minutes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TOOL = "#!{root}/bin/python\nimport sys\nprint('tool', sys.prefix)\n"


def make_small_environment(root: Path) -> Path:
    """Make one with a package `small` and a script `small-tool`; rm_scale is not in it."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(root)], check=True)
    site = next(root.glob("lib/python3*/site-packages"))
    (site / "small").mkdir()
    (site / "small" / "__init__.py").write_text("")
    tool = root / "bin" / "small-tool"
    tool.write_text(TOOL.format(root=root))
    tool.chmod(0o755)
    return root
