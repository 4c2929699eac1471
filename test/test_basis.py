"""Principal components for all pairs: fitted once, kept with their provenance, refused where they do not belong."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_encoder import PatchMeans
from small_pair import QUICK, small_pair

from dinoreg import registration
from dinoreg.__main__ import main
from dinoreg.basis import FixedBasis, load_basis, save_basis, token_provenance
from dinoreg.cache import TokenCache
from dinoreg.config import PRESETS, EncoderConfig, PcaConfig
from dinoreg.errors import InputError
from dinoreg.io import write_volume
from dinoreg.pca import Basis, fit_basis
from dinoreg.registration import Registrar

CONFIG = dataclasses.replace(QUICK, features="dinov2", pca=PcaConfig(components=1), encoder=EncoderConfig(long_side_tokens=8))
BASIS = Basis(torch.linalg.qr(torch.rand(5, 5, dtype=torch.float64))[0][:, :2], torch.rand(5, dtype=torch.float64),
              torch.tensor([3.0, 1.0], dtype=torch.float64), 4.5)


def test_a_basis_comes_back_to_the_bit_with_its_provenance(tmp_path: Path) -> None:
    save_basis(tmp_path / "a.safetensors", BASIS, {"encoder": "x", "volumes": [1, 2]})
    found = load_basis(tmp_path / "a.safetensors")
    assert torch.equal(found.basis.components, BASIS.components) and torch.equal(found.basis.mean, BASIS.mean)
    assert torch.equal(found.basis.variance, BASIS.variance) and found.basis.total_variance == 4.5
    assert found.provenance == {"encoder": "x", "volumes": [1, 2]} and len(found.sha256) == 64


@pytest.mark.parametrize("spoil", [lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:100]),
                                   lambda path: path.write_bytes(b"")])
def test_what_is_no_basis_is_refused(tmp_path: Path, spoil) -> None:  # type: ignore[no-untyped-def]
    save_basis(tmp_path / "a.safetensors", BASIS, {})
    spoil(tmp_path / "a.safetensors")
    with pytest.raises(InputError, match="expected a basis as `dinoreg basis` writes it"):
        load_basis(tmp_path / "a.safetensors")


def test_the_components_of_a_pair_as_a_basis_give_the_field_of_the_pair_and_smaller_entries(tmp_path: Path) -> None:
    fixed, moving = small_pair()
    caches = [TokenCache(tmp_path / name, 2**24) for name in ("tokens", "features")]
    own = Registrar(CONFIG, device="cpu", encoder=PatchMeans(), cache=caches[0])
    entries = [own.encode(volume, None, "")[0] for volume in (fixed, moving)]
    moments = entries[0].moments + entries[1].moments  # type: ignore[operator]
    basis = FixedBasis(fit_basis(moments, 1), "1" * 64, token_provenance(CONFIG, own.engine))
    with_basis = Registrar(CONFIG, device="cpu", encoder=PatchMeans(), cache=caches[1], basis=basis)
    expected, found = (registrar.register(fixed, moving) for registrar in (own, with_basis))
    assert np.array_equal(expected.disp, found.disp)
    again = with_basis.register(fixed, moving)
    assert again.info["volumes_encoded"] == 0 and np.array_equal(again.disp, found.disp)
    assert with_basis.engine["basis_sha256"] == basis.sha256 and own.engine["basis_sha256"] is None


@pytest.mark.parametrize("change", ["encoder", "weights", "slices", "components"])
def test_a_basis_of_other_tokens_is_refused(change: str) -> None:
    engine = Registrar(CONFIG, device="cpu", encoder=PatchMeans()).engine
    basis = FixedBasis(BASIS, "1" * 64, token_provenance(CONFIG, engine))
    encoder, config = PatchMeans(), CONFIG
    if change in ("encoder", "weights"):
        encoder = PatchMeans(arch="other") if change == "encoder" else PatchMeans(sha256="2")
    elif change == "slices":
        config = dataclasses.replace(CONFIG, encoder=EncoderConfig(long_side_tokens=9))
    else:
        config = dataclasses.replace(CONFIG, pca=PcaConfig(components=2))
    with pytest.raises(InputError, match="expected one that was fitted with"):
        Registrar(config, device="cpu", encoder=encoder, basis=basis)


def test_the_command_fits_each_image_of_a_list_once_and_register_takes_it(tmp_path: Path,
                                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = PatchMeans()
    monkeypatch.setitem(PRESETS, "generic", CONFIG)
    monkeypatch.setattr(registration, "load_encoder", lambda *_, **__: encoder)
    fixed, moving = small_pair()
    for name, volume in (("f", fixed), ("m", moving), ("n", moving)):
        write_volume(tmp_path / f"{name}.nii.gz", volume)
    (tmp_path / "pairs.csv").write_text("fixed,moving\nf.nii.gz,m.nii.gz\nf.nii.gz,n.nii.gz\n")
    pairs, file = ["--pairs", str(tmp_path / "pairs.csv")], str(tmp_path / "b.safetensors")
    assert main(["basis", *pairs, "-o", file, "--cache", str(tmp_path / "cache")]) == 0
    found = load_basis(Path(file))
    assert [Path(volume["file"]).name for volume in found.provenance["volumes"]] == ["f.nii.gz", "m.nii.gz", "n.nii.gz"]
    assert found.provenance["encoder"] == "patch means, no weights" and found.provenance["tokens"] > 100
    assert len(list((tmp_path / "cache").iterdir())) == 2  # m and n are the same image
    images = len(encoder.images)
    assert main(["basis", *pairs, "-o", file, "--cache", str(tmp_path / "cache")]) == 0
    assert len(encoder.images) == images
    assert main(["basis", *pairs, "-o", str(tmp_path / "b.pt")]) == 2
    assert main(["basis", *pairs, "-o", file, "--preset", "published"]) == 2
    (tmp_path / "m.nii.gz").unlink()
    assert main(["basis", *pairs, "-o", file]) == 3
