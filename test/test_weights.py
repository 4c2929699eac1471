"""Checkpoints: verified before they are opened, strict in names, shapes and values, and every refusal says what to do."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
import safetensors.torch
import torch
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from dinoreg.errors import ConfigError, WeightsError
from dinoreg.vit import ARCHITECTURES, VitSpec, build_vit
from dinoreg.weights import HOME, MANIFEST, Encoder, load_encoder, random_encoder

FETCH = HOME / "fetch.py"
TINY = VitSpec(dim=32, depth=2, heads=2, registers=4)
FILE = "dinov2_tiny_reg4_pretrain.pth"


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small architecture beside the real ones, and no weights folder from outside."""
    monkeypatch.setitem(ARCHITECTURES, "tiny_reg4", TINY)
    monkeypatch.setitem(ARCHITECTURES, "tinyg", VitSpec(dim=32, depth=2, heads=2, swiglu=True))
    monkeypatch.delenv("DINOREG_WEIGHTS", raising=False)


def write_manifest(folder: Path, path: Path, *, arch: str = "tiny_reg4", hub_sha256: str | None = None,
                   url: str = "http://127.0.0.1:1/none") -> Path:
    """A manifest that describes the file at ``path`` as it is now."""
    entry = {"file": path.name, "url": url, "bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
             "hub": {"name": "dinov2-tiny", "sha256": hub_sha256}}
    manifest = folder / "manifest.json"
    manifest.write_text(json.dumps({"models": {arch: entry}}))
    return manifest


def state(arch: str = "tiny_reg4") -> dict[str, Tensor]:
    return dict(random_encoder(arch, 5).model.state_dict())


def saved(folder: Path, content: object) -> tuple[Path, Path]:
    """The content as an "official" file with a manifest that vouches for it."""
    path = folder / FILE
    torch.save(content, path)
    return path, write_manifest(folder, path)


def same(encoder: Encoder, expected: dict[str, Tensor]) -> bool:
    found = encoder.model.state_dict()
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_official_file_loads_once_its_hash_matches(tmp_path: Path) -> None:
    path, manifest = saved(tmp_path, state())
    encoder = load_encoder("tiny_reg4", tmp_path, manifest=manifest)
    assert same(encoder, state())
    assert encoder.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert "manifest" in encoder.source
    assert not encoder.model.training
    assert not any(parameter.requires_grad for parameter in encoder.model.parameters())


def test_vit_s_of_full_size_goes_through_the_same_door(tmp_path: Path) -> None:
    expected = state("vits14_reg4")
    path = tmp_path / "dinov2_vits14_reg4_pretrain.pth"
    torch.save(expected, path)
    assert same(load_encoder("vits14_reg4", tmp_path, manifest=write_manifest(tmp_path, path, arch="vits14_reg4")), expected)


class Bomb:
    """Unpickling it leaves a mark."""

    mark = ""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (os.mkdir, (Bomb.mark,))


@pytest.mark.parametrize("vouched", [False, True])
def test_pickle_with_code_is_refused_and_never_run(tmp_path: Path, vouched: bool) -> None:
    """Without the right hash it is not even opened; with it the loader still takes tensors only."""
    Bomb.mark = str(tmp_path / "mark")
    path = tmp_path / FILE
    torch.save(state(), path)
    manifest = write_manifest(tmp_path, path)
    size = path.stat().st_size
    path.write_bytes(pickle.dumps(Bomb(), protocol=2).ljust(size, b"\0"))  # of the right length, so that the hash has to catch it
    if vouched:
        manifest = write_manifest(tmp_path, path)
    with pytest.raises(WeightsError, match="plain tensors" if vouched else "sha256.*not opened"):
        load_encoder("tiny_reg4", tmp_path, manifest=manifest)
    assert not Path(Bomb.mark).exists()


def test_file_cut_short_is_refused_with_both_sizes(tmp_path: Path) -> None:
    path, manifest = saved(tmp_path, state())
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(WeightsError, match=f"{re.escape(str(path))}: expected {size} bytes, found {size - 1000}.*fetch.py"):
        load_encoder("tiny_reg4", tmp_path, manifest=manifest)


def test_one_flipped_bit_is_refused(tmp_path: Path) -> None:
    path, manifest = saved(tmp_path, state())
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(WeightsError, match="sha256"):
        load_encoder("tiny_reg4", tmp_path, manifest=manifest)


ABSENT = object()


@pytest.mark.parametrize(("name", "value", "complaint"), [
    ("blocks.1.ls2.gamma", ABSENT, "blocks.1.ls2.gamma is missing"),
    ("head.weight", torch.zeros(2), "head.weight is unknown"),
    ("norm.bias", torch.zeros(31), r"norm.bias has shape \(31,\) instead of \(32,\)"),
    ("norm.bias", torch.full((32,), float("nan")), "norm.bias has NaN"),
    ("norm.bias", torch.zeros(32, dtype=torch.int64), "norm.bias is torch.int64"),
    ("norm.bias", "zeros", "norm.bias is str"),
])
def test_content_that_does_not_match_is_refused_by_name(tmp_path: Path, name: str, value: object, complaint: str) -> None:
    content: dict[str, object] = {**state(), name: value}
    path, manifest = saved(tmp_path, {key: value for key, value in content.items() if value is not ABSENT})
    with pytest.raises(WeightsError, match=complaint) as caught:
        load_encoder("tiny_reg4", tmp_path, manifest=manifest)
    message = str(caught.value)
    assert str(path) in message and f"python3 weights/fetch.py tiny_reg4 --to {tmp_path}" in message


def test_content_that_is_no_dictionary_is_refused(tmp_path: Path) -> None:
    _, manifest = saved(tmp_path, [torch.zeros(2)])
    with pytest.raises(WeightsError, match="expected a dictionary of tensors, found list"):
        load_encoder("tiny_reg4", tmp_path, manifest=manifest)


def test_checkpoint_of_another_architecture_is_refused(tmp_path: Path) -> None:
    _, manifest = saved(tmp_path, state("tinyg"))
    with pytest.raises(WeightsError, match=r"tensors of encoder tiny_reg4, found a file that does not match .* and \d+ more"):
        load_encoder("tiny_reg4", tmp_path, manifest=manifest)


def test_half_precision_file_becomes_float32(tmp_path: Path) -> None:
    _, manifest = saved(tmp_path, {name: value.half() for name, value in state().items()})
    encoder = load_encoder("tiny_reg4", tmp_path, manifest=manifest)
    assert same(encoder, {name: value.half().float() for name, value in state().items()})


TO_HUB = (
    (r"^(cls_token|mask_token|register_tokens)$", r"embeddings.\1"),
    (r"^pos_embed$", "embeddings.position_embeddings"),
    (r"^patch_embed\.proj", "embeddings.patch_embeddings.projection"),
    (r"^norm\.", "layernorm."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.ls(\d)\.gamma", r".layer_scale\1.lambda1"),
    (r"\.w12\.", ".weights_in."),
    (r"\.w3\.", ".weights_out."),
    (r"^blocks\.", "encoder.layer."),
)


def hub_names(expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under the names of the files on the Hugging Face hub, as those files have them."""
    hub: dict[str, Tensor] = {}
    for name, value in expected.items():
        if ".attn.qkv." in name:
            block, kind = name.split(".")[1], name.rsplit(".", 1)[1]
            for part, piece in zip(("query", "key", "value"), value.chunk(3), strict=True):
                hub[f"encoder.layer.{block}.attention.attention.{part}.{kind}"] = piece.clone()
            continue
        for ours, theirs in TO_HUB:
            name = re.sub(ours, theirs, name)
        hub[name] = value.clone()
    return hub


@pytest.mark.parametrize("arch", ["tiny_reg4", "tinyg"])
@pytest.mark.parametrize("name", ["dinov2-tiny.safetensors", "model.safetensors"])
def test_hub_file_becomes_the_same_model_and_its_hash_is_recorded(tmp_path: Path, arch: str, name: str) -> None:
    expected = {key: torch.randn_like(value) for key, value in state(arch).items()}
    path = tmp_path / name
    safetensors.torch.save_file(hub_names(expected), path)
    encoder = load_encoder(arch, tmp_path, manifest=write_manifest(tmp_path, path, arch=arch))
    assert same(encoder, expected)
    assert encoder.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert "recorded" in encoder.source and "facebook/dinov2-tiny" in encoder.source


@pytest.mark.parametrize(("arch", "swiglu"), [("tiny_reg4", False), ("tinyg", True)])
def test_file_written_by_transformers_gives_its_tokens(tmp_path: Path, arch: str, swiglu: bool) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 518, "patch_size": 14}
    torch.manual_seed(0)
    theirs = Dinov2Model(Dinov2Config(use_swiglu_ffn=True, **sizes)) if swiglu else Dinov2WithRegistersModel(
        Dinov2WithRegistersConfig(num_register_tokens=4, **sizes))
    for parameter in theirs.parameters():
        parameter.data = torch.randn_like(parameter) / 4
    theirs.eval().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    ours = load_encoder(arch, tmp_path, manifest=write_manifest(tmp_path, path, arch=arch))
    pixels = torch.rand(1, 3, 518, 518)
    with torch.no_grad():
        expected = theirs(pixels).last_hidden_state[:, -37 * 37 :]
    # float32 rounding of sums of a few hundred products of order 1
    assert (ours.patch_tokens(pixels, 1).reshape(1, 37 * 37, 32) - expected).abs().max() < 2e-5


def test_hub_file_is_checked_where_the_manifest_has_a_hash(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(hub_names(state()), path)
    good = hashlib.sha256(path.read_bytes()).hexdigest()
    assert "manifest" in load_encoder("tiny_reg4", tmp_path, manifest=write_manifest(tmp_path, path, hub_sha256=good)).source
    with pytest.raises(WeightsError, match=f"expected sha256 {64 * '0'}.*found {good}"):
        load_encoder("tiny_reg4", tmp_path, manifest=write_manifest(tmp_path, path, hub_sha256=64 * "0"))


@pytest.mark.parametrize(("damage", "complaint"), [
    ("cut", "complete safetensors"),
    ("missing", "blocks.1.attn.qkv.bias is missing"),
    ("unknown", "pooler.dense.weight is unknown"),
    ("shape", "blocks.0.attn.qkv.weight is missing"),
    ("scalar", "blocks.0.attn.qkv.bias is missing"),
])
def test_damaged_hub_file_is_refused(tmp_path: Path, damage: str, complaint: str) -> None:
    path = tmp_path / "model.safetensors"
    content = hub_names(state())
    if damage == "missing":
        del content["encoder.layer.1.attention.attention.key.bias"]
    if damage == "unknown":
        content["pooler.dense.weight"] = torch.zeros(2)
    if damage == "shape":
        content["encoder.layer.0.attention.attention.key.weight"] = torch.zeros(32 * 32)
    if damage == "scalar":
        content |= {f"encoder.layer.0.attention.attention.{part}.bias": torch.tensor(1.0) for part in ("query", "key", "value")}
    safetensors.torch.save_file(content, path)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(WeightsError, match=complaint):
        load_encoder("tiny_reg4", tmp_path, manifest=write_manifest(tmp_path, path))


def test_missing_weights_name_the_file_the_places_and_the_command(tmp_path: Path) -> None:
    absent = tmp_path / "absent"
    with pytest.raises(WeightsError) as caught:
        load_encoder("vitl14_reg4", absent)
    message = str(caught.value)
    for part in ("dinov2_vitl14_reg4_pretrain.pth", "dinov2-with-registers-large.safetensors", f"{absent} (no such folder)",
                 f"python3 weights/fetch.py vitl14_reg4 --to {absent}"):
        assert part in message
    assert "\n" not in message


def test_places_are_searched_in_order_and_a_given_folder_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for number, folder in enumerate((first, second)):
        folder.mkdir()
        shifted = {key: value + number for key, value in state().items()}
        safetensors.torch.save_file(hub_names(shifted), folder / "model.safetensors")
    manifest = write_manifest(tmp_path, first / "model.safetensors")

    def class_token(folder: Path | None = None) -> float:
        difference = load_encoder("tiny_reg4", folder, manifest=manifest).model.cls_token - state()["cls_token"]
        return round(float(difference.mean()), 3)

    monkeypatch.setattr("dinoreg.weights.PLACES", (tmp_path / "absent", first, second))
    assert class_token() == 0
    assert class_token(second) == 1
    monkeypatch.setenv("DINOREG_WEIGHTS", str(second))
    assert class_token() == 1
    monkeypatch.setenv("DINOREG_WEIGHTS", str(tmp_path / "absent"))
    with pytest.raises(WeightsError, match="absent"):
        class_token()


def test_auto_takes_the_largest_architecture_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Size first, registers at equal size, whatever the order of the folders and the name of the file."""
    monkeypatch.setitem(ARCHITECTURES, "small", VitSpec(dim=32, depth=1, heads=2, registers=4))
    monkeypatch.setitem(ARCHITECTURES, "tiny", VitSpec(dim=32, depth=2, heads=2))
    first, second = tmp_path / "first", tmp_path / "second"
    monkeypatch.setattr("dinoreg.weights.PLACES", (tmp_path / "absent", first, second))
    entries = {}
    for folder, arch in ((first, "small"), (second, "tiny"), (second, "tiny_reg4")):
        folder.mkdir(exist_ok=True)
        path = folder / f"dinov2_{arch}_pretrain.pth"
        torch.save(state(arch), path)
        entries |= json.loads(write_manifest(tmp_path, path, arch=arch).read_text())["models"]
    manifest = tmp_path / "manifest.json"
    manifest.write_text(json.dumps({"models": entries}))
    for expected, folder in (("tiny_reg4", second), ("tiny", second), ("small", first)):
        encoder = load_encoder("auto", manifest=manifest)
        assert encoder.arch == expected and encoder.source.startswith(f"dinov2_{expected}_pretrain.pth")
        assert same(encoder, state(expected))
        assert load_encoder("auto", folder, manifest=manifest).arch == expected
        (folder / f"dinov2_{expected}_pretrain.pth").unlink()


@pytest.mark.parametrize("arch", ["tiny_reg4", "tinyg"])
def test_auto_knows_a_hub_file_by_its_shapes(tmp_path: Path, arch: str) -> None:
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(hub_names(state(arch)), path)
    encoder = load_encoder("auto", tmp_path, manifest=write_manifest(tmp_path, path, arch=arch))
    assert encoder.arch == arch and same(encoder, state(arch))


def test_auto_without_weights_names_files_places_and_the_command(tmp_path: Path) -> None:
    with pytest.raises(WeightsError) as caught:
        load_encoder("auto", tmp_path)
    message = str(caught.value)
    for part in ("dinov2_vitl14_reg4_pretrain.pth", "model.safetensors", str(tmp_path), f"fetch.py vitl14_reg4 --to {tmp_path}",
                 "vits14_reg4"):
        assert part in message
    assert "\n" not in message


@pytest.mark.parametrize("content", [
    {"weight": torch.zeros(2)}, None, {"embeddings.cls_token": torch.tensor(1.0)},
    {"embeddings.cls_token": torch.zeros(1, 1, 32), "embeddings.register_tokens": torch.zeros(4)}])
def test_auto_says_that_a_hub_file_is_none_it_knows(tmp_path: Path, content: dict[str, Tensor] | None) -> None:
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(content, path) if content else path.write_bytes(b"cut off")
    with pytest.raises(WeightsError, match=r"model\.safetensors.* is damaged, or no DINOv2 of a known architecture"):
        load_encoder("auto", tmp_path)


def test_manifest_covers_every_architecture_and_is_well_formed() -> None:
    models = json.loads(MANIFEST.read_text())["models"]
    assert set(models) == {arch for arch in ARCHITECTURES if not arch.startswith("tiny")}
    for arch, entry in models.items():
        assert entry["url"].endswith(f"/dinov2_{arch.removesuffix('_reg4')}/{entry['file']}") and entry["url"].startswith("https://")
        assert re.fullmatch("[0-9a-f]{64}", entry["sha256"])
        # 4 bytes a parameter and a container of at most 0.4 % around them
        size = 4 * sum(value.numel() for value in build_vit(arch, "meta").state_dict().values())
        assert 0 < entry["bytes"] - size < 0.004 * size
        assert ("with-registers" in entry["hub"]["name"]) == arch.endswith("_reg4")
    assert len({entry["sha256"] for entry in models.values()}) == len(models)


def test_broken_manifest_is_a_weights_error(tmp_path: Path) -> None:
    for text in ("", "[]", '{"models": {"tiny_reg4": {"file": "x"}}}'):
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(WeightsError, match=r"list of checkpoints.*restore"):
            load_encoder("tiny_reg4", tmp_path, manifest=tmp_path / "manifest.json")


def test_unknown_architecture_is_a_configuration_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="vitx14"):
        load_encoder("vitx14", tmp_path)


def test_random_encoder_is_repeatable_on_any_thread_count_and_says_what_it_is() -> None:
    threads = torch.get_num_threads()
    try:
        found = []
        for number in (1, 2):
            torch.set_num_threads(number)
            found.append(random_encoder("vits14_reg4", 3))
    finally:
        torch.set_num_threads(threads)
    assert same(found[0], dict(found[1].model.state_dict()))
    assert not same(random_encoder("vits14_reg4", 4), dict(found[0].model.state_dict()))
    assert found[0].sha256 is None
    assert found[0].source == "random weights, seed 3"
    assert "dino" not in found[0].source.lower()


# The fetch script, against a server on this machine.

CONTENT = bytes(range(256)) * 4000  # 1 MB


class Handler(BaseHTTPRequestHandler):
    """Serves CONTENT with ranges; what it does wrong is set per test."""

    mode: ClassVar[str] = "good"
    ranges: ClassVar[list[str | None]] = []

    def do_GET(self) -> None:
        Handler.ranges.append(self.headers.get("Range"))
        if Handler.mode == "missing":
            self.send_error(404)
            return
        if Handler.mode == "silent":
            time.sleep(20)
            return
        body = CONTENT if Handler.mode != "altered" else CONTENT[:-1] + b"!"
        start = int(self.headers["Range"].removeprefix("bytes=").rstrip("-")) if self.headers.get("Range") else 0
        if Handler.mode == "no ranges":
            start = 0
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        self.wfile.write(body[start : len(body) // 2] if Handler.mode == "breaks off" else body[start:])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.daemon_threads = True
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    Handler.mode, Handler.ranges = "good", []
    yield f"http://127.0.0.1:{httpd.server_address[1]}/{FILE}"
    httpd.shutdown()
    httpd.server_close()


def run_fetch(folder: Path, url: str, *options: str) -> subprocess.CompletedProcess[str]:
    (folder / "source").mkdir(exist_ok=True)
    source = folder / "source" / FILE
    source.write_bytes(CONTENT)
    manifest = write_manifest(folder, source, url=url)
    environment = {key: value for key, value in os.environ.items() if "proxy" not in key.lower()}
    command = [sys.executable, str(FETCH), "tiny_reg4", "--manifest", str(manifest), "--to", str(folder / "to"), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)


def test_fetch_puts_a_verified_file_in_place_and_does_it_once(tmp_path: Path, server: str) -> None:
    assert run_fetch(tmp_path, server).returncode == 0
    assert (tmp_path / "to" / FILE).read_bytes() == CONTENT
    assert [path.name for path in (tmp_path / "to").iterdir()] == [FILE]
    again = run_fetch(tmp_path, server)
    assert again.returncode == 0 and "already there" in again.stdout
    assert len(Handler.ranges) == 1


@pytest.mark.parametrize("mode", ["good", "no ranges"])
def test_fetch_goes_on_where_a_broken_transfer_ended(tmp_path: Path, server: str, mode: str) -> None:
    Handler.mode = "breaks off"
    first = run_fetch(tmp_path, server)
    assert first.returncode == 1 and len(first.stderr.splitlines()) == 1 and str(len(CONTENT) // 2) in first.stderr
    assert not (tmp_path / "to" / FILE).exists()
    Handler.mode = mode
    assert run_fetch(tmp_path, server).returncode == 0
    assert (tmp_path / "to" / FILE).read_bytes() == CONTENT
    assert Handler.ranges == [None, f"bytes={len(CONTENT) // 2}-"]


def test_fetch_replaces_a_damaged_file_only_by_a_verified_one(tmp_path: Path, server: str) -> None:
    (tmp_path / "to").mkdir()
    (tmp_path / "to" / FILE).write_bytes(b"damaged")
    Handler.mode = "altered"
    refused = run_fetch(tmp_path, server)
    assert refused.returncode == 1 and "sha256" in refused.stderr and len(refused.stderr.splitlines()) == 1
    assert (tmp_path / "to" / FILE).read_bytes() == b"damaged"
    Handler.mode = "good"
    assert run_fetch(tmp_path, server).returncode == 0
    assert (tmp_path / "to" / FILE).read_bytes() == CONTENT


def test_fetch_fails_with_one_line_where_the_server_has_no_such_file(tmp_path: Path, server: str) -> None:
    Handler.mode = "missing"
    result = run_fetch(tmp_path, server)
    assert result.returncode == 1 and len(result.stderr.splitlines()) == 1 and "404" in result.stderr


def test_fetch_waits_no_longer_than_it_is_told(tmp_path: Path, server: str) -> None:
    Handler.mode = "silent"
    start = time.monotonic()
    result = run_fetch(tmp_path, server, "--timeout", "1")
    assert result.returncode == 1 and len(result.stderr.splitlines()) == 1
    assert time.monotonic() - start < 15  # 1 s and the start of an interpreter on a busy machine; the server is silent for 20 s


def test_fetch_refuses_an_unknown_architecture(tmp_path: Path) -> None:
    result = subprocess.run([sys.executable, str(FETCH), "vitx14"], capture_output=True, text=True, timeout=60)
    assert result.returncode == 2 and "vitl14_reg4" in result.stderr


def test_checkpoint_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"anything")

    def refuse(*_arguments: object, **_settings: object) -> None:
        raise PermissionError(13, "Permission denied")  # what opening a file of mode 0600 of somebody else gives

    monkeypatch.setattr(safetensors, "safe_open", refuse)
    with pytest.raises(WeightsError, match=r"model\.safetensors: expected a readable file; got: Permission denied"):
        load_encoder("auto", tmp_path)
