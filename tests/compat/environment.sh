#!/usr/bin/env bash
# To be sourced by the scripts beside it: environments of other releases, made beside .venv.
#
#   make_environment FOLDER REQUIREMENTS.txt
#
# FOLDER/venv gets the pinned packages that the file names, and nothing that they depend on: what it lacks (torch among
# them) comes from .venv, after its own packages. Made anew when the file or .venv's torch changes.

main_python=.venv/bin/python

make_environment() {
    local folder=$1 requirements=$2 site theirs stamp
    if [[ ! -x $main_python ]]; then
        printf 'ERROR: there is no .venv. Fix: make venv, then run this again\n' >&2
        return 2
    fi
    stamp=$("$main_python" -c 'import torch; print(torch.__version__)' && grep -v '^#' "$requirements")
    if [[ -f $folder/made.txt && $(<"$folder/made.txt") == "$stamp" ]]; then
        return 0
    fi
    mkdir -p "$folder"
    rm -f "$folder/made.txt"
    "$main_python" -m venv --clear --without-pip "$folder/venv"
    site=$("$folder/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    # Without the constraints of this repository, which name other releases. --python: commands get its interpreter.
    PIP_CONSTRAINT='' "$main_python" -m pip --python "$folder/venv/bin/python" install -qq --no-deps -r "$requirements"
    theirs=$("$main_python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    printf 'import site; site.addsitedir(%s)\n' "'$theirs'" >"$site/rm_scale_venv.pth"
    printf '%s\n' "$stamp" >"$folder/made.txt"
}
