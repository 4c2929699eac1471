"""The README says what the program does: options, presets, exit statuses and files are those of the code."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import process
from dinoreg import errors
from dinoreg.config import PRESETS
from dinoreg.learn2reg import load_dataset
from dinoreg.weights import MANIFEST, QUICK, RECOMMENDED

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def first_column(header: str) -> list[str]:
    """The first cells of the table that begins with this header."""
    (table,) = re.findall(rf"^\| {header} \|.*\n\|[-|]+\|\n((?:\|.*\n)+)", README, re.MULTILINE)
    return [row.split("|")[1].strip().strip("`") for row in table.splitlines()]


def test_options_are_those_of_the_program(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        process.parse_options(["--help"])
    known = set(re.findall(r"--[a-z-]+", capsys.readouterr().out.split("options:")[1]))
    assert set(first_column("option")) == known - {"--help", "--input", "--output"}


def test_presets_are_those_of_the_package() -> None:
    assert sorted(first_column("preset")) == sorted(PRESETS)


def test_exit_statuses_are_those_of_the_errors() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.DinoRegError)]
    assert [int(status) for status in first_column("status")] == sorted({0, *(kind.exit_code for kind in kinds)})


def test_links_lead_to_files_and_the_picture_is_small() -> None:
    for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / link).is_file(), link
    assert (ROOT / "docs" / "example.png").stat().st_size < 500_000


def test_data_set_of_the_readme_can_be_loaded(tmp_path: Path) -> None:
    (text,) = re.findall(r"```json\n(.*?)```", README, re.DOTALL)
    (tmp_path / "MyTask_dataset.json").write_text(text)
    (pair,) = load_dataset(tmp_path).pairs()
    assert pair.name == "0001_0001_0001_0000" and pair.modalities == ("CBCT", "CT")
    assert sorted(json.loads(text)["registration_val"][0]) == ["fixed", "moving"]


def test_weights_of_the_readme_are_in_the_manifest() -> None:
    fetched = re.findall(r"weights/fetch\.py (\w+)", README)
    assert fetched == [RECOMMENDED, QUICK] and set(fetched) <= set(json.loads(MANIFEST.read_text())["models"])
