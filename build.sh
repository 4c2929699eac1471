#!/usr/bin/env bash
# Builds the container image dinoreg:VERSION with docker, podman or buildah.
usage='usage: ./build.sh [options]
  --weights VARIANT|none  checkpoint to bake in, as named in weights/manifest.json (default: vitl14_reg4);
                          none: the platform puts it into /opt/ml/model, or /oncoreg/model is mounted
  --torch cuda12|cpu      build of PyTorch (default: cuda12, which runs on the CPU too; cpu: a small image, needs --wheelhouse)
  --wheelhouse DIR        install from the wheels in DIR and use no index (tools/wheelhouse.sh fills it)
  --base IMAGE            base image, Debian or Ubuntu with Python 3.10 to 3.12 (default: the ARG in the Dockerfile)
  --tag NAME[:TAG]        name of the image (default: dinoreg:VERSION)
  --engine ENGINE         docker, podman or buildah (default: the first of them that works)
  --check                 build nothing; say what is not pinned, and exit 1 if anything is not'
set -euo pipefail
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
source "$root/tools/engine.sh"

weights=vitl14_reg4 torch=cuda12 wheelhouse='' base='' engine='' check=false tag=dinoreg:$(code_version)
while [ $# -gt 0 ]; do
    case $1 in
        --check) check=true; shift; continue ;;
        -h | --help) echo "$usage"; exit 0 ;;
        --weights | --torch | --wheelhouse | --base | --tag | --engine) ;;
        *) echo "error: unknown option $1" >&2; echo "$usage" >&2; exit 2 ;;
    esac
    [ $# -ge 2 ] || { echo "error: $1 needs a value" >&2; exit 2; }
    declare "${1#--}=$2"
    shift 2
done
[ -n "$base" ] || base=$(sed -n 's/^ARG BASE=//p' "$root/Dockerfile")

if $check; then exec python3 "$root/tools/pins.py" --base "$base"; fi

# Everything that can be refused is refused before anything is built.
[ -f "$root/locks/torch-$torch.txt" ] || { echo "error: --torch is $torch; expected cuda12 or cpu" >&2; exit 2; }
checkpoint='' weights_sha256=none
if [ "$weights" != none ]; then
    checkpoint=$(verified_weights "$weights")
    weights_sha256=$(manifest_field "$weights" sha256)
fi
if [ -n "$wheelhouse" ] && ! compgen -G "$wheelhouse/pip-*.whl" > /dev/null; then
    echo "error: $wheelhouse has no wheels (no pip-*.whl); fill it with: tools/wheelhouse.sh $wheelhouse" >&2
    exit 2
fi
if [ "$torch" = cpu ] && [ -z "$wheelhouse" ]; then
    echo "error: --torch cpu needs --wheelhouse: those wheels are not on PyPI (see tools/wheelhouse.sh)" >&2
    exit 2
fi
engine=$(find_engine "$engine")

# The context: exactly what goes in, readable under any uid.
context=$root/dist/context
rm -rf "$context"
mkdir -p "$context/weights"
trap 'rm -rf "$context"' EXIT
cp -r "$root"/{Dockerfile,.dockerignore,LICENSE,process.py,dinoreg,oncoreg,locks} "$context/"
cp "$root"/weights/*.{json,py} "$context/weights/"
[ ! -f "$root/weights/README.md" ] || cp "$root/weights/README.md" "$context/weights/"
[ -z "$checkpoint" ] || cp --dereference "$checkpoint" "$context/weights/"
rm -rf "$context"/*/__pycache__
chmod -R a+rX "$context"
if [ -n "$wheelhouse" ]; then  # several GB: linked, where the file system can
    mkdir "$context/wheelhouse"
    cp --link --dereference "$wheelhouse"/*.whl "$context/wheelhouse/" 2> /dev/null ||
        cp --dereference "$wheelhouse"/*.whl "$context/wheelhouse/"
fi

version=$(code_version) commit=$(code_commit)
echo "building $tag: version $version, commit $commit, weights $weights, torch $torch, base $base, with $engine"
options=(--build-arg "BASE=$base" --build-arg "TORCH=$torch" --tag "$tag"
    --label "org.opencontainers.image.title=dinoreg"
    --label "org.opencontainers.image.version=$version"
    --label "org.opencontainers.image.revision=$commit"
    --label "org.opencontainers.image.licenses=Apache-2.0"
    --label "org.opencontainers.image.base.name=$base"
    --label "dinoreg.weights=$weights"
    --label "dinoreg.weights.sha256=$weights_sha256")
case $engine in
    # Platforms load the format of docker; the engines that can write another must be told.
    buildah | podman) "$engine" build --layers --format docker "${options[@]}" "$context" ;;
    *) "$engine" build --platform linux/amd64 "${options[@]}" "$context" ;;
esac
echo "built $tag"
