"""The files of `slurm/`: the job script of each tier, and the variables of `site.env`."""

from __future__ import annotations

import difflib
import os
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

from rm_scale.errors import UserError
from rm_scale.planning.deepspeed_config import shipped_file
from rm_scale.tiers import model_tier

_SCRIPT_OF_TIER = {"1b": "rm_1b.sh", "3b": "rm_7b.sh", "7b": "rm_7b.sh", "13b": "rm_13b.sh"}
_BESIDE_SITE = frozenset(
    f"RM_SCALE_{name}"
    for name in (
        *("CONFIG", "TIER", "SWEEP", "FORCE", "HOME", "SITE_ENV"),
        # Set by our own commands and tests.
        *(
            "ASSETS_CACHE",
            "CACHES",
            "ATTEMPT",
            "ATTEMPT_DIR",
            "DOCTOR",
            "END_TIME",
            "SERVE_TOKEN",
            "SLURM_CLUSTER",
            "TORCH_INDEX",
        ),
    )
)
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
    """Return this environment with what `site.env` adds to it, as bash reads it, checked as a job checks it.

    Raises:
        UserError: a line of it is not what it was meant to be, or the job could not use a value.
    """
    script = script_of_tier("1b")
    common = script.with_name("common")
    files = [
        os.environ.get("RM_SCALE_SITE_ENV", ""),
        *(str(script.with_name(f"site{kind}.env")) for kind in (".local", "")),
    ]
    code = 'source "$1/records.sh"; source "$1/site.sh"; shift; set -a; rm_scale_read_sites "$@" >&2; env -0'
    command = ["bash", "-c", code, "site", str(common), *files]
    done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, check=False)
    if done.returncode != 0:
        said = done.stderr.decode("utf-8", errors="replace").replace("rm_scale: ", "").strip()
        raise UserError(f"slurm/site.env and the environment say what a job can't use:\n{said[-3000:]}")
    entries = done.stdout.decode("utf-8", errors="surrogateescape").split("\0")
    pairs = (entry.partition("=") for entry in entries if "=" in entry)
    return {name: value for name, _, value in pairs}


def known_variables() -> frozenset[str]:
    """Return the names of all variables that a site or a user may set: those of `site.env`, and a few beside it."""
    text = script_of_tier("1b").with_name("site.env").read_text(encoding="utf-8")
    return frozenset(re.findall(r"^: \"\$\{(RM_SCALE_\w+):=", text, re.M)) | _BESIDE_SITE


def unknown_variables(environ: Mapping[str, str]) -> list[str]:
    """Return a sentence for each variable whose name is nearly one of ours: most likely it was misspelt."""
    known = known_variables()
    found = []
    for name in sorted(environ):
        if name.startswith("RM_SCALE_") and name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.85)
            if near:
                found.append(
                    f"{name}: no such variable; did you mean {near[0]}? Fix: correct slurm/site.env or unset it."
                )
    return found
