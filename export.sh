#!/usr/bin/env bash
# Writes what is uploaded: the image as NAME_VERSION_COMMIT.tar.gz with its checksum and, if no weights are baked in, the model.
usage='usage: ./export.sh [options]
  --tag NAME[:TAG]    image that build.sh made (default: dinoreg:VERSION)
  --out DIR           where the files go (default: dist)
  --weights VARIANT   checkpoint of the model tarball, for an image without weights (default: vitl14_reg4; none: no tarball)
  --limit-gb N        refuse a file above this (default: 10, the limit of grand-challenge.org)
  --engine ENGINE     docker, podman or buildah (default: the first of them that works)'
set -euo pipefail
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
source "$root/tools/engine.sh"

weights=vitl14_reg4 out=$root/dist limit_gb=10 engine='' tag=dinoreg:$(code_version)
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) echo "$usage"; exit 0 ;;
        --tag | --out | --weights | --engine) ;;
        --limit-gb) ;;
        *) echo "error: unknown option $1" >&2; echo "$usage" >&2; exit 2 ;;
    esac
    [ $# -ge 2 ] || { echo "error: $1 needs a value" >&2; exit 2; }
    name=${1#--}
    declare "${name//-/_}=$2"
    shift 2
done
engine=$(find_engine "$engine")
label() { image_label "$engine" "$tag" "$1"; }
version=$(label org.opencontainers.image.version) || { echo "error: no image $tag; build it with ./build.sh" >&2; exit 1; }
commit=$(label org.opencontainers.image.revision)
baked=$(label dinoreg.weights)
checkpoint=''
if [ "$baked" = none ] && [ "$weights" != none ]; then checkpoint=$(verified_weights "$weights"); fi

mkdir -p "$out"
part=$(mktemp -d "$out/.export-XXXXXX")
trap 'rm -rf "$part"' EXIT
# finish NAME: checks the size of a file in $part, writes the checksum beside it and moves both to $out.
finish() {
    local bytes
    bytes=$(stat -c %s "$part/$1")
    if [ "$bytes" -gt $((limit_gb * 1000000000)) ]; then
        echo "error: $1 has $bytes bytes, above the limit of $limit_gb GB; build with --weights none and upload the model apart" >&2
        exit 1
    fi
    (cd "$part" && sha256sum "$1" > "$1.sha256")
    mv "$part/$1" "$part/$1.sha256" "$out/"
    echo "$out/$1: $bytes bytes ($((bytes / 1000000)) MB), sha256 $(cut -d' ' -f1 "$out/$1.sha256")"
}

name=$(basename "${tag%:*}")_${version}_${commit}.tar.gz
# -n: no time of day in the file. A platform reads gzip of any speed; pigz uses all cores.
gzip=(gzip -n)
if command -v pigz > /dev/null; then gzip=(pigz -n); fi
if [ "$engine" = buildah ]; then
    buildah push --quiet "$tag" "docker-archive:$part/image.tar:$tag"
    "${gzip[@]}" -c "$part/image.tar" > "$part/$name"
    rm "$part/image.tar"
else
    "$engine" save "$tag" | "${gzip[@]}" -c > "$part/$name"
fi
finish "$name"

if [ -n "$checkpoint" ]; then  # extracted to /opt/ml/model: the file at the top, nothing else
    model=$(basename "${tag%:*}")_model_${weights}.tar.gz
    tar --sort=name --mtime=@0 --owner=0 --group=0 --numeric-owner --mode=0644 -C "$(dirname "$checkpoint")" \
        -cf - "$(basename "$checkpoint")" | "${gzip[@]}" -c > "$part/$model"
    finish "$model"
elif [ "$baked" = none ]; then
    echo "note: $tag has no weights and no model tarball was asked for: it runs with DINOREG_FEATURES=mind alone"
fi
