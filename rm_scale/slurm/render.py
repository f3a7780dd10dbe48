"""Write a ready job script: the shipped one, with other values in its header and this run's settings in its body."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from rm_scale.errors import UserError
from rm_scale.files import replacing
from rm_scale.launch.planned_run import refuse_named_model_of_another_size
from rm_scale.slurm.header import header_changes, options_before_script, read_header, with_header
from rm_scale.slurm.job_options import sbatch_options
from rm_scale.slurm.settings_check import check_names
from rm_scale.slurm.site import name_of_tier, script_of_tier, site_variables, variables_of_tier
from rm_scale.slurm.time_limits import fitting_grace

MARK = "# Rendered by rm-scale slurm render."


def run(options: argparse.Namespace, settings: Sequence[str]) -> int:
    """Run `rm-scale slurm render`; return 0.

    Raises:
        UserError: an option or a setting is wrong, or the file would replace another.
    """
    job = {**name_of_tier(options.tier), **sbatch_options(options)}
    check_names(settings)
    refuse_named_model_of_another_size(options.tier, settings)
    source = script_of_tier(options.tier)
    site = site_variables()
    header = read_header(source.read_text(encoding="utf-8"))
    job |= fitting_grace(options_before_script(site, job), header)
    text = render(source, job, variables_of_tier(options.tier), settings, site)
    if options.output is None:
        print(text, end="")
        return 0
    path = Path(options.output)
    write_script(path, text)
    print(f"{path}: rm-scale slurm submit --script {shlex.quote(str(path))}, or sbatch {shlex.quote(str(path))}")
    return 0


def write_script(path: Path, text: str) -> None:
    """Write it, unless something else lies there.

    Raises:
        UserError: it can't be written, or would replace what we did not write.
    """
    try:
        if path.exists() and MARK not in path.read_text(encoding="utf-8", errors="replace"):
            raise UserError(f"output={path}: exists, and is no rendered script. Fix: another --output.")
        with replacing(path) as aside:
            aside.write_text(text, encoding="utf-8")
            aside.chmod(0o755)
    except OSError as error:
        raise UserError(f"output={path}: can't be written ({error.strerror}). Fix: another --output.") from error


def render(
    source: Path,
    job: Mapping[str, str],
    variables: Mapping[str, str],
    settings: Sequence[str],
    site: Mapping[str, str] | None = None,
) -> str:
    """Return the script's text.

    Args:
        source: a shipped job script.
        job: sbatch's options, checked by `sbatch_options`.
        variables: values that replace the script's own defaults.
        settings: command line of `rm_scale/train.py`; quoted here, whatever it holds.
        site: variables of `site.env`, which say how the cluster is asked for GPUs, memory and cores.

    Raises:
        UserError: a setting or a variable can't be used.
    """
    lines = source.read_text(encoding="utf-8").splitlines()
    lines.insert(1, f"{MARK} Paths are those of the machine it was rendered on.")
    lines = with_header(lines, header_changes(read_header(source.read_text(encoding="utf-8")), job, site or {}))
    home = shlex.quote(str(source.resolve().parents[1]))
    body = [
        f"[[ -n ${{RM_SCALE_HOME:-}} ]] || RM_SCALE_HOME={home}",
        "settings=(",
        *(f"    {_quoted(word)}" for word in settings),
        ")",
    ]
    place = lines.index("settings=()")
    lines[place : place + 1] = body
    for name, value in variables.items():
        pattern = re.compile(rf"^{name}=\$\{{{name}:-.*\}}$")
        lines = [f"{name}=${{{name}:-{shlex.quote(value)}}}" if pattern.match(line) else line for line in lines]
    return "\n".join(lines) + "\n"


def _quoted(word: str) -> str:
    """Return an argument quoted for bash, on one line.

    Raises:
        UserError: it holds NUL, which no argument can.
    """
    if "\0" in word:
        raise UserError(f"setting {word!r}: holds a NUL character. Fix: remove it.")
    if re.search(r"[^\x20-\x7e]", word):
        # $'...' so that a line break in a value never begins a line, which could read #SBATCH.
        encoded = word.encode("utf-8", errors="surrogateescape")
        return "$'" + "".join(_escaped(byte) for byte in encoded) + "'"
    return shlex.quote(word)


def _escaped(byte: int) -> str:
    plain = 0x20 <= byte < 0x7F and chr(byte) not in "'\\"
    return chr(byte) if plain else f"\\{byte:03o}"
