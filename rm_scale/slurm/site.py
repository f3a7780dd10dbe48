"""The files of `slurm/`: the job script of each tier, and the variables of `site.env`."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from rm_scale.errors import UserError
from rm_scale.planning.deepspeed_config import shipped_file
from rm_scale.tiers import model_tier

_SCRIPT_OF_TIER = {"1b": "rm_1b.sh", "3b": "rm_7b.sh", "7b": "rm_7b.sh", "13b": "rm_13b.sh"}
_OWN_CONFIG = frozenset({"1b", "7b", "13b"})


def script_of_tier(tier: str) -> Path:
    """Return the job script of a tier; a tier without one of its own takes the next larger one's.

    Raises:
        ConfigError: there is no such tier.
        UserError: this installation has no slurm/.
    """
    name = _SCRIPT_OF_TIER[model_tier(tier).name]
    path = shipped_file("slurm", name)
    if path is None:
        raise UserError(
            f"slurm/{name}: not in this installation. Fix: install rm-scale from its wheel, or use a checkout."
        )
    return path


def variables_of_tier(tier: str) -> dict[str, str]:
    """Return the variables that turn another tier's script into this tier's."""
    name = model_tier(tier).name
    return {} if name in _OWN_CONFIG else {"RM_SCALE_TIER": name, "RM_SCALE_CONFIG": "none"}


def name_of_tier(tier: str) -> dict[str, str]:
    """Return the job's name as an option of sbatch, where the script carries another tier's."""
    name = model_tier(tier).name
    return {} if name in _OWN_CONFIG else {"job-name": f"rm_{name}"}


def site_variables() -> dict[str, str]:
    """Return this environment with what `site.env` adds to it, as bash reads it.

    Raises:
        UserError: a line of it fails.
    """
    script = script_of_tier("1b")
    files = [
        os.environ.get("RM_SCALE_SITE_ENV", ""),
        *(str(script.with_name(f"site{kind}.env")) for kind in (".local", "")),
    ]
    code = 'set -a; for file; do if [ -f "$file" ]; then . "$file" || exit 3; fi; done; env -0'
    done = subprocess.run(["bash", "-c", code, "site", *files], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise UserError(
            f"slurm/site.env: bash can't read it: {done.stderr.strip()[-300:]}. Fix: correct the line it names."
        )
    pairs = (entry.partition("=") for entry in done.stdout.split("\0") if "=" in entry)
    return {name: value for name, _, value in pairs}
