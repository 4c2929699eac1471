# shellcheck shell=bash
# Sourced by build.sh, export.sh and test.sh: the container engine and the names of the image.

# The engine to use: $1 if it is given, else the first that works of docker, podman and buildah.
find_engine() {
    if [ -n "${1:-}" ]; then
        command -v "$1" > /dev/null || { echo "error: the engine $1 is not installed" >&2; return 1; }
        echo "$1"
    elif docker info > /dev/null 2>&1; then echo docker
    elif podman info > /dev/null 2>&1; then echo podman
    elif command -v buildah > /dev/null; then echo buildah
    else
        echo "error: no container engine; expected docker (with its daemon running), podman or buildah" >&2
        return 1
    fi
}

# A label of an image: image_label ENGINE IMAGE LABEL
image_label() {
    case $1 in
        buildah) buildah inspect --type image --format "{{index .Docker.Config.Labels \"$3\"}}" "$2" ;;
        *) "$1" image inspect --format "{{index .Config.Labels \"$3\"}}" "$2" ;;
    esac
}

# A field of a model in weights/manifest.json: manifest_field VARIANT file|sha256|bytes
manifest_field() {
    python3 - "$root/weights/manifest.json" "$1" "$2" << 'PYTHON'
import json, sys

models = json.load(open(sys.argv[1], encoding="utf-8"))["models"]
if sys.argv[2] not in models:
    sys.exit(f"error: unknown weights {sys.argv[2]!r}; expected none or one of: {', '.join(models)}")
print(models[sys.argv[2]][sys.argv[3]])
PYTHON
}

# The checkpoint of a variant, once its sha256 is that of the manifest: verified_weights VARIANT -> path
verified_weights() {
    local file expected found
    file=$(manifest_field "$1" file) && expected=$(manifest_field "$1" sha256) || return 1
    if [ ! -f "$root/weights/$file" ]; then
        echo "error: weights/$file is missing; fetch it with: python3 weights/fetch.py $1" >&2
        return 1
    fi
    found=$(sha256sum "$root/weights/$file" | cut -d' ' -f1)
    if [ "$found" != "$expected" ]; then
        echo "error: weights/$file has sha256 $found, expected $expected; fetch it again with: python3 weights/fetch.py $1" >&2
        return 1
    fi
    echo "$root/weights/$file"
}

# The version of the code, and the commit it is ("unknown" outside a repository, with -dirty where files differ from it).
code_version() { sed -n 's/^__version__ = "\(.*\)"$/\1/p' "$root/dinoreg/__init__.py"; }
code_commit() {
    local commit
    commit=$(git -C "$root" rev-parse --short=12 HEAD 2> /dev/null) || { echo unknown; return; }
    git -C "$root" diff --quiet HEAD -- Dockerfile LICENSE process.py dinoreg oncoreg locks weights 2> /dev/null || commit+=-dirty
    echo "$commit"
}
