#!/bin/sh
# Makes or updates the virtual environment of `make serve` and `make test`; quick when nothing changed.
#
#   sh deploy/venv.sh FOLDER [dev]
#
# PYTHON   interpreter to make it with (python3); 3.11 to 3.13
# TORCH    cpu, cuda or auto (default): auto takes cuda when nvidia-smi finds a GPU, else cpu, and cuda with a printed
#          reason when pip finds no CPU build of torch for this Python
#
# Every package comes from deploy/lock/*.txt and is checked by its hash. A stamp in FOLDER holds a hash of all inputs.
set -eu

venv=$1
kind=${2:-runtime}
PYTHON=${PYTHON:-python3}
TORCH=${TORCH:-auto}
root=$(cd "$(dirname "$0")/.." && pwd)
lock=$root/deploy/lock

say() { echo "venv: $*" >&2; }

check_python() {
    "$PYTHON" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || {
        say "$PYTHON is $("$PYTHON" --version 2>&1); Python 3.11 to 3.13 is needed. Set PYTHON=/path/to/python3.11."
        exit 1
    }
}

inputs_hash() { # kind; of everything the environment is made from
    {
        cat "$root/pyproject.toml" "$root/deploy/venv.sh" "$lock/$torch.txt" "$root"/kernels/cpu/*.[ch] "$root"/engine/predict/*.[ch]
        command -v gcc || true
        [ "$1" = dev ] && cat "$lock/dev.txt"
        "$PYTHON" -c 'import sys; print(sys.version, sys.prefix)'
        echo "$torch $root"
    } | sha256sum | cut -d' ' -f1
}

choose_torch() {
    [ "$TORCH" = auto ] || { echo "$TORCH"; return; }
    if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU; then
        echo cuda
    elif [ -f "$venv/torch" ]; then
        cat "$venv/torch"
    else
        echo cpu
    fi
}

has_cpu_torch() { # whether pip finds the file that cpu.txt names; takes seconds where it is at hand
    only=$venv/torch-cpu.txt
    sed -n '/^torch==/,/[^\\]$/p' "$lock/cpu.txt" >"$only"
    "$venv/bin/python" -m pip install --quiet --dry-run --ignore-installed --no-deps --require-hashes -r "$only" \
        >"$venv/torch-cpu.log" 2>&1
}

make_venv() {
    [ -x "$venv/bin/python" ] || {
        say "making $venv with $("$PYTHON" --version)"
        "$PYTHON" -m venv "$venv"
    }
}

install_all() {
    set -- -r "$lock/$torch.txt"
    [ "$kind" = dev ] && set -- "$@" -r "$lock/dev.txt"
    say "installing $* with hashes checked; the first time takes minutes"
    "$venv/bin/python" -m pip install -qq --require-hashes "$@"
    "$venv/bin/python" -m pip install -qq --no-deps --no-build-isolation --editable "$root"
}

check_python
torch=$(choose_torch)
case $torch in cpu | cuda) ;; *) say "TORCH is $TORCH; it can be cpu, cuda or auto."; exit 1 ;; esac
[ "$(cat "$venv/$kind.stamp" 2>/dev/null)" = "$(inputs_hash "$kind")" ] && exit 0

make_venv
if [ "$torch" = cpu ] && ! has_cpu_torch; then
    say "pip does not find the CPU build of torch that deploy/lock/cpu.txt names for $("$venv/bin/python" --version);"
    say "its words are in $venv/torch-cpu.log."
    [ "$TORCH" = auto ] || exit 1
    say "installing the CUDA build instead, which also runs on a CPU but is several GB. To avoid it, put the file into a"
    say "folder and set PIP_FIND_LINKS to the folder."
    torch=cuda
fi
rm -f "$venv"/*.stamp
install_all
echo "$torch" >"$venv/torch"
inputs_hash runtime >"$venv/runtime.stamp"
[ "$kind" = dev ] && inputs_hash dev >"$venv/dev.stamp"
say "$venv is ready (torch: $torch)"
