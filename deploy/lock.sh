#!/bin/sh
# Writes deploy/lock/{cpu,cuda,dev}.txt anew from pyproject.toml and deploy/lock/dev.in: `make lock`.
#
#   cpu.txt   the server with the CPU build of torch
#   cuda.txt  the same versions with the CUDA build of torch, triton and the nvidia packages
#   dev.txt   the tools of the tests; installed together with one of the two above
#
# Every requirement has hashes and none has an address, so the files work with any mirror and from a folder of wheels.
# Versions that stand there already are kept; UPGRADE=1 takes the newest of all.
# The CPU build must be findable by pip (PIP_FIND_LINKS, or pip's configuration). Needs uv (in dev.txt) and pip.
set -eu

TORCH=2.13.0
PYTHON=${PYTHON:-python3}
UV=${UV:-uv}
root=$(cd "$(dirname "$0")/.." && pwd)
lock=$root/deploy/lock
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

compile() { # out, then uv's arguments
    out=$1
    shift
    kept=$lock/$(basename "$out")
    if [ -z "${UPGRADE:-}" ] && [ -f "$kept" ]; then cp "$kept" "$work/body.txt"; fi
    "$UV" pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate --no-header \
        --no-emit-index-url --no-emit-find-links "$@" --output-file "$work/body.txt"
    { printf '# Written by deploy/lock.sh; change pyproject.toml or dev.in instead. %s\n' "$header"; cat "$work/body.txt"; } >"$out"
    rm "$work/body.txt"
}

names() { sed -n 's/^\([A-Za-z0-9._-]*\)==.*/\1/p' "$1" | sort -u; }

cp "$root/pyproject.toml" "$work/"
cd "$work"

"$PYTHON" -m pip download --quiet --no-deps --dest wheels "torch==$TORCH"
ls wheels/torch-"$TORCH"+cpu-*.whl >/dev/null 2>&1 || {
    echo "lock.sh: pip does not find the CPU build of torch $TORCH; point PIP_FIND_LINKS at its folder." >&2
    exit 1
}
echo "torch==$TORCH+cpu" >torch-cpu.txt
header="torch $TORCH is the CPU build for CPython 3.11."
compile cpu.txt pyproject.toml --find-links wheels --constraint torch-cpu.txt
# pip takes the local version +cpu for ==$TORCH; the hash decides which file it is.
sed "s/^torch==$TORCH+cpu/torch==$TORCH/" cpu.txt >"$lock/cpu.txt"

# The same versions everywhere but for torch.
grep -E '^[A-Za-z0-9._-]+==' cpu.txt | grep -v '^torch==' | sed 's/ *\\$//' >shared.txt
echo "torch==$TORCH" >torch-cuda.txt
header="torch $TORCH is the CUDA build."
compile "$lock/cuda.txt" pyproject.toml --extra cuda --constraint torch-cuda.txt --constraint shared.txt

header="Install together with cpu.txt or cuda.txt."
set --
for name in $(names cpu.txt) $(names "$lock/cuda.txt" | grep -v "^triton$"); do
    set -- "$@" --no-emit-package "$name"
done
compile "$lock/dev.txt" "$lock/dev.in" pyproject.toml --find-links wheels --constraint torch-cpu.txt --constraint shared.txt "$@"
sed -i '/^# The following packages were excluded/,$d' "$lock/dev.txt"
