"""``dinoreg info``: what is here, and what differs from a report."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dinoreg import weights
from dinoreg.__main__ import main
from dinoreg.config import PRESETS
from dinoreg.report import environment, run_record


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A manifest in which the hash of ViT-S is that of the bytes b"right", as the manifest that is in use."""
    content: dict[str, Any] = json.loads(weights.MANIFEST.read_text())
    content["models"]["vits14_reg4"]["sha256"] = hashlib.sha256(b"right").hexdigest()
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    monkeypatch.setitem(weights.found_checkpoints.__kwdefaults__, "manifest", tmp_path / "manifest.json")
    return content


def write_report(path: Path, changes: dict[str, Any] | None = None, **info: Any) -> Path:
    """A report of a run of here and now, with changes to its environment."""
    pair = {"name": "pair", "info": {"features": "mind", "device": "cpu", "threads": 1, **info}}
    record = run_record({"preset": "generic", "config": PRESETS["generic"].to_dict()}, [pair], 1.0)
    record["environment"] |= changes or {}
    path.write_text(json.dumps(record))
    return path


def test_versions_devices_and_presets_are_listed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["info", "--weights", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert f"torch {torch.__version__}" in text and "device: cpu" in text and "1 threads" in text and "weights: none" in text
    assert all(f"preset {name}:" in text for name in PRESETS)


@pytest.mark.parametrize(("content", "state"), [(b"right", "sha256 as in the manifest"),
                                                (b"wrong", "sha256 is NOT that of the manifest")])
def test_weights_are_listed_with_what_the_manifest_says(content: bytes, state: str, tmp_path: Path, manifest: dict[str, Any],
                                                        capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / manifest["models"]["vits14_reg4"]["file"]
    path.write_bytes(content)
    assert main(["info", "--weights", str(tmp_path)]) == 0
    assert f"weights: {path}: vits14_reg4, {state}\n" in capsys.readouterr().out


def test_nothing_differs_from_a_run_of_here_and_now(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--repeat", str(write_report(tmp_path / "report.json"))]) == 0
    assert capsys.readouterr().out == "nothing differs: the run can be repeated\n"


def test_what_differs_is_named_with_both_values(tmp_path: Path, manifest: dict[str, Any],
                                                capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / manifest["models"]["vits14_reg4"]["file"]).write_bytes(b"right")
    packages = environment()["packages"] | {"numpy": "1.0"}
    path = write_report(tmp_path / "report.json", {"packages": packages, "python": "3.9.0"}, threads=7, device="cuda",
                        encoder_sha256="0" * 64)
    content = json.loads(path.read_text())
    content["config"]["refine"]["rate"] = 0.125
    path.write_text(json.dumps(content))
    assert main(["info", "--repeat", str(path), "--weights", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    lines = {line.split(":")[0]: line for line in captured.out.splitlines()}
    expected = {"numpy", "python", "threads", "weights", "config.refine.rate"}
    expected |= set() if torch.cuda.is_available() else {"device"}
    assert set(lines) == expected and f"{len(expected)} things" in captured.err
    assert lines["numpy"].startswith("numpy: 1.0 then, ") and lines["config.refine.rate"].endswith(": 0.125 then, 0.25 now")
    assert lines["weights"] == f"weights: {'0' * 64} then, {hashlib.sha256(b'right').hexdigest()} now"


def test_the_same_weights_are_no_difference(tmp_path: Path, manifest: dict[str, Any]) -> None:
    (tmp_path / manifest["models"]["vits14_reg4"]["file"]).write_bytes(b"right")
    path = write_report(tmp_path / "report.json", encoder_sha256=hashlib.sha256(b"right").hexdigest())
    assert main(["info", "--repeat", str(path), "--weights", str(tmp_path)]) == 0


@pytest.mark.parametrize(("text", "status"), [
    ("{}", 3), ("[]", 3), ("no", 3), ('{"config": {"colour": 1}}', 2),
    ('{"config": {"preset": ' + 700 * "[" + 700 * "]" + "}}", 3)])
def test_what_is_no_report_is_refused(tmp_path: Path, text: str, status: int, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "report.json").write_text(text)
    assert main(["info", "--repeat", str(tmp_path / "report.json")]) == status
    assert capsys.readouterr().err.startswith("error: ")
