"""Data sets of every release, and the single pair of grand-challenge.org: what is asked for, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dinoreg.errors import ConfigError, InputError
from dinoreg.grandchallenge import find_single_pair, parse_sockets
from dinoreg.jobs import detect_contract, find_job
from dinoreg.learn2reg import disp_filename, load_dataset, short_disp_filename


def _image(folder: Path, subject: int, modality: int, split: str = "Tr", task: str = "Task") -> str:
    """An (empty) image file; returns the path as a JSON has it."""
    relative = f"./images{split}/{task}_{subject:04d}_{modality:04d}.nii.gz"
    (folder / relative).parent.mkdir(parents=True, exist_ok=True)
    (folder / relative).touch()
    return relative


def _pair(folder: Path, fixed: tuple[int, int] = (11, 1), moving: tuple[int, int] = (11, 0), **options: Any) -> dict[str, str]:
    return {"fixed": _image(folder, *fixed, **options), "moving": _image(folder, *moving, **options)}


def _json(folder: Path, content: Any, name: str = "Task_dataset.json") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(content if isinstance(content, str) else json.dumps({"name": "Task", **content}))
    return folder


# --- splits and keys ----------------------------------------------------------------------------------------------------------


def test_auto_split_is_test_where_it_lists_pairs_and_validation_otherwise(tmp_path: Path) -> None:
    test, val = _pair(tmp_path, split="Ts"), _pair(tmp_path, (12, 1), (12, 0))
    both = load_dataset(_json(tmp_path, {"registration_test": [test], "registration_val": [val]}))
    assert both.split() == "test" and [pair.name for pair in both.pairs()] == ["0011_0001_0011_0000"]
    only = load_dataset(_json(tmp_path, {"registration_test": [], "registration_val": [val]}))
    assert only.split("auto") == "val" and [pair.name for pair in only.pairs()] == ["0012_0001_0012_0000"]


@pytest.mark.parametrize(("given", "meaning"), [("Ts", "test"), ("test", "test"), ("Val", "val"), ("val", "val"), ("Tr", "train"),
                                                ("train", "train"), ("TS", "test")])
def test_splits_go_by_the_challenges_names_too(tmp_path: Path, given: str, meaning: str) -> None:
    content = {key: [_pair(tmp_path, (n, 1), (n, 0))]
               for n, key in enumerate(["registration_test", "registration_val", "training_paired_images"])}
    dataset = load_dataset(_json(tmp_path, content))
    assert dataset.split(given) == meaning
    assert dataset.pairs(given)[0].fixed_id[0] == {"test": "0000", "val": "0001", "train": "0002"}[meaning]


@pytest.mark.parametrize("key", ["registration_val", "validation", "validation_paired"])
def test_validation_pairs_are_found_under_each_releases_key(tmp_path: Path, key: str) -> None:
    dataset = load_dataset(_json(tmp_path, {key: [_pair(tmp_path)]}))
    assert [pair.name for pair in dataset.pairs("val")] == ["0011_0001_0011_0000"]


@pytest.mark.parametrize(("direction", "name"), [({}, "0005_0000_0005_0001"), ({"fixed": 0, "moving": 1}, "0005_0000_0005_0001"),
                                                 ({"fixed": 1, "moving": 0}, "0005_0001_0005_0000")])
def test_pairs_keyed_by_modality_follow_the_registration_direction(tmp_path: Path, direction: dict[str, int], name: str) -> None:
    entry = {"0": _image(tmp_path, 5, 0), "1": _image(tmp_path, 5, 1)}
    dataset = load_dataset(_json(tmp_path, {"training_paired_images": [entry], "registration_direction": direction}))
    assert dataset.pairs("train")[0].name == name


def test_counts_in_the_json_are_not_believed(tmp_path: Path) -> None:
    content = {"registration_val": [_pair(tmp_path)], "numRegistration_val": 7, "training": {"0": []}}
    assert len(load_dataset(_json(tmp_path, content)).pairs()) == 1


def test_names_are_read_from_their_end_whatever_the_task_is_called(tmp_path: Path) -> None:
    pair = load_dataset(_json(tmp_path, {"registration_val": [_pair(tmp_path, task="OncoReg_2023_0001")]})).pairs()[0]
    assert (pair.fixed_id, pair.moving_id) == (("0011", "0001"), ("0011", "0000"))
    assert pair.problem is None and pair.fixed.is_file()


def test_modalities_come_from_the_json_by_index(tmp_path: Path) -> None:
    content = {"registration_val": [_pair(tmp_path), _pair(tmp_path, (11, 2))], "modality": {"0": "FBCT", "1": "CBCT"}}
    pairs = load_dataset(_json(tmp_path, content)).pairs()
    assert [pair.modalities for pair in pairs] == [("CBCT", "FBCT"), ("", "FBCT")]  # modality 2 is not described


def test_one_folder_further_down_is_found(tmp_path: Path) -> None:
    inner = tmp_path / "Task"
    _json(inner, {"registration_val": [_pair(inner)]})
    dataset = load_dataset(tmp_path)
    assert dataset.pairs()[0].problem is None and dataset.pairs()[0].fixed.is_file()


def test_companions_are_the_files_of_the_same_name(tmp_path: Path) -> None:
    pair = load_dataset(_json(tmp_path, {"registration_val": [_pair(tmp_path)]})).pairs()[0]
    for kind, suffix in (("masks", "nii.gz"), ("landmarks", "csv")):
        assert pair.companion(pair.fixed, kind) is None
        path = tmp_path / f"{kind}Tr" / f"Task_0011_0001.{suffix}"
        path.parent.mkdir()
        path.touch()
        assert pair.companion(pair.fixed, kind) == path and pair.companion(pair.moving, kind) is None


# --- names of results ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fixed", "moving", "full", "short"), [
    ((11, 1), (11, 0), "disp_0011_0001_0011_0000.nii.gz", None),  # ThoraxCBCT
    ((11, 2), (11, 0), "disp_0011_0002_0011_0000.nii.gz", None),
    ((1, 0), (1, 1), "disp_0001_0000_0001_0001.nii.gz", "disp_0001_0001.nii.gz"),  # NLST, LungCT, AbdomenMRCT
    ((3455, 0), (3454, 0), "disp_3455_0000_3454_0000.nii.gz", "disp_3455_3454.nii.gz"),  # OASIS, LUMIR
])
def test_results_are_named_as_the_official_scorer_looks_for_them(tmp_path: Path, fixed: tuple[int, int], moving: tuple[int, int],
                                                                 full: str, short: str | None) -> None:
    pair = load_dataset(_json(tmp_path, {"registration_val": [_pair(tmp_path, fixed, moving)]})).pairs()[0]
    assert (disp_filename(pair), short_disp_filename(pair)) == (full, short)


def test_short_name_that_two_pairs_would_share_is_given_to_neither(tmp_path: Path) -> None:
    entries = [_pair(tmp_path, (1, 0), (2, 0)), _pair(tmp_path, (1, 1), (2, 1)), _pair(tmp_path, (3, 0), (2, 0))]
    pairs = load_dataset(_json(tmp_path, {"registration_val": entries})).pairs()
    assert [pair.short_name for pair in pairs] == [None, None, "0003_0002"]


# --- what fails the pair alone ------------------------------------------------------------------------------------------------


def test_missing_file_is_the_problem_of_its_pair_alone(tmp_path: Path) -> None:
    entries = [_pair(tmp_path), {"fixed": "./imagesTr/Task_0099_0001.nii.gz", "moving": _image(tmp_path, 99, 0)}]
    first, second = load_dataset(_json(tmp_path, {"registration_val": entries})).pairs()
    assert first.problem is None
    assert second.problem is not None and "Task_0099_0001.nii.gz: no such file" in second.problem


def test_pair_listed_twice_is_registered_once_and_told(tmp_path: Path) -> None:
    pairs = load_dataset(_json(tmp_path, {"registration_val": [_pair(tmp_path), _pair(tmp_path)]})).pairs()
    assert pairs[0].problem is None and pairs[0].name == pairs[1].name
    assert pairs[1].problem is not None and "registration_val[0] and again as registration_val[1]" in pairs[1].problem


@pytest.mark.parametrize("path", ["/tmp/Task_0001_0000.nii.gz", "../Task_0001_0000.nii.gz",
                                  "./imagesTr/../../Task_0001_0000.nii.gz", "./imagesTr/Task_0666_0000.nii.gz",
                                  "nul\0_0001_0000.nii.gz", "x" * 5000 + "_0001_0000.nii.gz"])
def test_path_that_leaves_the_folder_is_the_problem_of_its_pair(tmp_path: Path, path: str) -> None:
    folder = tmp_path / "input"
    entries = [_pair(folder), {"fixed": path, "moving": _image(folder, 11, 0)}]
    (tmp_path / "Task_0001_0000.nii.gz").touch()
    (folder / "imagesTr" / "Task_0666_0000.nii.gz").symlink_to(tmp_path / "Task_0001_0000.nii.gz")
    first, second = load_dataset(_json(folder, {"registration_val": entries})).pairs()
    assert first.problem is None and second.problem is not None


def test_name_without_subject_and_modality_is_the_problem_of_its_pair(tmp_path: Path) -> None:
    entry = {"fixed": "./imagesTr/fixed.nii.gz", "moving": _image(tmp_path, 1, 0)}
    (pair,) = load_dataset(_json(tmp_path, {"registration_val": [entry]})).pairs()
    assert pair.problem is not None and "_SSSS_MMMM.nii.gz" in pair.problem


# --- what fails the run -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", ['{"name": ', "[]", "3", '{"registration_val": {"fixed": "a"}}', '{"registration_val": [7]}',
                                     '{"registration_val": [{"fixed": "a_0001_0000.nii.gz"}]}', '{"registration_val": []}', "{}",
                                     '{"registration_val": [{"fixed": 1, "moving": 2}]}',
                                     '{"registration_val": [{"image": "x"}]}'])
def test_broken_json_fails_the_run(tmp_path: Path, content: str) -> None:
    with pytest.raises(InputError, match=r"Task_dataset\.json"):
        load_dataset(_json(tmp_path, content)).pairs()


def test_empty_split_names_those_that_are_not(tmp_path: Path) -> None:
    dataset = load_dataset(_json(tmp_path, {"registration_val": [_pair(tmp_path)], "registration_test": []}))
    with pytest.raises(InputError, match=r"registration_test .*choose the split val"):
        dataset.pairs("test")


def test_unknown_split_is_a_configuration_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'all': expected one of auto, val, test, train"):
        load_dataset(_json(tmp_path, {"registration_val": [_pair(tmp_path)]})).pairs("all")


def test_none_or_two_datasets_in_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="got none"):
        load_dataset(tmp_path)
    _json(_json(tmp_path, {}), {}, name="Other_dataset.json")
    with pytest.raises(InputError, match=r"got Other_dataset\.json, Task_dataset\.json"):
        load_dataset(tmp_path)


def test_dataset_description_outside_the_input_is_refused(tmp_path: Path) -> None:
    _json(tmp_path / "outside", {"registration_val": []})
    (tmp_path / "input").mkdir()
    (tmp_path / "input" / "Task_dataset.json").symlink_to(tmp_path / "outside" / "Task_dataset.json")
    with pytest.raises(InputError, match="symbolic link"):
        load_dataset(tmp_path / "input")


# --- the single pair ----------------------------------------------------------------------------------------------------------

SOCKETS = parse_sockets("")


def _single(folder: Path, *slugs: str) -> Path:
    for slug in slugs:
        (folder / "images" / slug).mkdir(parents=True)
        (folder / "images" / slug / "7f3e.mha").touch()
    return folder


def test_single_pair_is_found_by_its_folders(tmp_path: Path) -> None:
    pair = find_single_pair(_single(tmp_path, "fixed", "moving", "moving-mask"), SOCKETS)
    assert (pair.fixed, pair.moving) == (tmp_path / "images/fixed/7f3e.mha", tmp_path / "images/moving/7f3e.mha")
    assert pair.fixed_mask is None and pair.moving_mask == tmp_path / "images/moving-mask/7f3e.mha"


@pytest.mark.parametrize("word", ["interface", "socket"])
def test_sockets_are_resolved_through_inputs_json(tmp_path: Path, word: str) -> None:
    _single(tmp_path, "cone-beam", "plan")
    entries = [{word: {"slug": "cbct", "relative_path": "images/cone-beam"}, "image": {}},
               {word: {"slug": "planning-ct", "relative_path": "images/plan"}},
               {word: {"slug": "age", "relative_path": "age.json"}}]
    (tmp_path / "inputs.json").write_text(json.dumps(entries))
    pair = find_single_pair(tmp_path, parse_sockets("fixed=cbct, moving=planning-ct"))
    assert (pair.fixed.parent.name, pair.moving.parent.name) == ("cone-beam", "plan")
    with pytest.raises(InputError, match=r"sockets age, cbct, planning-ct.*--sockets fixed=SLUG"):
        find_single_pair(tmp_path, SOCKETS)


@pytest.mark.parametrize("content", ["{", "{}", "[1]", '[{"interface": {"slug": "fixed"}}]',
                                     '[{"interface": {"slug": "fixed", "relative_path": "../.."}}]',
                                     '[{"interface": {"slug": "fixed", "relative_path": "/etc"}}]'])
def test_broken_inputs_json_is_refused(tmp_path: Path, content: str) -> None:
    (_single(tmp_path, "fixed", "moving") / "inputs.json").write_text(content)
    with pytest.raises(InputError):
        find_single_pair(tmp_path, SOCKETS)


def test_socket_holds_exactly_one_image_inside_the_input(tmp_path: Path) -> None:
    folder = _single(tmp_path / "input", "fixed")
    with pytest.raises(InputError, match=r"images/moving: expected exactly one image .* for the moving; got 0"):
        find_single_pair(folder, SOCKETS)
    _single(folder, "moving")
    (folder / "images/moving/notes.txt").touch()
    find_single_pair(folder, SOCKETS)
    (folder / "images/moving/b.nii.gz").touch()
    with pytest.raises(InputError, match="got 2"):
        find_single_pair(folder, SOCKETS)
    (folder / "images/moving/b.nii.gz").unlink()
    (folder / "images/moving/7f3e.mha").unlink()
    (tmp_path / "outside.mha").touch()
    (folder / "images/moving/7f3e.mha").symlink_to(tmp_path / "outside.mha")
    with pytest.raises(InputError, match="symbolic link"):
        find_single_pair(folder, SOCKETS)


@pytest.mark.parametrize("text", ["fixed", "fixed=", "warped=x", "fixed=a/b", "fixed=..", "fixed=a=b"])
def test_sockets_are_role_and_plain_slug(text: str) -> None:
    with pytest.raises(ConfigError, match="ROLE=SLUG"):
        parse_sockets(text)


# --- which contract -----------------------------------------------------------------------------------------------------------


def test_contract_is_told_from_the_folder_and_refused_where_it_is_both_or_neither(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="got neither"):
        detect_contract(tmp_path, SOCKETS)
    _single(tmp_path, "fixed", "moving")
    assert detect_contract(tmp_path, SOCKETS) == "single"
    _json(tmp_path, {"registration_val": [_pair(tmp_path)]})
    with pytest.raises(InputError, match=r"got Task_dataset\.json, images/fixed"):
        detect_contract(tmp_path, SOCKETS)
    assert find_job(tmp_path, "learn2reg", "auto", SOCKETS).contract == "learn2reg"
    assert find_job(tmp_path, "single", "auto", SOCKETS).contract == "single"


def test_unknown_mode_and_missing_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="mode 'both'"):
        find_job(tmp_path, "both", "auto", SOCKETS)
    with pytest.raises(InputError, match="nothing of this name"):
        find_job(tmp_path / "missing", "auto", "auto", SOCKETS)


def test_cases_name_their_outputs(tmp_path: Path) -> None:
    folder = _single(tmp_path / "a", "fixed", "moving")
    (case,) = find_job(folder, "auto", "auto", parse_sockets("displacement-field=field")).cases
    assert case.fields == ("images/field/field.mha",) and case.warped is None
    folder = _json(tmp_path / "b", {"registration_val": [_pair(tmp_path / "b", (1, 0), (1, 1))]})
    (case,) = find_job(folder, "auto", "auto", SOCKETS).cases
    assert case.fields == ("disp_0001_0000_0001_0001.nii.gz", "disp_0001_0001.nii.gz")
    assert case.warped == "warped/warped_0001_0000_0001_0001.nii.gz"
