"""Principal components that are fitted once, on a cohort, and kept in a file with their provenance."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from dinoreg.config import Config
from dinoreg.errors import InputError
from dinoreg.io import atomic_write
from dinoreg.pca import Basis

TENSORS = ("components", "mean", "variance", "total_variance")


@dataclass(frozen=True, eq=False)
class FixedBasis:
    """Components for many pairs.

    Attributes:
        basis: the components.
        sha256: of the file.
        provenance: encoder and its weights, configuration, volumes (file and sha256) and versions it was fitted with.
    """

    basis: Basis
    sha256: str
    provenance: Mapping[str, Any]

    def check(self, expected: Mapping[str, Any]) -> None:
        """See that the basis is one for the tokens of a run.

        Args:
            expected: what its provenance has to say: see :func:`token_provenance`.

        Raises:
            InputError: it was fitted with another encoder, other weights or other slices.
        """
        for name, value in expected.items():
            if self.provenance.get(name) != value:
                raise InputError(f"basis: expected one that was fitted with {name} {value!r}; got {self.provenance.get(name)!r}; "
                                 "fit one with `dinoreg basis` and the options of this run")


def token_provenance(config: Config, engine: Mapping[str, Any]) -> dict[str, Any]:
    """What has to be the same where a basis is fitted and where it is used.

    Args:
        config: of the registration.
        engine: see :attr:`dinoreg.registration.Registrar.engine`.
    """
    return {"encoder": engine["encoder"], "encoder_sha256": engine["encoder_sha256"], "slices": asdict(config.encoder),
            "components": config.pca.components}


def save_basis(path: Path, basis: Basis, provenance: Mapping[str, Any]) -> None:
    """Write a basis. Raises OutputError."""
    tensors = {"components": basis.components.contiguous(), "mean": basis.mean, "variance": basis.variance,
               "total_variance": torch.tensor(basis.total_variance, dtype=torch.float64)}
    with atomic_write(path) as temporary:
        temporary.write_bytes(safetensors.torch.save(tensors, {"provenance": json.dumps(provenance, sort_keys=True)}))


def load_basis(path: Path) -> FixedBasis:
    """Read a basis.

    Raises:
        InputError: no such file, or no basis.
    """
    try:
        content = path.read_bytes()
        tensors = safetensors.torch.load(content)
        components, mean, variance, total = (tensors[name].double() for name in TENSORS)
        size = int.from_bytes(content[:8], "little")
        provenance = json.loads(json.loads(content[8 : 8 + size])["__metadata__"]["provenance"])
        if components.ndim != 2 or mean.shape != components.shape[:1] or variance.shape != components.shape[1:]:
            raise ValueError(f"components of shape {tuple(components.shape)}, mean of shape {tuple(mean.shape)}")
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise InputError(f"{path}: expected a basis as `dinoreg basis` writes it; got: {error}; make it again") from error
    return FixedBasis(Basis(components, mean, variance, float(total)), hashlib.sha256(content).hexdigest(), provenance)
