"""What an input folder asks for, under whichever contract: the cases, their images in and their results out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dinoreg.config import modality
from dinoreg.errors import ConfigError, InputError
from dinoreg.grandchallenge import find_single_pair
from dinoreg.io import copy_file, image_suffix, read_volume, write_disp_mha, write_disp_nifti, write_volume
from dinoreg.learn2reg import Pair, disp_filename, find_dataset, load_dataset, short_disp_filename
from dinoreg.validate import Problem, check_header, check_mask, check_pair, check_roles, check_volume, raise_errors, unreadable
from dinoreg.volume import Volume

Disp = npt.NDArray[np.float32]

MODES = ("auto", "learn2reg", "single")


@dataclass(frozen=True)
class Case:
    """One registration to be done.

    Attributes:
        name: of the case in log and report.
        fixed, moving, fixed_mask, moving_mask: the files; masks where there are any.
        modalities: of the fixed and the moving image; "" where unknown.
        fields: names of the displacement field relative to the output folder; the same bytes under each.
        warped, picture, page: names of the warped moving image, of the quality picture and of the page around it relative to the
            output folder; None where the contract has no place for them.
        same_grid: the contract counts displacements from voxel to voxel of two arrays of one shape, whatever their headers say.
        problem: why the case cannot be done; None if nothing is known against it.
        initial: where registration starts: "none", "auto" or "given", see :func:`dinoreg.validate.check_pair`.
        known: files with labels and points that the result is compared with, by role: see :func:`dinoreg.truth.read_truth`.
        space: of their points, where they are .csv.
        record: name of the report of this case alone, which comes last, relative to the output folder.
        results: every other name under which the case may leave a file there.
    """

    name: str
    fixed: Path
    moving: Path
    fixed_mask: Path | None
    moving_mask: Path | None
    modalities: tuple[str, str]
    fields: tuple[str, ...]
    warped: str | None
    picture: str | None
    same_grid: bool
    problem: str | None = None
    page: str | None = None
    initial: str = "none"
    known: Mapping[str, Path] = field(default_factory=dict)
    space: str = "ras"
    record: str = "report.json"
    results: tuple[str, ...] = ()


@dataclass(frozen=True)
class Job:
    """All cases of an input folder.

    Attributes:
        contract: "learn2reg" or "single".
        dataset: name of the data set; "" for a single pair.
        split: "test", "val" or "train"; "" for a single pair.
        cases: in the order of the data set.
    """

    contract: str
    dataset: str
    split: str
    cases: tuple[Case, ...]


@dataclass(frozen=True)
class Images:
    """The images of a case in memory, checked, and what the checks warned of."""

    fixed: Volume
    moving: Volume
    fixed_mask: Volume | None
    moving_mask: Volume | None
    warnings: tuple[str, ...]


def detect_contract(input_dir: Path, sockets: Mapping[str, str]) -> str:
    """"learn2reg" for a folder with a ``*_dataset.json``, "single" for one with ``inputs.json`` or a folder for the fixed image.

    Raises:
        InputError: if there is no such folder, or it looks like both or like neither.
    """
    names = ("inputs.json", f"images/{sockets['fixed']}")
    found_single = [name for name in names if (input_dir / name).exists()]
    found_dataset = [path.name for path in find_dataset(input_dir)]
    if bool(found_dataset) == bool(found_single):
        raise InputError(f"{input_dir}: expected either <Task>_dataset.json (a Learn2Reg data set) or {' or '.join(names)} "
                         f"(a single pair); got {', '.join(found_dataset + found_single) or 'neither'}; correct the folder or "
                         "choose with --mode learn2reg or --mode single")
    return "learn2reg" if found_dataset else "single"


def find_job(input_dir: Path, mode: str, split: str, sockets: Mapping[str, str], initial: str = "auto") -> Job:
    """The cases that a folder asks for.

    Args:
        input_dir: the input folder.
        mode: "auto" (see :func:`detect_contract`), "learn2reg" or "single".
        split: of a Learn2Reg data set, see :meth:`dinoreg.learn2reg.Dataset.split`.
        sockets: role -> slug of a single pair, see :func:`dinoreg.grandchallenge.parse_sockets`.
        initial: of the cases: "auto" or "none".

    Raises:
        ConfigError: for an unknown mode or split, or another initial transform.
        InputError: if the folder, its JSON or its sockets are not as the contract says.
    """
    if mode not in MODES:
        raise ConfigError(f"mode {mode!r}: expected one of {', '.join(MODES)}")
    if not input_dir.is_dir():
        got = "a file" if input_dir.exists() else "nothing of this name"
        raise InputError(f"{input_dir}: expected the input folder; got {got}; mount or name the folder that holds the images")
    if initial not in ("auto", "none"):
        raise ConfigError(f"initial transform {initial!r}: expected auto or none")
    contract = detect_contract(input_dir, sockets) if mode == "auto" else mode
    if contract == "single":
        files = find_single_pair(input_dir, sockets)
        slug = sockets["displacement-field"]
        fields = (f"images/{slug}/{slug}.mha",)
        case = Case("single", files.fixed, files.moving, files.fixed_mask, files.moving_mask, modalities=("", ""), fields=fields,
                    warped=None, picture=None, same_grid=False, initial=initial, results=fields)
        return Job(contract, dataset="", split="", cases=(case,))
    dataset = load_dataset(input_dir)
    cases = tuple(_learn2reg_case(pair, initial) for pair in dataset.pairs(split))
    return Job(contract, dataset.name, dataset.split(split), cases)


def _learn2reg_case(pair: Pair, initial: str) -> Case:
    fields = tuple(filter(None, (disp_filename(pair), short_disp_filename(pair))))
    warped, picture = f"warped/warped_{pair.name}.nii.gz", f"qc/{pair.name}.png"
    masks: list[Path | None] = [None, None]
    problem = pair.problem
    if problem is None:
        try:
            masks = [pair.companion(image, "masks") for image in (pair.fixed, pair.moving)]
        except InputError as error:
            problem = str(error)
    return Case(pair.name, pair.fixed, pair.moving, fixed_mask=masks[0], moving_mask=masks[1], modalities=pair.modalities,
                fields=fields, warped=warped, picture=picture, same_grid=True, problem=problem,
                initial=initial, record=f"records/{pair.name}.json", results=(*fields, warped, picture))


def load_case(case: Case, expected: tuple[str, str] = ("", "")) -> Images:
    """Read and check the images of a case.

    Where the contract counts from voxel to voxel, the moving image is put on the fixed image's grid if only their headers differ.

    Args:
        case: what is asked for.
        expected: the modalities that the preset expects of fixed and moving image.

    Raises:
        InputError: with everything that is wrong with any of the files, if they cannot be registered.
    """
    volumes, problems = inspect_case(case, expected)
    return _images(volumes, problems)


def inspect_case(case: Case, expected: tuple[str, str] = ("", "")) -> tuple[dict[str, Volume], list[Problem]]:
    """The images of a case by role, as far as they can be read, and everything that is wrong with them; see :func:`load_case`."""
    if case.problem:
        return {}, [unreadable(InputError(case.problem))]
    files = {"fixed": case.fixed, "moving": case.moving, "fixed_mask": case.fixed_mask, "moving_mask": case.moving_mask}
    volumes: dict[str, Volume] = {}
    problems: list[Problem] = []
    for role, path in files.items():
        if path is not None:
            try:
                volumes[role] = read_volume(path)
                problems += check_header(path)
            except InputError as error:
                problems.append(unreadable(error))
    kinds = (modality(case.modalities[0]), modality(case.modalities[1]))
    problems += check_roles(str(case.fixed), str(case.moving), kinds, expected)
    volumes, found = _inspect(volumes, {role: str(path) for role, path in files.items()}, _either(kinds, expected),
                              same_grid=case.same_grid, initial=case.initial)
    return volumes, [*problems, *found]


def check_images(volumes: Mapping[str, Volume], names: Mapping[str, str], given: tuple[str, str] = ("", ""),
                 expected: tuple[str, str] = ("", ""), *, initial: str = "none") -> Images:
    """Check the images of a pair that are in memory, one by one and against each other.

    Args:
        volumes: by role ("fixed", "moving", "fixed_mask", "moving_mask"), as far as there are any.
        names: what messages call them; paths, if they have one.
        given, expected: modalities of fixed and moving image, by the user and by the preset.
        initial: as in :class:`Case`.

    Raises:
        InputError: with everything that is wrong with any of them, if they cannot be registered.
    """
    problems = [problem for name in names.values() if Path(name).is_file() for problem in check_header(Path(name))]
    problems += check_roles(names["fixed"], names["moving"], given, expected)
    checked, found = _inspect(volumes, names, _either(given, expected), same_grid=False, initial=initial)
    return _images(checked, [*problems, *found])


def _either(given: tuple[str, str], expected: tuple[str, str]) -> tuple[str, str]:
    return given[0] or expected[0], given[1] or expected[1]


def _images(volumes: Mapping[str, Volume], problems: Sequence[Problem]) -> Images:
    warnings = raise_errors(problems)
    return Images(volumes["fixed"], volumes["moving"], volumes.get("fixed_mask"), volumes.get("moving_mask"), tuple(warnings))


def _inspect(volumes: Mapping[str, Volume], names: Mapping[str, str], kinds: tuple[str, str], *, same_grid: bool,
             initial: str) -> tuple[dict[str, Volume], list[Problem]]:
    """The images by role (on one grid where the contract has one), and what is wrong with them."""
    problems = []
    if "fixed" in volumes and "moving" in volumes:
        problems += check_pair(volumes["fixed"], volumes["moving"], same_grid=same_grid, initial=initial)
        if same_grid:
            volumes = {role: replace(volume, affine=volumes["fixed"].affine) for role, volume in volumes.items()}
    for role, volume in volumes.items():
        image = volumes.get(role.removesuffix("_mask"))
        if not role.endswith("_mask"):
            problems += check_volume(volume, names[role], kind=kinds[role == "moving"], straight=not same_grid)
        elif image is not None:
            problems += check_mask(volume, image, names[role])
    return dict(volumes), problems


def write_case(case: Case, output_dir: Path, images: Images, disp: Disp, warped: Volume | None, *,
               vector_field: bool) -> list[Path]:
    """Write the results of a case; the field under its full name comes last: where it is, the case is complete.

    Args:
        case, images: what was asked for and read.
        output_dir: the output folder.
        disp: (3, i, j, k) float32, voxels of the fixed grid.
        warped: the moving image on the fixed grid; None where the contract has no place for it.
        vector_field: for a MetaImage, see :func:`dinoreg.io.write_disp_mha`.

    Returns:
        The files, in the order of writing.

    Raises:
        OutputError: if one cannot be written.
        RegistrationError: if the field holds values that are not finite.
    """
    written = []
    if case.warped is not None and warped is not None:
        written.append(output_dir / case.warped)
        write_volume(written[-1], warped)
    field, *copies = (output_dir / name for name in reversed(case.fields))
    if image_suffix(field) == ".mha":
        write_disp_mha(field, disp, images.fixed.affine, vector=vector_field)
    else:
        write_disp_nifti(field, disp, images.fixed.affine)
    for copy in copies:
        copy_file(field, copy)
    return [*written, field, *copies]
