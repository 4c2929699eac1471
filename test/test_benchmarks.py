"""benchmarks/accuracy.py: what a registration gets to see, how it is scored, compared and named, and what is not done twice."""

from __future__ import annotations

import argparse
import functools
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from dinoreg.evaluate import CaseResult, Scores, find_field, read_disp
from dinoreg.learn2reg import load_dataset
from dinoreg.vit import ARCHITECTURES

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import accuracy  # noqa: E402
import register_pair  # noqa: E402
import results  # noqa: E402

SHAPE = (24, 20, 16)
SHIFT = np.array([2, -1, 3])  # three different shifts: no two axes or signs can be exchanged unseen
NAMES = ["0001_0001_0001_0000", "0002_0001_0002_0000"]

# Stands in for register_pair.py: notes how it was called, fails for the subjects that are named, writes one field for all others.
CHILD = """
import json, os, sys
from pathlib import Path
import numpy as np
folder, output = Path(sys.argv[2]), Path(sys.argv[3])
files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
settings = {{key: value for key, value in os.environ.items() if key.startswith("DINOREG_") or key == "OMP_NUM_THREADS"}}
with open({calls!r}, "a") as calls:
    calls.write(json.dumps([files, sys.argv[4:], settings]) + "\\n")
subject = files[1].split("_")[1]
if subject in {fail!r}:
    print("some log line\\nthe last words")
    sys.exit({status})
disp = np.broadcast_to(np.array({shift!r}, dtype=np.float32), (*{shape!r}, 3)).copy()
if {fold}:
    disp[12, 10, 12] = (9, 9, 9)
np.savez(output / f"disp_{{subject}}_0001_{{subject}}_0000.npz", disp)
(output / "usage.json").write_text(json.dumps({{"startup_cpu_seconds": 0.5, "peak_mib": 256.0}}))
"""


def save(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.diag([2.0, 2.0, 2.0, 1.0])), path)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with one set, Toy: two pairs whose fixed image is the moving one shifted, with everything a set can have."""
    root = tmp_path / "data" / "Toy"
    entries = []
    for subject in ("0001", "0002"):
        rng = np.random.default_rng(int(subject))
        moving = 100 * ndimage.gaussian_filter(rng.standard_normal(SHAPE), 1.5).astype(np.float32)
        labels = np.zeros(SHAPE, dtype=np.uint8)
        labels[8:16, 6:14, 5:9], labels[8:16, 6:14, 9:12] = 1, 2
        points = rng.uniform(5, 9, (6, 3))
        for kind, shift in (("0000", 0 * SHIFT), ("0001", SHIFT)):
            save(root / "imagesTr" / f"Toy_{subject}_{kind}.nii.gz", np.roll(moving, -shift, (0, 1, 2)))
            save(root / "labelsTr" / f"Toy_{subject}_{kind}.nii.gz", np.roll(labels, -shift, (0, 1, 2)))
            (root / "keypointsTr").mkdir(exist_ok=True)
            np.savetxt(root / "keypointsTr" / f"Toy_{subject}_{kind}.csv", points + SHIFT - shift, delimiter=",")
        save(root / "masksTr" / f"Toy_{subject}_0001.nii.gz", np.ones(SHAPE, dtype=np.uint8))
        entries.append({"fixed": f"./imagesTr/Toy_{subject}_0001.nii.gz", "moving": f"./imagesTr/Toy_{subject}_0000.nii.gz"})
    content = {"name": "Toy", "modality": {"0": "CT", "1": "CBCT"}, "registration_val": entries, "registration_test": []}
    (root / "Toy_dataset.json").write_text(json.dumps(content))
    return root.parent


@pytest.fixture
def child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Callable[[], list[Any]]]:
    """Puts a stand-in for register_pair.py in place; what it returns lists the calls so far."""
    def install(shift: Any = SHIFT, fail: tuple[str, ...] = (), status: int = 6, fold: bool = False) -> Callable[[], list[Any]]:
        calls = tmp_path / "calls"
        script = tmp_path / "child.py"
        script.write_text(CHILD.format(calls=str(calls), fail=fail, status=status, shift=[int(s) for s in shift], shape=SHAPE,
                                       fold=fold))
        monkeypatch.setattr(accuracy, "CHILD", script)
        return lambda: [json.loads(line) for line in calls.read_text().splitlines()] if calls.exists() else []

    return install


def cells(text: str, method: str) -> list[str]:
    """The cells of a method's row in a markdown table."""
    line, = (line for line in text.splitlines() if f"| {method} |" in line)
    return [cell.strip() for cell in line.strip("|").split("|")]


def case(name: str, before: dict[int, float], after: dict[int, float], *tre: float) -> CaseResult:
    """A scored pair: Dice by label before and after, and, if the set has points, their error before and after."""
    def scores(dice: dict[int, float], **more: float) -> Scores:
        plain = {"dice": float(np.mean(list(dice.values()))), "folds_percent": 0.0, **more}
        return Scores(plain, {}, {"dice": dice})

    more = [{"tre_keypoints_mm": value} for value in tre] or [{}, {}]
    return CaseResult(name, f"disp_{name}.nii.gz", scores(before, **more[0]), scores(after, **more[1]))


def result(*cases: CaseResult, name: str = "DINO-Reg (MIND)") -> results.Result:
    return results.Result(name, {case.name: case for case in cases})


def test_a_registration_sees_the_images_and_masks_of_its_pair_and_nothing_else(data: Path, child: Any) -> None:
    calls = child()
    assert accuracy.main([str(data)]) == 0
    assert [files for files, _, _ in calls()] == [
        ["Toy_dataset.json", f"imagesTr/Toy_{s}_0000.nii.gz", f"imagesTr/Toy_{s}_0001.nii.gz", f"masksTr/Toy_{s}_0001.nii.gz"]
        for s in ("0001", "0002")]


def test_settings_of_the_shell_do_not_reach_a_registration(data: Path, child: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = child()
    monkeypatch.setenv("DINOREG_PRESET", "published")
    monkeypatch.setenv("DINOREG_WEIGHTS", "/some/folder")
    accuracy.main([str(data), "--pairs", "1", "--threads", "2"])
    (_, options, environment), = calls()
    assert environment == {"DINOREG_WEIGHTS": "/some/folder", "OMP_NUM_THREADS": "2"}
    assert options == ["--threads", "2", "--features", "mind"]


def test_the_true_field_gets_full_marks_in_table_and_json(data: Path, child: Any, tmp_path: Path,
                                                          capsys: pytest.CaptureFixture[str]) -> None:
    child()
    assert accuracy.main([str(data), "--markdown", "--json", str(tmp_path / "out.json")]) == 0
    text = capsys.readouterr().out
    row = cells(text, "DINO-Reg (MIND)")
    before = cells(text, "no registration")
    length = f"{2.0 * np.linalg.norm(SHIFT):.2f}"  # mm: 2 mm a voxel
    assert row[:4] == ["Toy", "DINO-Reg (MIND)", "2", "1.000"] and row[4] == "0.00" and row[7] == "0"
    assert before[4] == length and row[12] == f"-{length}"
    assert float(row[10]) == pytest.approx(1 - float(before[3]), abs=2e-3)  # the pairs have the same labels
    content = json.loads((tmp_path / "out.json").read_text())
    method = content["sets"]["Toy"]["methods"]["DINO-Reg (MIND)"]
    assert method["cost"][NAMES[0]]["cpu_seconds"] > 0 and method["cost"][NAMES[0]]["peak_mib"] == 256.0
    assert method["scores"]["cases"][NAMES[1]]["after"]["plain"]["dice"] == 1.0
    assert set(method["label_dice_change_min"]) == {"1", "2"}


def test_a_pair_that_fails_is_said_and_stops_no_other(data: Path, child: Any, capsys: pytest.CaptureFixture[str]) -> None:
    child(fail=("0001",))
    assert accuracy.main([str(data), "--markdown"]) == 1
    captured = capsys.readouterr()
    assert cells(captured.out, "DINO-Reg (MIND)")[2:4] == ["1", "1.000"]
    assert f"Toy {NAMES[0]}: DINO-Reg (MIND) ended with status 6: the last words" in captured.err


def test_missing_weights_end_the_run_at_once(data: Path, child: Any, capsys: pytest.CaptureFixture[str]) -> None:
    calls = child(fail=("0001", "0002"), status=4)
    assert accuracy.main([str(data), "--features", "dinov2"]) == 2
    assert len(calls()) == 1 and "the last words" in capsys.readouterr().err


def test_what_a_kept_folder_holds_is_not_made_again_until_code_images_or_options_change(data: Path, child: Any,
                                                                                        tmp_path: Path) -> None:
    calls = child()
    arguments = [str(data), "--work", str(tmp_path / "work")]
    assert accuracy.main([*arguments, "--pairs", "1"]) == 0 and len(calls()) == 1
    assert accuracy.main(arguments) == 0 and len(calls()) == 2  # the second pair alone
    assert accuracy.main(arguments) == 0 and len(calls()) == 2
    assert accuracy.main([*arguments, "--threads", "2"]) == 0 and len(calls()) == 4
    assert accuracy.main([*arguments, "--threads", "2"]) == 0 and len(calls()) == 4
    path = data / "Toy" / "imagesTr" / "Toy_0002_0000.nii.gz"
    save(path, np.asarray(nib.load(path).dataobj) + 1)
    assert accuracy.main([*arguments, "--threads", "2"]) == 0 and len(calls()) == 5
    accuracy.CHILD.write_text(accuracy.CHILD.read_text() + "\n# changed\n")
    assert accuracy.main([*arguments, "--threads", "2"]) == 0 and len(calls()) == 7


def test_the_official_sdlogj_of_the_table_is_that_of_the_whole_field(data: Path, child: Any,
                                                                     capsys: pytest.CaptureFixture[str]) -> None:
    outside = np.zeros(SHAPE, dtype=np.uint8)
    outside[2:6, 2:6, 2:6] = 1
    for subject in ("0001", "0002"):
        save(data / "Toy" / "masksTr" / f"Toy_{subject}_0001.nii.gz", outside)
    child(fold=True)  # far from the mask, in which nothing changes volume
    accuracy.main([str(data), "--markdown"])
    row = cells(capsys.readouterr().out, "DINO-Reg (MIND)")
    assert float(row[5]) > 0.01 and row[6] == "0.00"


def test_a_field_without_its_record_is_made_again(data: Path, child: Any, tmp_path: Path) -> None:
    calls = child()
    arguments = [str(data), "--work", str(tmp_path / "work"), "--pairs", "1"]
    accuracy.main(arguments)
    next((tmp_path / "work").rglob("usage.json")).unlink()  # as if the run had ended before the record
    accuracy.main(arguments)
    next((tmp_path / "work").rglob("disp_*")).unlink()
    accuracy.main(arguments)
    assert len(calls()) == 3


def test_check_fails_on_a_fold_although_nothing_else_is_wrong(data: Path, child: Any, monkeypatch: pytest.MonkeyPatch,
                                                              capsys: pytest.CaptureFixture[str]) -> None:
    record = {"measured": "once", "sets": {}, "convexadam_pairs": {"Toy": {name: {"tre_mm": 5.0} for name in NAMES}}}
    original = accuracy.read_json
    monkeypatch.setattr(accuracy, "read_json", lambda path: record if path.name == "recorded.json" else original(path))
    child()
    assert accuracy.main([str(data), "--check"]) == 0
    assert "check passed: no folds, 2 pairs compared" in capsys.readouterr().out
    child(fold=True)  # the keypoints are elsewhere: their error stays 0
    assert accuracy.main([str(data), "--check"]) == 1
    assert f"check failed: Toy: the field folds on 2 of 2 pairs: {', '.join(NAMES)}" in capsys.readouterr().out
    child(shift=-SHIFT)
    assert accuracy.main([str(data), "--check"]) == 1
    assert "tre_mm 14.97 is worse than ConvexAdam's 5.0 on the same pairs (2)" in capsys.readouterr().out


def test_check_fails_where_there_is_nothing_to_compare_with(data: Path, child: Any, capsys: pytest.CaptureFixture[str]) -> None:
    child()
    assert accuracy.main([str(data), "--check"]) == 1
    assert "no pair has a recorded value of ConvexAdam" in capsys.readouterr().out


def test_missing_data_is_skipped_with_a_reason_and_an_unknown_set_is_refused(data: Path, tmp_path: Path,
                                                                             capsys: pytest.CaptureFixture[str]) -> None:
    assert accuracy.main([str(tmp_path / "nowhere"), "--check"]) == 0
    assert f"skipped: there is no folder {tmp_path / 'nowhere'}" in capsys.readouterr().out
    (tmp_path / "empty").mkdir()
    assert accuracy.main([str(tmp_path / "empty")]) == 3
    assert accuracy.main([str(data), "--sets", "Toy,Other"]) == 2
    assert "no set Other" in capsys.readouterr().err


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("features", ["dinov2", "dinov2+mind"])
def test_random_weights_are_never_called_dinov2(arch: str, features: str) -> None:
    method = accuracy.dinoreg_method(features, f"{arch}:7", 1)
    assert f"random ViT-{arch[3].upper()}, seed 7" in method.name and "dinov2" not in method.name.lower()
    assert ("MIND" in method.name) == ("mind" in features)
    assert "DINOv2" in accuracy.dinoreg_method(features, None, 1).name


def test_no_output_of_a_run_with_random_weights_says_dinov2(data: Path, child: Any, tmp_path: Path,
                                                            capsys: pytest.CaptureFixture[str]) -> None:
    child()
    path = tmp_path / "out.json"
    assert accuracy.main([str(data), "--features", "dinov2+mind", "--random-encoder", "vits14:0", "--json", str(path)]) == 0
    captured = capsys.readouterr()
    text = captured.out + captured.err + path.read_text()
    assert "random ViT-S, seed 0 + MIND" in text and "dinov2" not in text.lower()


@pytest.mark.parametrize(("features", "encoder"), [("mind", "vits14:0"), ("dinov2", "vits14"), ("dinov2", "vitx14:0"),
                                                   ("dinov2", "vits14:-1"), ("dinov2", "vits14:0:1")])
def test_an_encoder_that_is_unknown_or_unused_is_refused(features: str, encoder: str, data: Path,
                                                         capsys: pytest.CaptureFixture[str]) -> None:
    assert accuracy.main([str(data), "--features", features, "--random-encoder", encoder]) == 2
    assert "--random-encoder" in capsys.readouterr().err


def test_the_seeded_encoder_reaches_the_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import process

    seen: list[Any] = []
    monkeypatch.setattr(process, "main", lambda arguments, factory: seen.extend([arguments, factory]) or 0)
    options = argparse.Namespace(input=tmp_path, output=tmp_path, features="dinov2+mind", encoder="vits14_reg4:3", threads=1,
                                 by_itself=False)
    assert register_pair.register_dinoreg(options)[0] == 0
    arguments, factory = seen
    assert isinstance(factory, functools.partial)
    assert (factory.keywords["encoder"].arch, factory.keywords["encoder"].source) == ("vits14_reg4", "random weights, seed 3")
    assert arguments[arguments.index("--features") + 1] == "dinov2+mind"


def test_the_least_change_is_found_by_pair_and_by_label() -> None:
    ours = result(case("a", {1: 0.5, 2: 0.5}, {1: 0.9, 2: 0.6}, 8.0, 2.0),
                  case("b", {1: 0.5, 2: 0.7, 3: 0.4}, {1: 0.8, 2: 0.6, 3: 0.7}, 3.0, 4.0))
    assert results.worst_by_label(ours) == pytest.approx({1: 0.3, 2: -0.1, 3: 0.3})
    assert results.worst_pair(ours, "dice") == pytest.approx(1 / 6)  # pair b: from 1.6 / 3 to 2.1 / 3; pair a gains 0.25
    assert results.worst_pair(ours, "tre_mm") == 1.0  # pair b got worse by 1 mm: lower is better
    assert results.worst_pair(result(case("a", {1: 0.5}, {1: 0.6})), "tre_mm") is None


def test_check_compares_tre_where_there_are_landmarks_and_dice_elsewhere_on_the_pairs_that_both_have() -> None:
    with_points = result(case("a", {1: 0.5}, {1: 0.6}, 5.0, 1.0), case("b", {1: 0.5}, {1: 0.6}, 5.0, 9.0))
    assert results.check("S", with_points, {"a": {"tre_mm": 1.5, "dice": 0.99}}) == ([], 1)
    assert len(results.check("S", with_points, {"b": {"tre_mm": 1.5}})[0]) == 1
    without = result(case("a", {1: 0.5}, {1: 0.6}), case("b", {1: 0.5}, {1: 0.8}))
    assert results.check("S", without, {"a": {"dice": 0.7}, "b": {"dice": 0.7}}) == ([], 2)  # equal means
    assert results.check("S", without, {"a": {"dice": 0.7}, "b": {"dice": 0.7008}}) == ([], 2)  # 0.7004: equal as printed
    assert len(results.check("S", without, {"a": {"dice": 0.7}, "b": {"dice": 0.702}})[0]) == 1
    assert results.check("S", without, {}) == ([], 0)


def test_rows_repeat_a_method_on_the_pairs_that_the_record_covers() -> None:
    ours = result(case("a", {1: 0.5}, {1: 0.6}), case("b", {1: 0.5}, {1: 0.9}))
    recorded = {"pairs": 1, "best": {"name": "tool", "dice": 0.7}, "convexadam": {"dice": 0.55}}
    table = [row[1:4] for row in results.rows("S", [ours], recorded)]
    assert table == [["no registration", "2", "0.500"], ["DINO-Reg (MIND)", "2", "0.750"],
                     ["DINO-Reg (MIND), first 1", "1", "0.600"], ["recorded: tool", "1", "0.700"],
                     ["recorded: ConvexAdam", "1", "0.550"]]
    assert len(results.rows("S", [ours], None)) == 2
    assert len(results.rows("S", [results.Result("DINO-Reg (MIND)")], recorded)) == 4  # every pair failed


def test_convexadam_is_taken_from_the_run_before_the_record() -> None:
    run = result(case("a", {1: 0.5}, {1: 0.6}), name=results.CONVEXADAM)
    reference = results.convexadam_by_pair([result(case("a", {1: 0.5}, {1: 0.9})), run], {"a": {"dice": 0.1}, "b": {"dice": 0.2}})
    assert reference == {"a": {"dice": pytest.approx(0.6)}, "b": {"dice": 0.2}}


def test_mixed_code_in_one_run_is_said() -> None:
    costs = {pair: {"startup_cpu_seconds": seconds, "code": "1"} for pair, seconds in (("a", 1.0), ("b", 3.0))}
    ours = results.Result("M", cost=costs)
    assert results.notes([ours]) == ["M: 2.0 of the CPU seconds are start-up (interpreter and imports)"]
    ours.cost["b"]["code"] = "2"
    assert any("do not belong together" in line for line in results.notes([ours]))


def test_the_record_is_complete_and_its_means_are_those_of_its_pairs() -> None:
    record = json.loads((ROOT / "benchmarks" / "recorded.json").read_text())
    for name, entry in record["sets"].items():
        metric = "tre_mm" if "tre_mm" in entry["before"] else "dice"
        assert {metric, "name"} <= set(entry["best"]) and metric in entry["convexadam"]
        values = [pair[metric] for pair in record["convexadam_pairs"][name].values()]
        assert len(values) == entry["pairs"]
        # two runs of the same package, on two machines: they agree to 0.01 Dice (what one run a cell can tell) or 0.1 mm
        assert np.mean(values) == pytest.approx(entry["convexadam"][metric], abs=0.1 if metric == "tre_mm" else 0.01)


def test_the_peak_memory_is_that_of_the_program_and_not_of_its_parent() -> None:
    block = np.ones(40_000_000)  # 320 MB in this process, at the moment when it starts another one
    program = "import register_pair; print(register_pair.peak_mib())"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT / "benchmarks", capture_output=True, text=True, check=True)
    assert 1 < float(done.stdout) < 200 < block.nbytes / 2**20  # a bare interpreter needs about 15 MiB


@pytest.mark.slow
def test_a_pair_goes_through_the_real_engine(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(data), "--pairs", "1", "--markdown", "--work", str(tmp_path / "work")]
    assert accuracy.main(arguments) == 0
    row = cells(capsys.readouterr().out, "DINO-Reg (MIND)")
    assert float(row[3]) > 0.5 and float(row[8]) > 1 and 0.2 < float(row[9]) < 3  # imports alone are 2 CPU s and 0.4 GiB
    assert re.search(r"preset thorax-cbct", next((tmp_path / "work").rglob("log.txt")).read_text())  # from the modalities


@pytest.mark.slow
def test_convexadam_field_is_in_our_convention(data: Path, tmp_path: Path) -> None:
    pytest.importorskip("convexAdam", reason="the package is only a requirement of the benchmark (benchmarks/requirements.txt)")
    dataset = load_dataset(data / "Toy")
    pair = dataset.pairs()[0]
    shape = (48, 42, 54)  # three sizes, each a multiple of its grid: it rounds others down
    texture = ndimage.gaussian_filter(np.random.default_rng(0).standard_normal([n + 12 for n in shape]), 2.0).astype(np.float32)
    inner = tuple(slice(6, 6 + n) for n in shape)
    save(pair.moving, 1000 * texture[inner])
    save(pair.fixed, 1000 * np.roll(texture, -SHIFT, (0, 1, 2))[inner])
    save(pair.companion(pair.fixed, "masks") or pair.fixed, np.ones(shape, dtype=np.uint8))
    accuracy.register(accuracy.convexadam_method(1), dataset, pair, tmp_path / "out")
    path = find_field(pair, tmp_path / "out")
    assert path is not None
    centre = read_disp(path)[:, 18:30, 15:27, 21:33].mean(axis=(1, 2, 3))
    # its displacements come out (n - 1) / n too small on its half grid (up to 0.15 voxel here), and it smooths
    assert centre == pytest.approx(SHIFT.astype(float), abs=0.3)
