#!/bin/sh
# Fetches the Debian packages of the images, on a connected Debian 12 machine; their digests are checked by build.py too.
#
#   sh docker/packages.sh FOLDER            what docker/packages-*.txt pin
#   sh docker/packages.sh FOLDER --update   the newest versions instead, and pins them
#
# A pinned version that Debian has replaced is in Debian's snapshot archive alone: keep the folder, or update the pins.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
folder=${1:?"give the folder for the packages"}
mkdir -p "$folder"
cd "$folder"
for pins in "$here"/packages-cpu.txt "$here"/packages-cuda.txt; do
    head -n 1 "$pins" >pins.new
    sed -n 's/^[0-9a-f]\{64\}  //p' "$pins" | while read -r file; do
        name=${file%%_*}
        version=$(printf %s "$file" | sed 's/^[^_]*_//; s/_[^_]*$//; s/%3a/:/')
        if [ "${2:-}" = --update ]; then
            version=$(apt-cache policy "$name" | sed -n 's/^  Candidate: //p')
            apt-get download -qq "$name=$version"
            file=$(ls "${name}_$(printf %s "$version" | sed 's/:/%3a/')"_*.deb)
            sha256sum "$file" >>pins.new
        elif [ ! -f "$file" ]; then
            apt-get download -qq "$name=$version"
        fi
    done
    if [ "${2:-}" = --update ]; then
        cp pins.new "$pins"
    else
        sed '/^#/d' "$pins" | sha256sum --check --quiet
    fi
    rm pins.new
done
