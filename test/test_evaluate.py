"""``python -m dinoreg evaluate``: fields are found, read and scored as the official scorer does, and what it hides is said."""

from __future__ import annotations

import json
import math
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from dinoreg.__main__ import main
from dinoreg.errors import InputError
from dinoreg.evaluate import evaluate_dataset, find_field, format_table, read_disp, read_points, read_true_disp
from dinoreg.learn2reg import load_dataset

SHAPE = (20, 18, 16)
SHIFT = np.array([2.0, -1.0, 3.0])  # three different shifts: no two axes or signs can be exchanged unseen
SPACING = (1.5, 2.0, 2.5)
AFFINE = np.diag([*SPACING, 1.0])


def save(path: Path, array: np.ndarray, affine: np.ndarray = AFFINE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, affine), path)


def save_points(path: Path, points: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savetxt(path, points, delimiter=",", fmt="%.4f")


def make_pair(root: Path, subject: str) -> None:
    """A fixed image 0001 and a moving image 0000 that is the fixed one moved by SHIFT: warped(x) = moving(x + SHIFT)."""
    rng = np.random.default_rng(int(subject))
    moving_labels = np.zeros(SHAPE, dtype=np.uint8)
    moving_labels[6:13, 4:10, 7:12] = 1
    moving_labels[13:16, 4:10, 7:12] = 2
    fixed_labels = np.roll(moving_labels, -SHIFT.astype(int), axis=(0, 1, 2))
    fixed_points = rng.uniform(5, 11, (12, 3))
    for modality, labels, points in (("0001", fixed_labels, fixed_points), ("0000", moving_labels, fixed_points + SHIFT)):
        case = f"Toy_{subject}_{modality}"
        save(root / "imagesTr" / f"{case}.nii.gz", rng.integers(0, 100, SHAPE).astype(np.int16))
        save(root / "labelsTr" / f"{case}.nii.gz", labels)
        save_points(root / "keypointsTr" / f"{case}.csv", points)


def constant_disp(shift: np.ndarray) -> np.ndarray:
    return np.broadcast_to(shift, (*SHAPE, 3)).astype(np.float32)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "data"
    entries = []
    for subject in ("0001", "0002"):
        make_pair(root, subject)
        entries.append({"fixed": f"./imagesTr/Toy_{subject}_0001.nii.gz", "moving": f"./imagesTr/Toy_{subject}_0000.nii.gz"})
    content = {"name": "Toy", "modality": {"0": "CT", "1": "CBCT"}, "registration_val": entries}
    (root / "Toy_dataset.json").write_text(json.dumps(content))
    return root


@pytest.fixture
def fields(tmp_path: Path) -> Path:
    folder = tmp_path / "fields"
    for subject in ("0001", "0002"):
        save(folder / f"disp_{subject}_0001_{subject}_0000.nii.gz", constant_disp(SHIFT))
    return folder


def test_the_right_field_scores_perfectly_and_its_opposite_twice_the_motion(root: Path, fields: Path) -> None:
    length = float(np.linalg.norm(SHIFT * SPACING))
    case = evaluate_dataset(load_dataset(root), fields).cases[0]
    assert case.after.plain["dice"] == 1.0 and case.after.plain["hd95_mm"] == 0.0
    assert case.after.plain["tre_keypoints_mm"] == pytest.approx(0.0, abs=1e-4)  # csv with four decimals
    assert case.before.plain["tre_keypoints_mm"] == pytest.approx(length, abs=1e-3)
    assert case.before.plain["dice"] < 0.6 and case.before.plain["hd95_mm"] > 4
    assert case.after.plain["folds_percent"] == 0.0 and case.after.plain["sdlogj"] == 0.0
    save(fields / "disp_0001_0001_0001_0000.nii.gz", constant_disp(-SHIFT))
    wrong = evaluate_dataset(load_dataset(root), fields).cases[0].after
    assert wrong.plain["tre_keypoints_mm"] == pytest.approx(2 * length, abs=1e-3)


def test_official_numbers_stand_beside_the_plain_ones_in_their_own_units(root: Path, fields: Path) -> None:
    before = evaluate_dataset(load_dataset(root), fields).cases[0].before
    assert list(before.official) == ["TRE_kp", "DSC", "HD95", "LogJacDetStd", "num_foldings"]
    assert before.official["TRE_kp"] == pytest.approx(before.plain["tre_keypoints_mm"], rel=1e-6)
    assert before.official["DSC"] == before.plain["dice"]
    # no surface point is farther from the other surface than the shift is long: 3.7 voxels, 8.3 mm; the corners come near that
    assert 2.0 < before.official["HD95"] <= math.hypot(2, 1, 3) < before.plain["hd95_mm"] <= np.linalg.norm(SHIFT * SPACING)


def test_a_folding_field_shows_although_the_official_count_is_zero(root: Path, fields: Path) -> None:
    disp = np.zeros((*SHAPE, 3), dtype=np.float32)
    disp[..., 0] = -2.0 * np.arange(SHAPE[0])[:, None, None]
    save(fields / "disp_0001_0001_0001_0000.nii.gz", disp)
    after = evaluate_dataset(load_dataset(root), fields).cases[0].after
    assert after.plain["folds_percent"] == 100.0
    assert after.official["num_foldings"] == 0.0


def test_labels_of_one_image_only_are_named_and_left_out(root: Path, fields: Path) -> None:
    path = root / "labelsTr" / "Toy_0001_0000.nii.gz"
    labels = np.asarray(nib.load(path).dataobj).copy()
    labels[labels == 2] = 9
    save(path, labels)
    evaluation = evaluate_dataset(load_dataset(root), fields)
    assert list(evaluation.cases[0].missing_labels) == [2, 9]
    assert evaluation.cases[0].after.plain["dice"] == 1.0
    assert "0001_0001_0001_0000: labels 2, 9 in one image only" in format_table(evaluation)


def test_labels_warped_off_the_image_count_as_zero_and_are_named(root: Path, fields: Path) -> None:
    save(fields / "disp_0001_0001_0001_0000.nii.gz", constant_disp(np.array([100.0, 0.0, 0.0])))
    evaluation = evaluate_dataset(load_dataset(root), fields)
    case = evaluation.cases[0]
    assert list(case.lost_labels) == [1, 2]
    assert case.after.plain["dice"] == 0.0 and case.after.plain["hd95_mm"] == math.inf
    content = evaluation.to_json()
    assert content["cases"][case.name]["after"]["plain"]["hd95_mm"] is None
    json.dumps(content, allow_nan=False)


def test_sdlogj_is_taken_inside_the_fixed_mask(root: Path, fields: Path) -> None:
    disp = np.zeros((*SHAPE, 3), dtype=np.float32)
    disp[10:, :, :, 0] = 0.2 * np.arange(10)[:, None, None]
    save(fields / "disp_0001_0001_0001_0000.nii.gz", disp)
    unmasked = evaluate_dataset(load_dataset(root), fields).cases[0].after
    mask = np.zeros(SHAPE, dtype=np.uint8)
    mask[:9] = 1  # where nothing moves
    save(root / "masksTr" / "Toy_0001_0001.nii.gz", mask)
    masked = evaluate_dataset(load_dataset(root), fields).cases[0].after
    for kind, name in (("plain", "sdlogj"), ("official", "LogJacDetStd")):
        assert getattr(unmasked, kind)[name] > 0.01 and getattr(masked, kind)[name] == pytest.approx(0.0, abs=1e-9)


def test_a_true_field_gives_the_endpoint_error(root: Path, fields: Path) -> None:
    half = tuple((n + 1) // 2 for n in SHAPE)
    (root / "gt_dispTr").mkdir()
    np.savez(root / "gt_dispTr" / "disp_0001_0001_0001_0000.npz", field=np.broadcast_to(SHIFT, (*half, 3)).astype(np.float32))
    first, second = evaluate_dataset(load_dataset(root), fields).cases
    assert first.before.plain["endpoint_mm"] == pytest.approx(np.linalg.norm(SHIFT * SPACING), rel=1e-6)
    assert first.after.plain["endpoint_mm"] == pytest.approx(0.0, abs=1e-6)
    assert "endpoint_mm" not in second.after.plain


def test_a_true_field_at_every_second_voxel_is_interpolated_linearly(root: Path) -> None:
    shape = (9, 6, 5)
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"), axis=-1)
    full = (grid @ np.array([[0.1, 0, 0.2], [0, 0.3, 0], [-0.1, 0, 0.4]])).astype(np.float32)
    pair = load_dataset(root).pairs()[0]
    (root / "gt_dispTr").mkdir()
    np.savez(root / "gt_dispTr" / f"disp_{pair.name}.npz", full[::2, ::2, ::2])
    disp = read_true_disp(pair, shape)
    # the sixth and last row along j lies beyond the stored rows 0, 2, 4: there the value stays
    assert np.allclose(disp[:, :, :5], np.moveaxis(full, -1, 0)[:, :, :5], atol=1e-6)
    assert np.allclose(disp[:, :, 5], disp[:, :, 4])
    with pytest.raises(InputError, match="another grid"):
        read_true_disp(pair, (30, 30, 30))


def test_npz_is_looked_for_first_and_may_be_float16(root: Path, fields: Path) -> None:
    np.savez(fields / "disp_0001_0001_0001_0000.npz", constant_disp(0 * SHIFT).astype(np.float16))
    case = evaluate_dataset(load_dataset(root), fields).cases[0]
    assert case.field == "disp_0001_0001_0001_0000.npz"
    assert case.after.plain == case.before.plain


def test_the_short_name_goes_first_only_from_0001_to_0000(tmp_path: Path, root: Path) -> None:
    path = root / "Toy_dataset.json"
    content = json.loads(path.read_text())
    content["registration_val"] = [{"fixed": "./imagesTr/Toy_0001_0000.nii.gz", "moving": "./imagesTr/Toy_0001_0001.nii.gz"},
                                   {"fixed": "./imagesTr/Toy_0002_0001.nii.gz", "moving": "./imagesTr/Toy_0002_0000.nii.gz"}]
    path.write_text(json.dumps(content))
    for name in ("disp_0001_0001", "disp_0001_0000_0001_0001", "disp_0002_0002", "disp_0002_0001_0002_0000"):
        (tmp_path / f"{name}.nii.gz").touch()
    forward, backward = load_dataset(root).pairs()
    assert find_field(forward, tmp_path).name == "disp_0001_0001.nii.gz"
    assert find_field(backward, tmp_path).name == "disp_0002_0001_0002_0000.nii.gz"


def test_keypoints_of_the_modality_pair_are_preferred(root: Path) -> None:
    pair = load_dataset(root).pairs()[0]
    for modality in ("0000", "0001"):
        save_points(root / "keypoints00000001Tr" / f"Toy_0001_{modality}.csv", np.full((1, 3), 4.0))
    assert np.array_equal(read_points(pair, "keypoints")[0], [[4.0, 4.0, 4.0]])
    assert read_points(pair, "landmarks") is None


def test_landmark_lists_of_two_lengths_are_refused(root: Path) -> None:
    save_points(root / "keypointsTr" / "Toy_0001_0000.csv", np.zeros((3, 3)))
    with pytest.raises(InputError, match=r"Toy_0001_0001\.csv.*as many points"):
        read_points(load_dataset(root).pairs()[0], "keypoints")


@pytest.mark.parametrize("text", ["a,b,c\n", "1,2\n", "", "1,2,nan\n"])
def test_a_broken_landmark_file_is_named(root: Path, text: str) -> None:
    path = root / "keypointsTr" / "Toy_0001_0000.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=r"Toy_0001_0000\.csv"):
        read_points(load_dataset(root).pairs()[0], "keypoints")


def test_an_itk_vector_field_is_refused_as_the_scorer_refuses_it(tmp_path: Path) -> None:
    path = tmp_path / "disp.nii.gz"
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((4, 5, 6, 3), dtype=np.float32), isVector=True), str(path))
    with pytest.raises(InputError, match=r"\(X, Y, Z, 3\).*5D"):
        read_disp(path)


@pytest.mark.parametrize("content", [b"", b"nonsense", b"PK\x03\x04 nonsense"])
@pytest.mark.parametrize("suffix", [".nii.gz", ".npz"])
def test_a_broken_field_is_refused_with_its_name(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"disp{suffix}"
    path.write_bytes(content)
    with pytest.raises(InputError, match="disp"):
        read_disp(path)


def test_a_truncated_field_is_refused(tmp_path: Path, fields: Path) -> None:
    whole = (fields / "disp_0001_0001_0001_0000.nii.gz").read_bytes()
    path = tmp_path / "disp.nii.gz"
    path.write_bytes(whole[:len(whole) // 2])
    with pytest.raises(InputError, match="cannot be read"):
        read_disp(path)


def test_a_field_with_nan_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "disp.nii.gz"
    save(path, np.full((3, 3, 3, 3), np.nan, dtype=np.float32))
    with pytest.raises(InputError, match="finite"):
        read_disp(path)


def test_a_pair_that_fails_does_not_stop_the_others(root: Path, fields: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(fields / "disp_0001_0001_0001_0000.nii.gz", constant_disp(SHIFT)[:-1])
    (fields / "disp_0002_0001_0002_0000.nii.gz").rename(fields / "kept.nii.gz")
    evaluation = evaluate_dataset(load_dataset(root), fields)
    assert not evaluation.cases and len(evaluation.problems) == 2
    assert "expected shape (20, 18, 16, 3)" in evaluation.problems[0]
    assert "disp_0002_0001_0002_0000.nii.gz" in evaluation.problems[1]
    (fields / "kept.nii.gz").rename(fields / "disp_0002_0001_0002_0000.nii.gz")
    assert main(["evaluate", str(root), str(fields)]) == 3
    streams = capsys.readouterr()
    assert "1 pair scored" in streams.out and "0002_0001_0002_0000" in streams.out
    assert streams.err.strip().splitlines()[-1].startswith("error: 1 of 2 pairs could not be scored")


def test_aggregates_are_over_the_cases_that_have_the_metric(root: Path, fields: Path) -> None:
    save(fields / "disp_0002_0001_0002_0000.nii.gz", constant_disp(0 * SHIFT))
    (root / "keypointsTr" / "Toy_0001_0000.csv").unlink()
    evaluation = evaluate_dataset(load_dataset(root), fields)
    after = evaluation.aggregates("after", "plain")
    assert after["tre_keypoints_mm"]["n"] == 1 and after["dice"]["n"] == 2
    second = evaluation.cases[1].after.plain
    assert after["tre_keypoints_mm"]["mean"] == second["tre_keypoints_mm"]
    assert after["dice"]["mean"] == pytest.approx((1.0 + second["dice"]) / 2)
    official = evaluation.aggregates("after", "official")["DSC"]
    assert official["30"] == pytest.approx(second["dice"] + 0.3 * (1.0 - second["dice"]))


def test_the_command_prints_a_table_and_writes_json(root: Path, fields: Path, tmp_path: Path,
                                                    capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "out" / "scores.json"
    assert main(["evaluate", str(root), str(fields), "--split", "val", "--json", str(target)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Toy, split val: 2 pairs scored"
    rows = ["0001_0001_0001_0000", "0002_0001_0002_0000", "mean", "std"]
    assert [line.split()[0] for line in lines if "->" in line and "(" not in line] == [*rows, *rows, "30"]
    content = json.loads(target.read_text())
    assert content["aggregates"]["after"]["official"]["DSC"] == {"mean": 1.0, "std": 0.0, "30": 1.0, "n": 2}
    assert len(content["cases"]["0001_0001_0001_0000"]["after"]["detailed"]["tre_keypoints_mm"]) == 12
    assert content["cases"]["0001_0001_0001_0000"]["after"]["detailed"]["dice"] == {"1": 1.0, "2": 1.0}


@pytest.mark.parametrize(("arguments", "status"), [
    (["{root}", "{fields}", "--split", "nonsense"], 2), (["{root}", "{root}/nowhere"], 3), (["{fields}", "{fields}"], 3),
    (["{root}", "{fields}", "--split", "test"], 3)])
def test_a_wrong_request_ends_with_its_status_and_one_line(root: Path, fields: Path, arguments: list[str], status: int,
                                                           capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", *(a.format(root=root, fields=fields) for a in arguments)]) == status
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and error[0].startswith("error: ")
