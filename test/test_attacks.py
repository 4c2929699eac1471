"""Inputs made to do harm: paths that lead out of the input, names that lead out of the output; code in files; the network."""

from __future__ import annotations

import ast
import json
import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_process import AFFINE, ENGINE, SHAPE, StubRegistrar, _dataset, _moved_pairs, _single, _volume

import process
from dinoreg import qc
from dinoreg.__main__ import main
from dinoreg.io import write_text, write_volume
from dinoreg.volume import Volume

ROOT = Path(__file__).resolve().parent.parent
_opened: list[str] | None = None


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if event in ("open", "os.listdir", "os.scandir") and _opened is not None:
        _opened.append(os.fsdecode(arguments[0]) if isinstance(arguments[0], str | bytes | os.PathLike) else "")


sys.addaudithook(_note)  # cannot be taken off again


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Every path that Python opens in the test."""
    global _opened
    for name in [name for name in os.environ if name.startswith("DINOREG_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(qc, "write_qc", lambda path, *_, **__: write_text(path, "picture"))
    _opened = []
    yield _opened
    _opened = None


# ---- paths: what a data set or a platform's inputs.json says is not to be believed


def _image_link(source: Path, outside: Path) -> None:
    path = source / "imagesTr/Task_0001_0000.nii.gz"
    path.unlink()
    path.symlink_to(outside / path.name)


def _folder_link(source: Path, outside: Path) -> None:
    (source / "imagesTr").rename(source / "away")
    (source / "imagesTr").symlink_to(outside)


def _mask_link(source: Path, outside: Path) -> None:
    (source / "masksTr").mkdir()
    (source / "masksTr/Task_0001_0000.nii.gz").symlink_to(outside / "Task_0001_0000.nii.gz")


def _mask_folder_link(source: Path, outside: Path) -> None:
    (source / "masksTr").symlink_to(outside)


def _json(moving: str) -> Callable[[Path, Path], None]:
    def change(source: Path, outside: Path) -> None:
        entry = {"fixed": "imagesTr/Task_0001_0001.nii.gz", "moving": moving.replace("OUTSIDE", str(outside))}
        (source / "Task_dataset.json").write_text(json.dumps({"name": "Task", "registration_val": [entry]}))

    return change


@pytest.mark.parametrize("attack", [
    _image_link, _folder_link, _mask_link, _mask_folder_link,
    _json("../outside/Task_0001_0000.nii.gz"), _json("imagesTr/../../outside/Task_0001_0000.nii.gz"),
    _json("OUTSIDE/Task_0001_0000.nii.gz"), _json("imagesTr/\0_0001_0000.nii.gz"), _json("~/Task_0001_0000.nii.gz"),
    _json("file://OUTSIDE/Task_0001_0000.nii.gz"),
], ids=["link", "linked folder", "linked mask", "linked masks", "..", "hidden ..", "absolute", "NUL", "home", "URL"])
def test_nothing_outside_of_a_data_set_is_read_or_written(tmp_path: Path, opened: list[str],
                                                          attack: Callable[[Path, Path], None]) -> None:
    source, outside = _dataset(tmp_path / "in"), tmp_path / "outside"
    for modality in (0, 1):
        write_volume(outside / f"Task_0001_000{modality}.nii.gz", Volume(np.ones(SHAPE, np.uint8), AFFINE))
    attack(source, outside)
    before = {path for path in tmp_path.rglob("*") if not path.is_relative_to(tmp_path / "out")}
    opened.clear()
    registrar = StubRegistrar()
    arguments = ["--input", str(source), "--output", str(tmp_path / "out")]
    assert process.main(arguments, registrar_factory=registrar) == 3
    assert registrar.calls == []
    assert [path for path in opened if os.path.realpath(path.replace("\0", "")).startswith(str(outside))] == []
    assert {path for path in tmp_path.rglob("*") if not path.is_relative_to(tmp_path / "out")} == before


def test_masks_beside_the_input_folder_are_none_of_its_own(tmp_path: Path) -> None:
    source = tmp_path / "images"
    for modality in (0, 1):
        write_volume(source / f"Task_0001_000{modality}.nii.gz", _volume(modality))
        write_volume(tmp_path / f"masks/Task_0001_000{modality}.nii.gz", Volume(np.ones(SHAPE, np.uint8), AFFINE))
    entry = {"fixed": "Task_0001_0001.nii.gz", "moving": "Task_0001_0000.nii.gz"}
    (source / "Task_dataset.json").write_text(json.dumps({"name": "Task", "registration_val": [entry]}))
    registrar = StubRegistrar()
    assert process.main(["--input", str(source), "--output", str(tmp_path / "out")], registrar_factory=registrar) == 0
    assert registrar.calls[0]["fixed_mask"] is None and registrar.calls[0]["moving_mask"] is None


@pytest.mark.parametrize("place", ["../outside", "images/../../outside", "OUTSIDE", "images/linked", "../outside/x.mha"])
def test_nothing_outside_of_a_single_pair_is_read(tmp_path: Path, opened: list[str], place: str) -> None:
    source, outside = _single(tmp_path / "in"), tmp_path / "outside"
    write_volume(outside / "x.mha", _volume(3))
    (source / "images/linked").symlink_to(outside)
    sockets = [{"interface": {"slug": "fixed", "relative_path": "images/fixed"}},
               {"interface": {"slug": "moving", "relative_path": place.replace("OUTSIDE", str(outside))}}]
    (source / "inputs.json").write_text(json.dumps(sockets))
    opened.clear()
    registrar = StubRegistrar()
    assert process.main(["--input", str(source), "--output", str(tmp_path / "out")], registrar_factory=registrar) == 3
    assert registrar.calls == []
    assert [path for path in opened if path.endswith("x.mha")] == []


@pytest.mark.parametrize("header", ["ElementDataFile = ../secret.raw", "ElementDataFile = OUTSIDE/secret.raw",
                                    "data file: ../secret.raw"])
def test_an_image_takes_its_voxels_from_no_other_folder(tmp_path: Path, opened: list[str], header: str) -> None:
    source = _single(tmp_path / "in")
    (tmp_path / "in/images/secret.raw").write_bytes(bytes(1000))
    (source / "images/moving/m.mha").unlink()
    header = header.replace("OUTSIDE", str(tmp_path / "in/images"))
    if header.startswith("data"):
        text = ("NRRD0004\ntype: uchar\ndimension: 3\nspace: left-posterior-superior\nsizes: 10 10 10\nspace directions: (1,0,0) "
                f"(0,1,0) (0,0,1)\nencoding: raw\nspace origin: (0,0,0)\n{header}\n")
        (source / "images/moving/m.nrrd").write_text(text)
    else:
        text = f"ObjectType = Image\nNDims = 3\nDimSize = 10 10 10\nElementType = MET_UCHAR\nElementSpacing = 1 1 1\n{header}\n"
        (source / "images/moving/m.mhd").write_text(text)
    opened.clear()
    assert process.main(["--input", str(source), "--output", str(tmp_path / "out")], registrar_factory=StubRegistrar()) == 3
    assert [path for path in opened if path.endswith("secret.raw")] == []


@pytest.mark.parametrize("name", ["../x", "..", "/tmp/x", "a/b", "a\\b", ".x", "-x", "~", "x/../../y"])
def test_a_name_in_a_list_of_pairs_cannot_leave_the_output(tmp_path: Path, name: str) -> None:
    write_volume(tmp_path / "a.nii.gz", _volume(1))
    (tmp_path / "pairs.csv").write_text(f"fixed,moving,name\na.nii.gz,a.nii.gz,{name}\n")
    before = set(tmp_path.rglob("*"))
    assert main(["register", "--pairs", str(tmp_path / "pairs.csv"), "-o", str(tmp_path / "deep/out"), "--features", "mind"]) == 3
    assert set(tmp_path.rglob("*")) == before


# ---- code


class _Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("name", ["dinov2_vits14_reg4_pretrain.pth", "model.safetensors",
                                  "dinov2-with-registers-small.safetensors"])
def test_code_in_a_checkpoint_ends_the_run_and_never_runs(tmp_path: Path, opened: list[str], name: str) -> None:
    (tmp_path / "weights").mkdir()
    for payload in (pickle.dumps({"cls_token": _Payload(tmp_path / "harm")}), None):
        if payload is None:
            torch.save({"cls_token": _Payload(tmp_path / "harm")}, tmp_path / "weights" / name)
        else:
            (tmp_path / "weights" / name).write_bytes(payload)
        arguments = ["--input", str(_dataset(tmp_path / "in")), "--output", str(tmp_path / "out"), "--features", "dinov2"]
        assert process.main([*arguments, "--weights", str(tmp_path / "weights")]) == 4
    assert not (tmp_path / "harm").exists()
    pickle.loads(pickle.dumps(_Payload(tmp_path / "harm")))
    assert (tmp_path / "harm").exists()  # it would have


FORBIDDEN = {"eval", "exec", "compile", "__import__", "system", "popen"}
MODULES = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}


@pytest.mark.parametrize("path", [*sorted((ROOT / "dinoreg").rglob("*.py")), ROOT / "process.py", ROOT / "weights/fetch.py"],
                         ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_line_runs_what_a_file_holds(path: Path) -> None:
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + ([node.module or ""] if isinstance(node, ast.ImportFrom) else [])
            found += [name for name in names if name.split(".")[0] in MODULES]
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        found += [called] if called in FORBIDDEN or called in ("os.system", "os.popen") else []
        found += [called] if called == "torch.load" and options.get("weights_only") != "True" else []
        found += [called] if called in ("np.load", "numpy.load") and options.get("allow_pickle") != "False" else []
        found += [called] if options.get("shell") == "True" else []
        found += [called] if called.startswith("yaml.") and "safe" not in called else []
    assert found == []


# ---- the network


def test_tests_reach_nothing_but_this_machine() -> None:
    with pytest.raises(OSError, match="without a network"):
        socket.create_connection(("198.51.100.7", 80), timeout=1)
    with pytest.raises(OSError, match="without a network"):
        socket.getaddrinfo("example.org", 443)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams, pytest.raises(OSError, match="without a network"):
        datagrams.sendto(b"x", ("198.51.100.7", 53))
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname(), timeout=5).close()


def test_a_run_opens_no_socket_and_starts_no_program_but_uname(tmp_path: Path) -> None:
    """From the import to the last file, with everything that is loaded on the way."""
    source = _moved_pairs(tmp_path / "in", AFFINE)
    code = """
import sys
def refuse(event, arguments):
    programs = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork")
    if event.startswith("socket.") or event in programs and arguments[0] != "uname":  # which Python's module platform calls
        sys.stderr.write(f"{event} {arguments}\\n")
        raise RuntimeError(event)
sys.addaudithook(refuse)
import process
sys.exit(process.main(sys.argv[1:]))
"""
    command = [sys.executable, "-c", code, "--input", str(source), "--output", str(tmp_path / "out"), *ENGINE]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads((tmp_path / "out/report.json").read_text())["status"] == "complete"
