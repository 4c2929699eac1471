"""The single pair of grand-challenge.org: one image a socket, named by ``inputs.json`` or by its folder.

A socket has a slug and a path relative to the input (or output) folder, by default ``images/<slug>``, in which there is exactly
one image of any name. Which slug plays which role can be chosen, since every challenge names its sockets itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dinoreg.errors import ConfigError, InputError
from dinoreg.io import SUFFIXES, image_suffix, path_inside, read_json

ROLES = ("fixed", "moving", "fixed-mask", "moving-mask", "displacement-field")


@dataclass(frozen=True)
class SinglePair:
    """The files of one job; masks where the job has them."""

    fixed: Path
    moving: Path
    fixed_mask: Path | None
    moving_mask: Path | None


def parse_sockets(text: str) -> dict[str, str]:
    """Slug of each role, from ``"fixed=planning-ct,moving=cbct"``; a role that is not named has the slug of its own name.

    Raises:
        ConfigError: for an unknown role, a role without a slug or a slug that is no plain name.
    """
    sockets = {role: role for role in ROLES}
    for item in filter(None, (item.strip() for item in text.split(","))):
        role, _, slug = item.partition("=")
        if role not in sockets or not slug or not slug.replace("-", "").replace("_", "").isalnum():
            raise ConfigError(f"sockets: expected ROLE=SLUG with a role among {', '.join(ROLES)}; got {item!r}")
        sockets[role] = slug
    return sockets


def find_single_pair(input_dir: Path, sockets: Mapping[str, str]) -> SinglePair:
    """The files of the pair.

    Args:
        input_dir: the job's input folder.
        sockets: role -> slug, see :func:`parse_sockets`.

    Raises:
        InputError: if a socket's folder is missing (masks may be), holds no image or more than one, or lies outside the input.
    """
    paths = _socket_paths(input_dir)
    found: dict[str, Path | None] = {}
    for role in ("fixed", "moving", "fixed-mask", "moving-mask"):
        slug = sockets[role]
        place = path_inside(input_dir, paths.get(slug, f"images/{slug}"))
        images = [place] if place.is_file() else sorted(path for path in place.glob("[!.]*") if image_suffix(path))
        if len(images) > 1 or (not images and (slug in paths or not role.endswith("-mask"))):
            known = f" (inputs.json has the sockets {', '.join(sorted(paths))})" if paths else ""
            raise InputError(f"{place}: expected exactly one image ({', '.join(SUFFIXES)}) for the {role}; got "
                             f"{len(images)}{known}; correct the folder, or name its socket with --sockets {role}=SLUG")
        found[role] = path_inside(input_dir, images[0].relative_to(input_dir)) if images else None
    assert found["fixed"] is not None and found["moving"] is not None
    return SinglePair(found["fixed"], found["moving"], found["fixed-mask"], found["moving-mask"])


def _socket_paths(input_dir: Path) -> dict[str, str]:
    """Slug -> relative path, as ``inputs.json`` gives them; empty where there is no such file."""
    path = input_dir / "inputs.json"
    if not path.exists():
        return {}
    content = read_json(path)
    paths = {}
    for entry in content if isinstance(content, list) else [None]:
        # the platform called the same record "interface" and, since 2025, "socket"
        socket = (entry.get("interface") or entry.get("socket")) if isinstance(entry, dict) else None
        if not isinstance(socket, dict) or not all(isinstance(socket.get(key), str) for key in ("slug", "relative_path")):
            raise InputError(f"{path}: expected a list of sockets, each with interface.slug and interface.relative_path; got "
                             f"{str(entry if entry is not None else content)[:120]}; correct the file")
        paths[socket["slug"]] = socket["relative_path"]
    return paths
