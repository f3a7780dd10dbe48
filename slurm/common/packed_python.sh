#!/usr/bin/env bash
# packed_python.sh ARCHIVE FOLDER ARGUMENTS...   starts Python on a node, from the node's own copy of a packed environment
#
# Run by the task of each node in the place of Python (RM_SCALE_PYTHON), and on the first node by the job script. The
# first to come on a node unpacks ARCHIVE (rm-scale slurm pack) to FOLDER/env-KEY; all others, of later jobs too, find it.
# An archive that was packed anew has another key, so nobody's files change while they are used.
#
#   env-KEY/        whole, since it gets its name by one rename when it is
#   env-KEY.unpack  locked by the process that unpacks it
#   env-KEY.used    locked, shared, by every process that runs from it; its time is that of the last start
#   part-KEY.*      being unpacked; of a process that was killed when nobody holds the lock
#
# RM_SCALE_PACKED_DAYS: a copy that nobody has started from for so many days is removed (14).
set -euo pipefail

mark=rm_scale_packed.txt # its name in rm_scale/slurm/packed_environment.py
archive=$1 root=$2
shift 2
node=${SLURMD_NODENAME:-$(hostname -s)}

fail() {
    printf 'rm_scale %s: %s\n' "$node" "$*" >&2
    exit 2
}
say() { printf 'rm_scale %s: %s\n' "$node" "$*" >&2; }

# A value of the mark.
value_of() { sed -n "s/^$1=//p" <<<"$description"; }

# Others may write to /tmp, too, and what is in the folder is run.
make_private() {
    mkdir -p -- "$(dirname -- "$root")" 2>/dev/null && mkdir -m 700 -- "$root" 2>/dev/null || :
    [[ -d $root && -O $root && ! -L $root ]] ||
        fail "$root: can't be made, or belongs to somebody else. Fix: RM_SCALE_SCRATCH=a folder on the node's own disk."
    chmod 700 -- "$root"
}

# systemd-tmpfiles and its kin remove files of /tmp one by one when nobody has read them for days.
is_whole() {
    [[ -f $folder/$mark ]] || return 1
    (($(find "$folder" -type f ! -name '*.pyc' ! -name "$mark" | wc -l) >= files))
}

unpack() {
    local part answer started=$SECONDS free
    rm -rf -- "$root/part-$key".* # of a process that was killed: this one holds the lock
    free=$(($(stat --file-system --format '%a * %S' -- "$root")))
    ((free > bytes)) ||
        fail "$root has $((free / 1000000)) MB free, and the packed environment needs $((bytes / 1000000)) MB." \
            "Fix: remove what is not needed there, or RM_SCALE_SCRATCH=another disk of the node."
    part=$(mktemp -d -- "$root/part-$key.XXXXXX")
    if ! answer=$(tar -xf "$archive" -C "$part" --no-same-owner 2>&1); then
        rm -rf -- "$part"
        fail "RM_SCALE_PACKED_ENV=$archive: can't be unpacked to $root: $(tail -n 1 <<<"$answer"). Fix: is the disk" \
            "full (df -h $root), is zstd on the node, is the file whole? rm-scale slurm pack writes it anew."
    fi
    if [[ $(value_of base) == packed ]]; then
        # The only absolute path that an environment needs: of the interpreter it belongs to.
        { printf 'home = %s\n' "$folder/base/bin" && sed '/^home *=/d' "$part/pyvenv.cfg"; } >"$part/pyvenv.new"
        mv -- "$part/pyvenv.new" "$part/pyvenv.cfg"
    fi
    answer=$(LD_LIBRARY_PATH="$part/base/libpython" "$part/bin/python" -V 2>&1) || {
        rm -rf -- "$part"
        fail "the unpacked Python can't be run: $answer. Fix: is $(value_of base) on this node, and may programs be" \
            "run from $root (mounted noexec)? RM_SCALE_SCRATCH=another disk of the node."
    }
    if [[ -e $folder ]]; then # a copy that has lost files; who runs from it keeps what is open
        mv -T -- "$folder" "$root/part-$key.damaged"
    fi
    mv -T -- "$part" "$folder"
    rm -rf -- "$root/part-$key.damaged"
    say "unpacked $archive to $folder in $((SECONDS - started)) s"
}

# Copies of other archives that nobody has used for long. The lock files stay: two processes must never lock two files of
# one name.
remove_old() {
    local used old gone
    # shellcheck disable=SC2094
    while IFS= read -r -d '' used; do
        old=${used%.used}
        if [[ $old == "$folder" || ! -f $old/$mark ]]; then continue; fi
        (
            flock -n -x 8 || exit 0
            # shellcheck disable=SC2094 # only its time is read
            [[ -n $(find "$used" -mtime "+${RM_SCALE_PACKED_DAYS:-14}") ]] || exit 0 # started from a moment ago
            gone=$root/part-old.$$
            mv -T -- "$old" "$gone" && rm -rf -- "$gone" && say "removed $old: not used for long"
        ) 8<"$used" || :
    done < <(find "$root" -maxdepth 1 -name 'env-*.used' -mtime "+${RM_SCALE_PACKED_DAYS:-14}" -print0)
}

description=$(tar -xOf "$archive" --occurrence=1 "$mark" 2>/dev/null) || :
key=$(value_of key) files=$(value_of files) bytes=$(value_of bytes)
[[ $key =~ ^[0-9a-f]{16}$ && $files =~ ^[0-9]+$ && $bytes =~ ^[0-9]+$ ]] ||
    fail "RM_SCALE_PACKED_ENV=$archive: can't be read on this node, or rm-scale slurm pack did not write it (a .zst" \
        "needs zstd on every node). Fix: rm-scale slurm pack --output FILE.tar on the shared disk."
make_private
folder=$root/env-$key
# Open, and so locked, until the Python that takes this shell's place has ended.
exec 9>>"$folder.used"
flock -s 9
touch -- "$folder.used"
if ! is_whole; then
    (
        flock -x 8
        if ! is_whole; then
            unpack
            remove_old
        fi
    ) 8>>"$folder.unpack"
fi
export PATH="$folder/bin:$PATH" # DeepSpeed looks for ninja there
# Modules are not looked for in the folder at hand, nor by the ranks beside train.py: both are on the shared disk.
[[ ${1:-} != -m ]] || export PYTHONSAFEPATH=1
if [[ -d $folder/base/libpython ]]; then
    export LD_LIBRARY_PATH="$folder/base/libpython${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
fi
exec "$folder/bin/python" "$@"
