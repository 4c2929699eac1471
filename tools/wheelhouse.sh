#!/usr/bin/env bash
# Fills a folder with every wheel that an image needs, each checked against its hash, for `build.sh --wheelhouse` where there is no
# network: tools/wheelhouse.sh DIR [--python 3.10] [--torch cuda12|cpu]
# --python is the Python of the base image (3.10 on Ubuntu 22.04). --torch cpu takes wheels that are not on PyPI: name PyTorch's own
# index in PIP_EXTRA_INDEX_URL, or a folder that has them in PIP_FIND_LINKS.
set -euo pipefail
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
usage="usage: tools/wheelhouse.sh DIR [--python 3.10] [--torch cuda12|cpu]"
dir='' python=3.10 torch=cuda12
while [ $# -gt 0 ]; do
    case $1 in
        --python) python=${2:?$usage}; shift 2 ;;
        --torch) torch=${2:?$usage}; shift 2 ;;
        -*) echo "error: unknown option $1; $usage" >&2; exit 2 ;;
        *) dir=$1; shift ;;
    esac
done
[ -n "$dir" ] || { echo "error: no folder given; $usage" >&2; exit 2; }
[ -f "$root/locks/torch-$torch.txt" ] || { echo "error: --torch is $torch; expected cuda12 or cpu" >&2; exit 2; }

# pip would judge the markers by the Python that runs it: without them a few small wheels too many come along, and none is missing.
lock=$(mktemp)
trap 'rm -f "$lock"' EXIT
sed 's/ ; [^\\]*//' "$root/locks/packages.txt" "$root/locks/torch-$torch.txt" > "$lock"
tag=cp${python//./}
platforms=()
for glibc in 28 27 26 24 17 12 5; do platforms+=(--platform "manylinux_2_${glibc}_x86_64"); done
"${PIP_PYTHON:-python3}" -m pip download --quiet --dest "$dir" --no-deps --require-hashes --requirement "$lock" --only-binary=:all: \
    --python-version "$python" --implementation cp --abi "$tag" --abi abi3 --abi none \
    "${platforms[@]}" --platform manylinux2014_x86_64 --platform manylinux2010_x86_64 --platform manylinux1_x86_64
echo "$dir: $(find "$dir" -name '*.whl' | wc -l) wheels, $(du -shL "$dir" | cut -f1)"
