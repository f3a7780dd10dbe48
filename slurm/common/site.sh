# shellcheck shell=bash
# What a site says of itself: slurm/site.env and its kin, read and checked. Jobs and `rm-scale slurm submit` share this.

rm_scale_load_site() {
    rm_scale_read_sites "${RM_SCALE_SITE_ENV:-}" "$RM_SCALE_HOME/slurm/site.local.env" "$RM_SCALE_HOME/slurm/site.env"
    export RM_SCALE_DEVICE RM_SCALE_RANKS_PER_NODE RM_SCALE_GPU RM_SCALE_INTERFACE RM_SCALE_RESUME RM_SCALE_CONTAINER
    export RM_SCALE_CHECK_SECONDS RM_SCALE_KILL_SECONDS RM_SCALE_SWEEP="${RM_SCALE_SWEEP:-}"
}

# Reads the files that are there, the first counting most, and checks what they come to. Ends the script with code 2
# when something is wrong; all of it is said before.
rm_scale_read_sites() { # FILE...
    local file sound=yes
    for file; do
        [[ ! -f $file ]] || rm_scale_check_site "$file" || sound=no
    done
    [[ $sound == yes ]] || exit 2
    for file; do
        [[ ! -f $file ]] || rm_scale_read_site "$file"
    done
    rm_scale_check_values || exit 2
}

# Runs one file as it is: what a site writes there need not bear `set -eu`, but a command of it that fails is said.
rm_scale_read_site() { # FILE
    local options=$-
    set +eu
    trap 'rm_scale_site_failed "$?" "${BASH_SOURCE[0]}" "$LINENO" "$BASH_COMMAND"' ERR
    # shellcheck source=slurm/site.env
    source "$1"
    trap - ERR
    [[ $options != *e* ]] || set -e
    [[ $options != *u* ]] || set -u
}

rm_scale_site_failed() { # CODE FILE LINE COMMAND
    # The file's own last line may be a test that was not met: its `source` then fails, here, and no command did.
    [[ $2 != "${BASH_SOURCE[0]}" ]] || return 0
    rm_scale_site_line "$2" "$3" "$4 failed (code $1)" "correct it, or write: $4 || true"
    exit 2
}

rm_scale_site_line() { # FILE NUMBER PROBLEM FIX
    printf 'rm_scale: %s, line %s: %s\n    %s. Fix: %s.\n' \
        "$1" "$2" "$(sed -n "$2{s/\r//g;p}" -- "$1")" "$3" "$4" >&2
}

# Says which lines of a file bash would read otherwise than they were meant; fails when there is one.
rm_scale_check_site() { # FILE
    local -a lines
    local line number=0 sound=yes
    local LC_ALL=C # bytes, whatever the locale
    mapfile -t lines <"$1"
    for line in "${lines[@]}"; do
        number=$((number + 1))
        [[ $line =~ ^[[:space:]]*# && $line != *$'\r' ]] || rm_scale_check_line "$1" "$number" "$line" || sound=no
        [[ $line != *$'\r'* ]] || break # the same holds for every line of such a file
    done
    if [[ $sound == yes ]] && ! line=$(LC_ALL=C bash -n -- "$1" 2>&1); then
        number=$(rm_scale_open_line "$1" "$line")
        rm_scale_site_line "$1" "$number" "bash can't read it: $(sed -n '1s/^.*: line [0-9]*: //p' <<<"$line")" \
            "close the quote, brace or bracket that this line opens"
        sound=no
    fi
    [[ $sound == yes ]]
}

rm_scale_check_line() { # FILE NUMBER LINE
    local mark=$'\xef\xbb\xbf' hard_space=$'\xc2\xa0' curly=$'\xe2\x80['$'\x98-\x9f'']' code=$3 problem fix
    local begin='^[[:space:]]*(export[[:space:]]+|declare[[:space:]]+)?' space='[[:space:]]+'
    local before="${begin}[A-Z_][A-Z0-9_]*$space"'=([^=~]|$)'
    # Of other names it is the environment of one command; and another assignment may follow.
    local after="${begin}(RM_SCALE|SBATCH|SLURM)_[A-Z0-9_]*=$space"
    if [[ $3 =~ $curly || $3 == *"$hard_space"* ]]; then code=$(rm_scale_bare_code "$3"); fi
    if [[ $3 == *$'\r'* ]]; then
        problem="ends like a line of Windows (CRLF), as do others" fix="sed -i 's/\\r\$//' '$1'"
    elif [[ $3 == "$mark"* ]]; then
        problem="begins with a byte order mark" fix="sed -i '1s/^\\xef\\xbb\\xbf//' '$1'"
    elif [[ $code =~ $curly ]]; then
        problem="has the curly quotes of a word processor" fix="write \" or ' instead"
    elif [[ $code == *"$hard_space"* ]]; then
        problem="has a no-break space, which bash takes for a letter" fix="type the space again"
    elif [[ $3 =~ $before || ($3 =~ ${after}[^#[:space:]] && ! $3 =~ ${after}[A-Za-z_][A-Za-z0-9_]*=) ]]; then
        problem="has a space beside =" fix="NAME=value, without spaces"
    else
        return 0
    fi
    ! rm_scale_is_text "$1" "$2" || return 0
    rm_scale_site_line "$1" "$2" "$problem" "$fix"
    return 1
}

# Prints a line without its quoted words and its comment, which may hold anything.
rm_scale_bare_code() { # LINE
    LC_ALL=C sed -E "s/'[^']*'|\"([^\"\\\\]|\\\\.)*\"|(^|[[:space:]])#.*/ /g" <<<"$1"
}

# Is a line in the middle of a here-document or of a quoted word, by what bash says of the lines above?
rm_scale_is_text() { # FILE NUMBER
    (($2 > 1)) || return 1
    [[ $(head -n "$(($2 - 1))" -- "$1" | LC_ALL=C bash -n 2>&1) == *@(here-document|"looking for matching")* ]]
}

# Prints the number of the line to look at: bash names the last quote when an earlier line forgot to close one.
rm_scale_open_line() { # FILE MESSAGE
    local -a lines
    local line number=0
    mapfile -t lines <"$1"
    if [[ $2 == *"unexpected EOF while looking for matching"* ]]; then
        for line in "${lines[@]}"; do
            number=$((number + 1))
            if ! bash -n <<<"$line" 2>/dev/null; then
                echo "$number"
                return
            fi
        done
    fi
    sed -n 's/^.*: line \([0-9]*\): .*/\1/p' <<<"$2" | head -n 1
}

# Says which values the job could not use; fails when there is one.
rm_scale_check_values() {
    local name sound=yes
    local number='^[0-9]{1,9}$' from_one='^[1-9][0-9]{0,8}$'
    for name in ${!RM_SCALE_@}; do
        [[ ${!name-} != *[$'\r\n']* ]] || rm_scale_bad_value "$name" "one line" "close its quotes in the same line" ||
            sound=no
    done
    rm_scale_value RM_SCALE_DEVICE '^(auto|cpu)$' "auto or cpu" || sound=no
    rm_scale_value RM_SCALE_RANKS_PER_NODE "$from_one" "a whole number from 1" || sound=no
    rm_scale_value RM_SCALE_MAX_RESTARTS "$number" "a whole number" || sound=no
    rm_scale_value RM_SCALE_RETRIES "$number" "a whole number" || sound=no
    rm_scale_value RM_SCALE_REQUEUE_SECONDS "$number" "whole seconds" || sound=no
    rm_scale_value RM_SCALE_LIMIT_SECONDS "$from_one" "whole seconds from 1" || sound=no
    rm_scale_value RM_SCALE_CHECK_SECONDS "$from_one" "whole seconds from 1" || sound=no
    rm_scale_value RM_SCALE_KILL_SECONDS "$from_one" "whole seconds from 1" || sound=no
    rm_scale_value RM_SCALE_UNPACK_SECONDS "$from_one" "whole seconds from 1" || sound=no
    rm_scale_value RM_SCALE_PACKED_DAYS "$number" "whole days" || sound=no
    rm_scale_value RM_SCALE_RESUME '^(auto|none)$' "auto or none" || sound=no
    rm_scale_value RM_SCALE_CONTAINER_ENGINE '^(apptainer|pyxis)$' "apptainer or pyxis" || sound=no
    rm_scale_value RM_SCALE_FORCE '^plan$' "plan" || sound=no
    [[ $sound == yes ]]
}

rm_scale_value() { # NAME PATTERN RULE: an empty value is the default
    [[ -z ${!1:-} || ${!1} =~ $2 ]] || rm_scale_bad_value "$1" "$3" "correct it in slurm/site.env or the environment"
}

rm_scale_bad_value() { # NAME RULE FIX
    printf 'rm_scale: %s=%q: must be %s. Fix: %s.\n' "$1" "${!1}" "$2" "$3" >&2
    return 1
}
