#!/usr/bin/env bash
# Makes the stand-in for the base image, a minimal Debian with python3, unless there is one: .ci/standin.sh IMAGE CACHE
# The system is kept in CACHE between runs.
set -euo pipefail
image=$1 tarball=$2/standin.tar
if buildah inspect --type image "$image" > /dev/null 2>&1; then
    echo "$image is there"
    exit 0
fi
mkdir -p "$2"
if [ ! -f "$tarball" ]; then
    root=$(mktemp -d)
    trap 'rm -rf "$root"' EXIT
    debootstrap --variant=minbase --include=python3 bookworm "$root/system" > "$root/log" 2>&1 || { tail -20 "$root/log" >&2; exit 1; }
    rm -rf "$root/system/var/cache/apt/archives" "$root/system/var/lib/apt/lists"
    tar --numeric-owner -C "$root/system" -cf "$tarball.part" .
    mv "$tarball.part" "$tarball"
fi
container=$(buildah from scratch)
buildah add --quiet "$container" "$tarball" /
buildah commit --quiet --rm "$container" "$image"
