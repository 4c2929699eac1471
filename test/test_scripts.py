"""The scripts around the product, run with stand-ins for python3 and docker: nothing is installed, built or fetched."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

from pins import unpinned  # noqa: E402

DIGEST = "base@sha256:" + "0" * 64

FAKE_PYTHON = """#!/usr/bin/env bash
case "$*" in
    "-c "*) exit "${FAKE_UNSUPPORTED:-0}" ;;
    --version) echo "Python 3.11.0" ;;
    "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && touch "$3/pyvenv.cfg" ;;
    *)
        echo "$*" >> "$FAKE_LOG"
        case "$*" in
            *pip*) exit "${FAKE_PIP:-0}" ;;
            *fetch.py*) exit "${FAKE_FETCH:-0}" ;;
            *process.py*) mkdir -p "$FAKE_OUTPUT/warped" && touch "$FAKE_OUTPUT"/{disp_x,warped/warped_x}.nii.gz ;;
        esac ;;
esac
"""

PYTHONS = dict.fromkeys(("python3", "python3.10", "python3.11", "python3.12"), FAKE_PYTHON)

FAKE_DOCKER = """#!/usr/bin/env bash
case "$1" in
    info) ;;
    build) echo "$*" > "$FAKE_LOG"; (cd "${!#}" && find . -type f -printf '%P %m\\n' | sort) > "$FAKE_LOG.context" ;;
    image) case "$*" in
        *image.version*) echo 1.2.3 ;;
        *image.revision*) echo abc123 ;;
        *) echo "${FAKE_WEIGHTS:-none}" ;;
        esac ;;
    save) printf 'image %s' "$2" ;;
esac
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what the scripts need, with a manifest of one small checkpoint that is in place."""
    root = tmp_path / "checkout"
    root.mkdir()
    for name in ("Dockerfile", ".dockerignore", "LICENSE", "process.py", "run.sh", "build.sh", "export.sh", "requirements.txt",
                 "requirements-test.txt", "dinoreg", "oncoreg", "locks", "tools"):
        source = ROOT / name
        shutil.copytree(source, root / name) if source.is_dir() else shutil.copy(source, root / name)
    (root / "weights").mkdir()
    shutil.copy(ROOT / "weights" / "fetch.py", root / "weights")
    checkpoint = root / "weights" / "tiny.pth"
    checkpoint.write_bytes(b"weights")
    checkpoint.chmod(0o600)
    (root / "weights" / "other.pth").write_bytes(b"not asked for")
    manifest = {"models": {"tiny": {"file": "tiny.pth", "sha256": hashlib.sha256(b"weights").hexdigest(), "bytes": 7}}}
    (root / "weights" / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return root


def run(script: Path, *arguments: str, fake: dict[str, str], **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a script with the given programs (name -> text) first on the path."""
    programs = script.parent / "fake-programs"
    programs.mkdir(exist_ok=True)
    for name, text in fake.items():
        (programs / name).write_text(text, encoding="utf-8")
        (programs / name).chmod(0o755)
    variables = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "FAKE_LOG": str(script.parent / "log"), **environment}
    variables.pop("DINOREG_WEIGHTS", None)
    command = ["bash", str(script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=variables, stdin=subprocess.DEVNULL)


def log(checkout: Path) -> str:
    path = checkout / "log"
    return path.read_text(encoding="utf-8") if path.exists() else ""


def make_venv(checkout: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    settings = {"DINOREG_VENV": str(checkout / "venv"), "FAKE_LOG": str(checkout / "log"), **environment}
    return run(checkout / "tools" / "venv.sh", *arguments, fake=PYTHONS, **settings)


def installations(checkout: Path) -> int:
    return sum(line.startswith("-m pip") for line in log(checkout).splitlines())


def test_environment_is_installed_once(checkout: Path) -> None:
    first = make_venv(checkout)
    assert first.returncode == 0, first.stderr
    assert first.stdout == f"{checkout}/venv/bin/python\n"
    assert installations(checkout) == 2  # the lock, then torch
    make_venv(checkout)
    assert installations(checkout) == 2
    make_venv(checkout, "--test")
    assert installations(checkout) == 3


def test_environment_follows_the_requirements(checkout: Path) -> None:
    make_venv(checkout)
    (checkout / "requirements.txt").write_text("numpy==1\n", encoding="utf-8")
    make_venv(checkout)
    assert installations(checkout) == 4


def test_interrupted_installation_is_done_again_from_the_start(checkout: Path) -> None:
    assert make_venv(checkout, FAKE_PIP="1").returncode != 0
    left = checkout / "venv" / "half-installed"
    left.touch()
    done = make_venv(checkout)
    assert done.returncode == 0, done.stderr
    assert not left.exists()
    assert "making the virtual environment" in done.stderr


def test_an_environment_that_it_did_not_make_is_never_emptied(checkout: Path) -> None:
    (checkout / "venv" / "bin").mkdir(parents=True)
    python = checkout / "venv" / "bin" / "python"
    python.write_text(FAKE_PYTHON, encoding="utf-8")
    python.chmod(0o755)
    for name in ("pyvenv.cfg", "thesis.txt"):
        (checkout / "venv" / name).touch()
    assert make_venv(checkout, FAKE_PIP="1").returncode != 0
    done = make_venv(checkout)
    assert done.returncode == 0, done.stderr
    assert (checkout / "venv" / "thesis.txt").exists()


def test_unsupported_python_is_said_clearly(checkout: Path) -> None:
    done = make_venv(checkout, FAKE_UNSUPPORTED="1")
    assert done.returncode != 0
    assert "no Python 3.10, 3.11 or 3.12 found (python3 is Python 3.11.0)" in done.stderr
    assert log(checkout) == ""


def test_folder_that_is_no_environment_is_left_alone(checkout: Path) -> None:
    (checkout / "venv").mkdir()
    (checkout / "venv" / "thesis.txt").touch()
    done = make_venv(checkout)
    assert done.returncode != 0
    assert "is no virtual environment" in done.stderr
    assert (checkout / "venv" / "thesis.txt").exists()


def start(checkout: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    for checkpoint in (checkout / "weights").glob("*.pth"):
        checkpoint.unlink()
    return run(checkout / "run.sh", *arguments, fake=PYTHONS, FAKE_OUTPUT=str(checkout / "output"),
               DINOREG_VENV=str(checkout / "venv"), **environment)


def test_run_without_arguments_takes_dinov2_where_it_can_be_fetched(checkout: Path) -> None:
    done = start(checkout)
    assert done.returncode == 0, done.stderr
    assert "--features dinov2+mind" in log(checkout)
    assert "dinoreg evaluate" in log(checkout)
    assert str(checkout / "output" / "report.json") in done.stdout
    assert "MIND" not in done.stdout


def test_run_without_arguments_and_weights_goes_on_with_mind_and_says_so(checkout: Path) -> None:
    done = start(checkout, FAKE_FETCH="1")
    assert done.returncode == 0, done.stderr
    assert "--features mind" in log(checkout)
    assert "NO DINOv2 WEIGHTS" in done.stdout
    assert done.stdout.rstrip().endswith("MIND features alone")


def test_run_passes_input_output_and_options_on(checkout: Path) -> None:
    done = start(checkout, "in put", str(checkout / "out"), "--preset", "generic")
    assert done.returncode == 0, done.stderr
    assert f"process.py --input in put --output {checkout}/out --preset generic" in log(checkout)
    assert "fetch" not in log(checkout)


@pytest.mark.parametrize("arguments", [["only-input"], ["--preset", "generic"]])
def test_run_with_half_of_its_arguments_is_refused_before_anything_is_set_up(checkout: Path, arguments: list[str]) -> None:
    done = start(checkout, *arguments)
    assert done.returncode == 2
    assert "usage" in done.stderr
    assert log(checkout) == ""


def build(checkout: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run(checkout / "build.sh", *arguments, fake={"docker": FAKE_DOCKER})


def test_build_bakes_in_the_verified_weights_alone_and_labels_them(checkout: Path) -> None:
    done = build(checkout, "--weights", "tiny")
    assert done.returncode == 0, done.stderr
    sha256 = hashlib.sha256(b"weights").hexdigest()
    assert f"dinoreg.weights.sha256={sha256}" in log(checkout)
    assert "image.revision=unknown" in log(checkout)  # no repository here
    files = (checkout / "log.context").read_text(encoding="utf-8").splitlines()
    assert [line for line in files if ".pth" in line] == ["weights/tiny.pth 644"]  # readable under any uid
    assert not [line for line in files if line.startswith(("test/", "tools/", "wheelhouse/"))]
    assert not list((checkout / "dist").iterdir())


@pytest.mark.parametrize("spoil, message", [
    (lambda path: path.unlink(), "weights/tiny.pth is missing; fetch it with: python3 weights/fetch.py tiny"),
    (lambda path: path.write_bytes(b"weightz"), "weights/tiny.pth has sha256"),
])
def test_build_with_wrong_weights_is_refused_before_it_starts(checkout: Path, spoil, message: str) -> None:
    spoil(checkout / "weights" / "tiny.pth")
    done = build(checkout, "--weights", "tiny")
    assert done.returncode != 0
    assert message in done.stderr
    assert log(checkout) == ""


@pytest.mark.parametrize("arguments, message", [
    (["--weights", "huge"], "unknown weights 'huge'"),
    (["--weights", "none", "--torch", "cuda99"], "expected cuda12 or cpu"),
    (["--weights", "none", "--torch", "cpu"], "needs --wheelhouse"),
    (["--weights", "none", "--wheelhouse", "."], "has no wheels"),
    (["--wieghts", "none"], "unknown option --wieghts"),
    (["--weights"], "--weights needs a value"),
])
def test_build_refuses_wrong_options(checkout: Path, arguments: list[str], message: str) -> None:
    done = build(checkout, *arguments)
    assert done.returncode != 0
    assert message in done.stderr
    assert log(checkout) == ""


def test_wheelhouse_goes_into_the_context(checkout: Path) -> None:
    wheels = checkout / "wheels"
    wheels.mkdir()
    (wheels / "pip-1-py3-none-any.whl").touch()
    done = build(checkout, "--weights", "none", "--wheelhouse", str(wheels), "--torch", "cpu")
    assert done.returncode == 0, done.stderr
    assert "TORCH=cpu" in log(checkout)
    assert "wheelhouse/pip-1-py3-none-any.whl" in (checkout / "log.context").read_text(encoding="utf-8")


def export(checkout: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return run(checkout / "export.sh", *arguments, fake={"docker": FAKE_DOCKER}, **environment)


def test_export_writes_image_model_and_checksums(checkout: Path) -> None:
    done = export(checkout, "--weights", "tiny")
    assert done.returncode == 0, done.stderr
    dist = checkout / "dist"
    image, model = "dinoreg_1.2.3_abc123.tar.gz", "dinoreg_model_tiny.tar.gz"
    assert {path.name for path in dist.iterdir()} == {image, f"{image}.sha256", model, f"{model}.sha256"}
    assert gzip.decompress((dist / image).read_bytes()).startswith(b"image dinoreg:")
    for name in (image, model):
        sha256 = hashlib.sha256((dist / name).read_bytes()).hexdigest()
        assert (dist / f"{name}.sha256").read_text(encoding="utf-8") == f"{sha256}  {name}\n"
        assert f"{(dist / name).stat().st_size} bytes" in done.stdout
    with tarfile.open(dist / model) as tar:
        (member,) = tar.getmembers()
        assert (member.name, member.mode) == ("tiny.pth", 0o644)


def test_export_of_an_image_with_weights_writes_no_model(checkout: Path) -> None:
    done = export(checkout, FAKE_WEIGHTS="tiny")
    assert done.returncode == 0, done.stderr
    assert not list((checkout / "dist").glob("*model*"))


def test_export_above_the_limit_is_refused_and_leaves_nothing(checkout: Path) -> None:
    done = export(checkout, "--weights", "none", "--limit-gb", "0")
    assert done.returncode != 0
    assert "above the limit of 0 GB" in done.stderr
    assert not list((checkout / "dist").iterdir())


def test_everything_is_pinned() -> None:
    base = next(line.removeprefix("ARG BASE=") for line in (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines()
                if line.startswith("ARG BASE="))
    assert unpinned(ROOT, base) == []


@pytest.mark.parametrize("file, old, new, problem", [
    ("requirements.txt", "numpy==", "numpy>=", "no version"),
    ("requirements.txt", "tqdm==4", "tqdm==5", "run tools/lock.py"),
    ("requirements-test.txt", "ruff==", "ruff>", "no version"),
    ("locks/packages.txt", "tqdm==", "tqdm>=", "no version"),
    ("locks/torch-cpu.txt", "--hash=sha256:", "--hash=md5:", "no sha256"),
])
def test_what_is_not_pinned_is_named(checkout: Path, file: str, old: str, new: str, problem: str) -> None:
    path = checkout / file
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")
    assert any(problem in line for line in unpinned(checkout, DIGEST))


def test_base_without_a_digest_is_named() -> None:
    assert any("no digest" in line for line in unpinned(ROOT, "ubuntu:22.04"))
