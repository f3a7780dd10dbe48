#!/usr/bin/env bash
# Make, or bring up to date, the virtual environment that `make demo`, `make test` and `make quality` use.
#
#   tools/make_venv.sh [DIRECTORY]        default: .venv in the repository
#
# Nothing outside DIRECTORY is changed. PYTHON=/path/to/python chooses the interpreter.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${1:-.venv}
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1

# A candidate counts only if it really starts (version managers leave shims that don't), is new enough, and has venv.
usable() {
    command -v "$1" >/dev/null 2>&1 &&
        "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

new_enough() {
    command -v "$1" >/dev/null 2>&1 && "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

find_python() {
    local candidate without_venv=""
    for candidate in ${PYTHON:+"$PYTHON"} python3.13 python3.12 python3.11 python3; do
        if usable "$candidate"; then
            printf '%s\n' "$candidate"
            return 0
        fi
        if [[ -z $without_venv ]] && new_enough "$candidate"; then
            without_venv=$candidate
        fi
    done
    if [[ -n $without_venv ]]; then
        local version
        version=$("$without_venv" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
        printf 'ERROR: %s can make no virtual environment: its venv or ensurepip module is missing.\n' "$without_venv" >&2
        printf '  Fix: apt install python3-venv    (or python%s-venv), then run the same command again\n' "$version" >&2
    else
        printf 'ERROR: no Python 3.11 or newer found (tried PYTHON, python3.13, python3.12, python3.11, python3).\n' >&2
        printf '  Fix: apt install python3 python3-venv on Debian 12 or Ubuntu 24.04 and newer,\n' >&2
        printf '       or name one: PYTHON=/path/to/python3.11 make test\n' >&2
    fi
    return 1
}

started=$SECONDS
if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    python=$(find_python)
    printf '[setup] making %s with %s (%s)\n' "$venv" "$python" "$("$python" --version 2>&1)"
    "$python" -m venv --clear "$venv"
fi

torch_version=$(sed -n 's/^torch==\([0-9.]*\).*/\1/p' constraints.txt)
if [[ -z $torch_version ]]; then
    printf "ERROR: constraints.txt has no line 'torch==VERSION'. Fix: restore it with git checkout constraints.txt\n" >&2
    exit 1
fi

# torch first: the build must be chosen before a dependency brings the default one.
printf '[setup] '
"$venv/bin/python" tools/install_torch.py "$torch_version"
printf '[setup] installing rm_scale and its pinned dependencies (some minutes the first time)\n'
"$venv/bin/python" -m pip install -qq --constraint constraints.txt --editable '.[dev]'
printf '[setup] ready in %d s: %s\n' "$((SECONDS - started))" "$("$venv/bin/python" -c 'import torch, transformers, trl, deepspeed
print(f"torch {torch.__version__}, transformers {transformers.__version__}, trl {trl.__version__}, deepspeed {deepspeed.__version__}")' 2>/dev/null | tail -n 1)"
