"""``dinoreg basis``: principal components of the tokens of a whole list, for all of its pairs."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from dinoreg.errors import ConfigError, InputError

log = logging.getLogger(__name__)


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "basis", help="principal components for all pairs of a list",
        description="Fit the principal components of the DINOv2 tokens of all images of a list, for `register --basis`. The file "
                    "says what they were fitted with, and on which images.")
    parser.add_argument("--pairs", type=Path, required=True, metavar="CSV", help="as for `register`; each image counts once")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="a .safetensors file")
    parser.add_argument("--preset", default="auto", help="auto (default: by the modalities), or a name that `dinoreg info` lists")
    parser.add_argument("--modalities", default=",", metavar="FIXED,MOVING", help="CT, CBCT, MR or nothing (unknown) each: CT,MR")
    parser.add_argument("--weights", type=Path, metavar="DIR", help="folder with the encoder's weights")
    parser.add_argument("--device", default="auto", help="auto (default), cpu or cuda")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads; all by default")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="keep what DINOv2 sees of each image there")
    parser.add_argument("--cache-size", type=float, default=50.0, metavar="GIB", help="how large it may grow (default: 50)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Encode every image, add up the moments, write the basis."""
    from dinoreg.api import chosen_config
    from dinoreg.basis import save_basis, token_provenance
    from dinoreg.cache import TokenCache
    from dinoreg.cohort import read_pairs
    from dinoreg.io import check_writable, read_volume
    from dinoreg.pca import fit_basis
    from dinoreg.progress import counted
    from dinoreg.registration import Registrar
    from dinoreg.report import environment, file_record

    kinds = arguments.modalities.split(",")
    config = chosen_config(arguments.preset, None, kinds)
    if config.solver == "published" or "dinov2" not in config.features:
        raise ConfigError(f"preset {config.preset}: has no tokens of single images; take another one")
    if arguments.output.suffix != ".safetensors":
        raise ConfigError(f"{arguments.output}: expected a name that ends in .safetensors")
    images = {(arguments.pairs.parent / row[side], arguments.pairs.parent / row[f"{side}_mask"] if row[f"{side}_mask"] else None,
               kinds[number] or config.modalities[number]): None
              for row in read_pairs(arguments.pairs) for number, side in enumerate(("fixed", "moving"))}
    check_writable(arguments.output.parent)
    cache = TokenCache(arguments.cache, int(arguments.cache_size * 2**30)) if arguments.cache else None
    registrar = Registrar(config, weights=arguments.weights, device=arguments.device, threads=arguments.threads, cache=cache)
    moments, volumes = None, []
    with counted(len(images), "image") as tell:
        for path, mask, kind in images:
            try:
                encoded, _ = registrar.encode(read_volume(path), read_volume(mask) if mask else None, kind)
            except InputError as error:
                raise InputError(f"{path}: {error}" if str(path) not in str(error) else str(error)) from error
            assert encoded.moments is not None  # there is no basis yet
            moments = encoded.moments if moments is None else moments + encoded.moments
            volumes.append(file_record(path, None))
            tell(path.name, False)
    assert moments is not None  # a list has pairs
    basis = fit_basis(moments, config.pca.components)
    save_basis(arguments.output, basis, {**token_provenance(config, registrar.engine), "tokens": moments.count,
                                         "config": config.to_dict(), "volumes": volumes, "environment": environment()})
    log.info("%s: %d components of %d images hold %.1f %% of the variance", arguments.output, config.pca.components, len(volumes),
             100 * float(basis.variance.sum()) / basis.total_variance)
