"""The Learn2Reg folder: which pairs a data set asks for, where their files are and what the results are called.

Written for the releases of 2022 and later (``<Task>_dataset.json``). File names end in ``_SSSS_MMMM.nii.gz`` (subject, modality)
and are read from that end, never by the task's prefix, which may differ from the data set's name. The ``num*`` fields are not
read: they are wrong in some releases.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dinoreg.errors import ConfigError, InputError
from dinoreg.io import path_inside, read_json

SPLITS = {"auto": "auto", "test": "test", "ts": "test", "val": "val", "train": "train", "tr": "train"}  # as given -> meaning
SPLIT_KEYS = {  # meaning -> keys of the JSON, the first that holds pairs is taken
    "test": ("registration_test",),
    "val": ("registration_val", "validation", "validation_paired"),  # the others: LUMIR, PSMAReg
    "train": ("training_paired_images",),
}

_NAME = re.compile(r"_(\d{4})_(\d{4})\.nii(\.gz)?$")


@dataclass(frozen=True)
class Pair:
    """One registration that a data set asks for.

    Attributes:
        name: subject and modality of the fixed and of the moving image, such as ``"0011_0001_0011_0000"``.
        fixed, moving: the image files.
        input_dir: the folder in which every file of the pair lies.
        fixed_id, moving_id: (subject, modality), four digits each.
        modalities: of the fixed and the moving image, in the data set's words; "" where it does not say.
        short_name: also ``disp_<short_name>.nii.gz`` is looked for by the official scorer; None where it is not.
        problem: why the pair cannot be registered (a file missing, a path outside the folder, listed twice); None if it can.
    """

    name: str
    fixed: Path
    moving: Path
    input_dir: Path
    fixed_id: tuple[str, str]
    moving_id: tuple[str, str]
    modalities: tuple[str, str] = ("", "")
    short_name: str | None = None
    problem: str | None = None

    def companion(self, image: Path, kind: str) -> Path | None:
        """The file of the same name in the folder ``<kind>Tr`` or ``<kind>Ts`` beside the image's, if there is one.

        Args:
            image: ``pair.fixed`` or ``pair.moving``.
            kind: "masks" or "labels" (same suffix), "keypoints" or "landmarks" (.csv).

        Raises:
            InputError: if it leads out of the data set through a symbolic link.
        """
        folder = image.parent.parent / image.parent.name.replace("images", kind, 1)
        name = image.name if kind in ("masks", "labels") else re.sub(r"\.nii(\.gz)?$", ".csv", image.name)
        if folder == image.parent or not folder.is_relative_to(self.input_dir):  # images may lie in the input folder itself
            return None
        path = path_inside(self.input_dir, (folder / name).relative_to(self.input_dir))
        return path if path.is_file() else None


@dataclass(frozen=True)
class Dataset:
    """A data set's description as its JSON gives it.

    Attributes:
        name: the task, such as ``"ThoraxCBCT"``.
        path: the JSON.
        input_dir: the folder that no path of the JSON may leave.
        modalities: modality index ("0", "1"...) -> name, such as ``"CT"``.
        content: the whole JSON.
    """

    name: str
    path: Path
    input_dir: Path
    modalities: Mapping[str, str]
    content: Mapping[str, Any]

    def split(self, split: str = "auto") -> str:
        """The split that a name means: "test", "val" or "train"; "auto" is the test split if it lists pairs, else the validation.

        Args:
            split: auto, val, test or train, or Val, Ts, Tr as the challenges write them; capitals do not matter.

        Raises:
            ConfigError: for another name.
        """
        if split.lower() not in SPLITS:
            raise ConfigError(f"split {split!r}: expected one of auto, val, test, train (or Val, Ts, Tr)")
        meaning = SPLITS[split.lower()]
        if meaning == "auto":
            return "test" if self._entries("test")[1] else "val"
        return meaning

    def pairs(self, split: str = "auto") -> list[Pair]:
        """The pairs of a split in the order of the JSON, those that cannot be registered included (see ``Pair.problem``).

        Args:
            split: as for :meth:`split`.

        Raises:
            ConfigError: for an unknown split.
            InputError: if the split lists no pairs, or the list does not hold pairs.
        """
        meaning = self.split(split)
        key, entries = self._entries(meaning)
        if not entries:
            filled = [name for name in SPLIT_KEYS if self._entries(name)[1]]
            advice = f"choose the split {' or '.join(filled)}" if filled else "no other split has any: complete the JSON"
            raise InputError(f"{self.path}: expected pairs under {' or '.join(SPLIT_KEYS[meaning])} (split {meaning}); got none; "
                             f"{advice}")
        pairs = [self._pair(entry, f"{key}[{index}]") for index, entry in enumerate(entries)]
        shorts = Counter(short for pair in {pair.name: pair for pair in pairs}.values() if (short := _short_name(pair)))
        seen: dict[str, int] = {}
        result = []
        for index, pair in enumerate(pairs):
            problem = pair.problem
            if pair.name in seen:
                problem = (f"{self.path}: expected each pair once; got {pair.name} as {key}[{seen[pair.name]}] and again as "
                           f"{key}[{index}]; it is registered once: remove one of the two")
            seen.setdefault(pair.name, index)
            short = _short_name(pair)
            result.append(replace(pair, problem=problem, short_name=short if short and shorts[short] == 1 else None))
        return result

    def _entries(self, meaning: str) -> tuple[str, list[Any]]:
        for key in SPLIT_KEYS[meaning]:
            entries = self.content.get(key) or []
            if not isinstance(entries, list):
                raise InputError(f"{self.path}: expected a list of pairs under {key}; got {type(entries).__name__}; correct it")
            if entries:
                return key, entries
        return SPLIT_KEYS[meaning][0], []

    def _pair(self, entry: Any, where: str) -> Pair:
        keys = ("fixed", "moving")
        if isinstance(entry, dict) and "fixed" not in entry:  # modality indices for keys: {"0": path, "1": path}
            direction = self.content.get("registration_direction")
            keys = ("1", "0") if isinstance(direction, dict) and str(direction.get("fixed")) == "1" else ("0", "1")
        if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in keys):
            raise InputError(f'{self.path}: expected {{"fixed": path, "moving": path}} in {where}; got {str(entry)[:120]}; '
                             "correct the JSON")
        files, ids, problems = [], [], []
        for relative in (entry[keys[0]], entry[keys[1]]):
            path = self.path.parent / relative
            match = _NAME.search(relative)
            ids.append((match.group(1), match.group(2)) if match else ("", ""))
            files.append(path)
            try:
                if match is None:
                    problems.append(f"{relative!r}: expected a name that ends in _SSSS_MMMM.nii.gz (subject, modality)")
                elif not path_inside(self.input_dir, self.path.parent.relative_to(self.input_dir) / relative).is_file():
                    problems.append(f"{path}: no such file; complete the data set or choose another split")
            except (InputError, OSError) as error:
                problems.append(str(error))
        first, second = (self.modalities.get(str(int(modality or -1)), "") for _, modality in ids)
        return Pair(name="_".join((*ids[0], *ids[1])) if all(map(all, ids)) else where, fixed=files[0], moving=files[1],
                    input_dir=self.input_dir, fixed_id=ids[0], moving_id=ids[1], modalities=(first, second),
                    problem=f"{self.path.name} {where}: " + "; ".join(problems) if problems else None)


def find_dataset(folder: Path) -> list[Path]:
    """The ``*_dataset.json`` files of a folder, or, where it holds none, of the folders directly in it."""
    return sorted(folder.glob("*_dataset.json")) or sorted(folder.glob("*/*_dataset.json"))


def load_dataset(input_dir: Path) -> Dataset:
    """Read the description of the one data set in a folder.

    Args:
        input_dir: the folder that holds ``<Task>_dataset.json`` or one folder that does.

    Raises:
        InputError: if there is no such JSON or more than one, or if it is not a JSON object.
    """
    found = find_dataset(input_dir)
    if len(found) != 1:
        names = ", ".join(str(path.relative_to(input_dir)) for path in found) or "none"
        raise InputError(f"{input_dir}: expected exactly one <Task>_dataset.json; got {names}; point the input to one data set")
    path = path_inside(input_dir, found[0].relative_to(input_dir))
    content = read_json(path)
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a JSON object; got {type(content).__name__}; correct the file")
    modality = content.get("modality")
    modalities = {str(key): str(value) for key, value in modality.items()} if isinstance(modality, dict) else {}
    name = content.get("name")
    return Dataset(name=name if isinstance(name, str) and name else path.name.removesuffix("_dataset.json"), path=path,
                   input_dir=input_dir, modalities=modalities, content=content)


def disp_filename(pair: Pair) -> str:
    """The name of a pair's displacement field, such as ``disp_0011_0001_0011_0000.nii.gz``."""
    return f"disp_{pair.name}.nii.gz"


def short_disp_filename(pair: Pair) -> str | None:
    """The name without modalities, such as ``disp_0011_0012.nii.gz``, that the official scorer looks for, or None.

    Scorers before 2025 accept nothing else for images of one modality and for fixed 0000 with moving 0001.
    """
    return f"disp_{pair.short_name}.nii.gz" if pair.short_name else None


def _short_name(pair: Pair) -> str | None:
    (fixed, fixed_modality), (moving, moving_modality) = pair.fixed_id, pair.moving_id
    same = fixed_modality == moving_modality or (fixed_modality, moving_modality) == ("0000", "0001")
    return f"{fixed}_{moving}" if same else None
