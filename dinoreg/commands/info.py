"""``dinoreg info``: what is here, and what is not as it was when a report was written."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dinoreg.errors import ConfigError


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "info", help="versions, devices, weights and presets; or what differs from a report",
        description="List versions, devices, weights (each file's hash is checked) and presets.")
    parser.add_argument("--repeat", type=Path, metavar="REPORT", help="say instead what differs now from the run that a "
                        "report.json describes; status 0 if nothing does, 2 if something does")
    parser.add_argument("--weights", type=Path, metavar="DIR", help="folder with the encoder's weights")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Print the list, or the differences; these end it with an error."""
    if arguments.repeat is None:
        sys.stdout.write(_listing(arguments.weights))
        return
    found = differences(arguments.repeat, arguments.weights)
    sys.stdout.write("".join(f"{what}: {was} then, {now} now\n" for what, was, now in found))
    if found:
        raise ConfigError(f"{arguments.repeat}: {len(found)} thing{'' if len(found) == 1 else 's'} of that run "
                          "differ now; the same result is not to be expected")
    sys.stdout.write("nothing differs: the run can be repeated\n")


def _listing(weights: Path | None) -> str:
    import torch

    from dinoreg.config import PRESETS
    from dinoreg.report import environment
    from dinoreg.weights import found_checkpoints

    here = environment()
    lines = [f"dinoreg {here['dinoreg']}, Python {here['python']}, {here['platform']}",
             "packages: " + ", ".join(f"{name} {version}" for name, version in here["packages"].items()),
             f"device: cpu, {here['cpus']} processors, {torch.get_num_threads()} threads"]
    lines += [f"device: cuda, {torch.cuda.get_device_name(n)}" for n in range(torch.cuda.device_count())]
    found = found_checkpoints(weights)
    lines += [f"weights: {path}: {arch or 'unknown'}, {state}" for path, arch, _, state in found] or ["weights: none"]
    lines += [f"preset {name}: features {preset.features}, modalities {' and '.join(kind or 'any' for kind in preset.modalities)}"
              for name, preset in PRESETS.items()]
    return "\n".join(lines) + "\n"


def differences(report: Path, weights: Path | None = None) -> list[tuple[str, str, str]]:
    """What is not as it was when a report was written.

    Args:
        report: ``report.json`` of any command or contract.
        weights: folder to look for the encoder's checkpoint in; the usual places if None.

    Returns:
        (what, then, now) of each version, value of the configuration, hash of weights, device and number of threads that differs.

    Raises:
        InputError: if the file is no report.
        ConfigError: if its configuration or preset is not known to this version.
    """
    import torch

    from dinoreg.config import Config, get_preset
    from dinoreg.errors import InputError
    from dinoreg.io import read_json
    from dinoreg.report import environment
    from dinoreg.weights import found_checkpoints

    content = read_json(report)
    try:
        config = Config.from_dict(content["config"])
        info: dict[str, Any] = next((pair["info"] for pair in content["pairs"] if "info" in pair), {})
        then = _versions(content["environment"]) | _flat("config", content["config"])
        then |= {name: info[name] for name in ("device", "threads") if name in info}
        if info.get("encoder_sha256"):
            then["weights"] = info["encoder_sha256"]
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{report}: expected a report.json of dinoreg; got something else ({type(error).__name__}: {error}); "
                         "name the report of a run") from error
    now = _versions(environment()) | _flat("config", get_preset(config.preset).to_dict() | {"features": config.features})
    if "device" in then:
        now |= {"device": then["device"] if torch.cuda.is_available() else "cpu", "threads": torch.get_num_threads()}
    if "weights" in then:
        hashes = [sha256 for _, _, sha256, _ in found_checkpoints(weights)]
        now["weights"] = then["weights"] if then["weights"] in hashes else ", ".join(hashes) or "none"
    return [(what, str(then.get(what, "nothing")), str(now.get(what, "nothing"))) for what in dict.fromkeys([*then, *now])
            if then.get(what) != now.get(what)]


def _versions(environment: Mapping[str, Any]) -> dict[str, Any]:
    return {"dinoreg": environment["dinoreg"], "code": environment["code"], "python": environment["python"],
            "platform": environment["platform"], "processors": environment["cpus"], **environment["packages"]}


def _flat(name: str, value: Any) -> dict[str, Any]:
    """Nested values under dotted names; tuples as lists, as JSON has them."""
    if isinstance(value, dict):
        return {key: found for part, inner in value.items() for key, found in _flat(f"{name}.{part}", inner).items()}
    return {name: _listed(value)}


def _listed(value: Any) -> Any:
    return [_listed(item) for item in value] if isinstance(value, list | tuple) else value
