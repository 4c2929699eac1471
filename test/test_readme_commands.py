"""Every command and every piece of Python in the README runs as it stands there, on a small pair.

What downloads, builds or tests the whole is not run again here: .ci/run does it.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from small_pair import QUICK, SHIFT_MM, small_pair
from test_readme import README, ROOT
from test_truth import POINTS, halves

import process
from dinoreg.__main__ import main
from dinoreg.config import PRESETS
from dinoreg.io import write_volume
from dinoreg.result import FILES, Registration

sys.path.insert(0, str(ROOT / "benchmarks"))
import accuracy

COMMAND = re.compile(r"(?:\./\w+\.sh|(?:\.venv/bin/)?python3? \S+)\b.*")
FILES_OF_NAMES = {"FIXED": "fixed.nii.gz", "MOVING": "moving.mha", "LABELS": "moving_labels.nii.gz", "DIR": "result",
                  "TRANSFORM": "result/transform.h5", "DATA_DIR": "data", "INPUT": "data", "OUTPUT": "output"}
# What the whole of .ci/run does, and where.
DONE_BY_CI = {"./run.sh": ".ci/run", "./test.sh": ".ci/run", "./test.sh --container": ".ci/run", "./export.sh": ".ci/run",
              "./build.sh": "test.sh", "python3 weights/fetch.py": "run.sh"}


def commands() -> list[str]:
    """All of them in the order of the README, in blocks and in the text, without comments."""
    found = []
    for _, block, code in re.findall(r"^```(\w*)\n(.*?)^```$|`([^`\n]+)`", README, re.DOTALL | re.MULTILINE):
        lines = (line.split(" #")[0].strip() for line in (block or code).splitlines())
        found += [line for line in lines if COMMAND.fullmatch(line)]
    return list(dict.fromkeys(found))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The present folder, with all that the README's commands name; presets that take a tenth of a second."""
    for name, preset in PRESETS.items():
        monkeypatch.setitem(PRESETS, name, dataclasses.replace(QUICK, preset=preset.preset))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "test").symlink_to(ROOT / "test")
    fixed, moving = small_pair()
    write_volume(tmp_path / "fixed.nii.gz", fixed)
    write_volume(tmp_path / "moving.mha", moving)
    write_volume(tmp_path / "moving_labels.nii.gz", halves(moving, SHIFT_MM[0]))
    np.savetxt("POINTS.csv", POINTS, delimiter=",")
    np.savetxt("TRUTH.csv", POINTS + SHIFT_MM, delimiter=",")
    (text,) = re.findall(r"```json\n(.*?)```", README, re.DOTALL)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/MyTask_dataset.json").write_text(text)
    nearby = np.roll(fixed.array, 1, axis=0)
    for name, array in (("1", fixed.array), ("0", nearby)):
        write_volume(tmp_path / f"data/imagesTr/MyTask_0001_000{name}.nii.gz", dataclasses.replace(fixed, array=array))
        write_volume(tmp_path / f"data/labelsTr/MyTask_0001_000{name}.nii.gz", halves(fixed, 0.0))
    write_volume(tmp_path / "pair/images/fixed/a.mha", fixed)
    write_volume(tmp_path / "pair/images/moving/b.mha", moving)
    threads = torch.get_num_threads()
    yield tmp_path
    torch.set_num_threads(threads)


def run(command: str) -> int:
    """Run one of them with the program that it names; the exit status."""
    _, *words = shlex.split(command)
    words = [FILES_OF_NAMES.get(word, word) for word in words]
    if command.startswith("./run.sh"):
        (input_, output), options = words[:2], words[2:]
        return process.main(["--input", input_, "--output", output, *options])
    if words[0] == "process.py":
        return process.main(words[1:])
    if words[:2] == ["-m", "dinoreg"]:
        return main(words[2:])
    assert words[0] == "benchmarks/accuracy.py", command
    return accuracy.main(["no-such-folder", *words[2:]])  # its options are read; without the data it ends


@pytest.mark.slow  # 15 s of a core: the bundled example, and four pictures
def test_every_command_runs(folder: Path) -> None:
    (folder / "output").mkdir()
    ran = []
    for command in commands():
        by_ci = [known for known in DONE_BY_CI if command == known or (known.endswith("fetch.py") and command.startswith(known))]
        if by_ci:
            name = by_ci[0].removeprefix("python3 ")
            assert name in (ROOT / DONE_BY_CI[by_ci[0]]).read_text(encoding="utf-8"), command
        else:
            assert run(command) == 0, command
            ran.append(command)
    assert len(ran) > 10 and {path.name for path in (folder / "result").iterdir()} > set(FILES)
    for name in ("scores.json", "OUT.nii.gz", "OUT.csv", "output/report.json"):
        assert (folder / name).is_file(), name


def test_every_command_of_the_program_is_in_the_readme() -> None:
    from dinoreg.__main__ import COMMANDS

    for command in COMMANDS:
        name = command.__name__.rsplit(".", 1)[-1]
        assert f"dinoreg {name} " in README or f"`{name}`" in README, name


def test_every_piece_of_python_runs(folder: Path) -> None:
    import scipy.ndimage

    fixed, moving = (np.asarray(nib.load(f"data/imagesTr/MyTask_0001_000{name}.nii.gz").dataobj) for name in "10")
    assert process.main(["--input", "data", "--output", "output"]) == 0
    (field,) = (folder / "output").glob("disp_*.nii.gz")
    names = {"numpy": np, "scipy": scipy, "fixed": fixed, "moving": moving, "disp": np.asarray(nib.load(field).dataobj)}
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    warped = np.asarray(nib.load(folder / f"output/warped/warped_{field.name.removeprefix('disp_')}").dataobj)
    inner = (slice(2, -2),) * 3
    assert np.abs(names["warped"][inner].astype(int) - warped[inner]).max() <= 1  # rounded, or not
    assert isinstance(names["result"], Registration) and names["points"].shape == (1, 3)
    assert {path.name for path in (folder / "output").iterdir()} > set(FILES)


def test_a_command_that_is_wrong_would_be_seen() -> None:
    with pytest.raises(SystemExit):
        run(".venv/bin/python -m dinoreg warp LABELS --transfrom TRANSFORM")
    assert run("./run.sh data output --preset nonsense") == 2
    assert len(commands()) == len(set(commands())) > 15
