"""The page of a pair: complete, self-contained, safe with whatever a name or a message holds."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from scipy import ndimage

from dinoreg import htmlreport
from dinoreg.config import Config
from dinoreg.errors import InputError, OutputError
from dinoreg.htmlreport import write_html_report
from dinoreg.result import Registration
from dinoreg.volume import Volume

SHAPE = (24, 20, 16)
AFFINE = np.array([[-2.0, 0, 0, 20], [0, -3.0, 0, 25], [0, 0, 4.0, -30], [0, 0, 0, 1]])
HOSTILE = '<script>alert("x")</script>&amp;\'"<img src=http://example.invalid/a.png onerror=alert(1)>'


def pair(folds: bool = False) -> tuple[Volume, Volume, Registration]:
    rng = np.random.default_rng(0)
    grid = np.indices(SHAPE)
    image = 500 * (sum((g - n / 2) ** 2 / (n / 2.5) ** 2 for g, n in zip(grid, SHAPE, strict=True)) < 1).astype(np.float32)
    image += ndimage.gaussian_filter(rng.standard_normal(SHAPE), 2).astype(np.float32) * 400
    disp = np.stack([ndimage.gaussian_filter(rng.standard_normal(SHAPE), 3) * 6 for _ in range(3)]).astype(np.float32)
    if folds:
        disp[0, 12] += 3.0
    fixed = Volume(image, AFFINE)
    stages = {"prepare": {"seconds": 1.25, "peak_rss_mb": 300.0}}
    return fixed, Volume(np.roll(image, 1, axis=0), AFFINE), Registration(disp, AFFINE, stages)


def write(path: Path, folds: bool = False, found: dict[str, object] | None = None, **options: object) -> str:
    """The page of the pair, with what a result may hold besides and with options."""
    fixed, moving, result = pair(folds)
    result = replace(result, **(found or {}))  # type: ignore[arg-type]
    write_html_report(path, fixed, moving, result.warp(moving), result, **{"title": "A pair", **options})  # type: ignore[arg-type]
    return path.read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small pictures: the page is the same."""
    monkeypatch.setattr(htmlreport, "_DPI", 40)


class Elements(HTMLParser):
    """All start tags with their attributes, the text of the page, and whether tags are closed in order."""

    VOID = ("meta", "img", "br")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.open = "", list[str]()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data


def pictures(page: Elements) -> list[dict[str, str | None]]:
    return [attributes for tag, attributes in page.tags if tag == "img"]


def test_every_picture_is_in_the_page_has_its_size_and_says_what_it_shows(tmp_path: Path) -> None:
    page = Elements(write(tmp_path / "report.html"))
    assert page.open == []
    found = pictures(page)
    assert len(found) == 3 * (4 + 2)  # planes; images, and maps of the field
    for image in found:
        kind, _, data = str(image["src"]).partition(",")
        assert kind == "data:image/jpeg;base64"
        pixels = imread(io.BytesIO(base64.b64decode(data, validate=True)), format="jpeg")
        assert abs(pixels.shape[1] - int(str(image["width"]))) <= 1  # matplotlib rounds down, the page to nearest
        assert abs(pixels.shape[0] - int(str(image["height"]))) <= 1
        assert pixels.std() > 5  # of 255: something is drawn
        assert re.match("(axial|coronal|sagittal) plane: ", str(image["alt"]))


def test_nothing_is_loaded_and_nothing_runs(tmp_path: Path) -> None:
    page = Elements(write(tmp_path / "report.html"))
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on") or name in ("href", "srcset", "action")]
    policy = next(a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert "url(" not in (tmp_path / "report.html").read_text() and "@import" not in (tmp_path / "report.html").read_text()


def test_names_and_messages_are_text_whatever_they_hold(tmp_path: Path) -> None:
    plain, hostile = (
        Elements(write(tmp_path / "report.html", found={"info": {"encoder": text}, "warnings": [text, text]}, title=text,
                       names=(text, text), scores={text: (text, text)}, config={"preset": text}))
        for text in ("plain", HOSTILE))
    assert [tag for tag, _ in hostile.tags] == [tag for tag, _ in plain.tags]
    # twice the title; two names; a score's name and values, above and in the table; two warnings. JSON escapes the quotes of the
    # other two.
    assert hostile.text.count(HOSTILE) == 2 + 2 + 6 + 2
    assert hostile.text.count("<script>alert(") == 2 + 2 + 6 + 2 + 2


def test_names_that_are_no_unicode_are_written(tmp_path: Path) -> None:
    name = b"caf\xe9.nii".decode("utf-8", "surrogateescape")  # as a file system gives it
    assert "caf" in write(tmp_path / "report.html", names=(name, name))


def test_folds_and_warnings_come_first_and_in_words(tmp_path: Path) -> None:
    good = write(tmp_path / "good.html")
    assert "The field folds nowhere." in good and "There are no warnings." in good and 'class="warning"' not in good
    bad = write(tmp_path / "bad.html", folds=True, found={"warnings": ["little overlap", "at the edge"]})
    assert "The field folds in" in bad and "folds nowhere" not in bad and "no warnings" not in bad
    assert bad.index("Little overlap") < bad.index("At the edge") < bad.index("The field folds in") < bad.index("<img")


def test_confidence_and_colours_are_shown_where_there_are_any(tmp_path: Path) -> None:
    confidence = np.linspace(0, 1, np.prod(SHAPE), dtype=np.float32).reshape(SHAPE)
    colours = np.random.default_rng(0).integers(0, 255, (2, 6, 5, 4, 3), dtype=np.uint8)
    info = {"encoder": "vits14, random weights"}
    page = write(tmp_path / "report.html", found={"confidence": confidence, "colours": colours, "info": info})
    assert len(pictures(Elements(page))) == 3 * (4 + 3 + 2)
    assert "What the encoder saw" in page and "The encoder is vits14, random weights." in page and "<b>Confidence</b>" in page


def test_configuration_headers_and_numbers_are_there(tmp_path: Path) -> None:
    page = Elements(write(tmp_path / "report.html", config=Config(features="mind").to_dict(), names=("a.nii.gz", "b.mha"),
                          scores={"Landmarks": ("8.5 mm", "1.1 mm")})).text
    for text in ('"features": "mind"', "a.nii.gz", "b.mha", "24 x 20 x 16", "2 x 3 x 4 mm", "LPS", "8.5 mm", "1.1 mm", "SDlogJ",
                 "1.2 s", "300 MiB"):
        assert text in page, text


def test_images_of_other_grids_and_orders_are_drawn(tmp_path: Path) -> None:
    fixed, moving, result = pair()
    far = Volume(moving.array[2:, :, ::-1].transpose(2, 0, 1).astype(np.int16), np.diag([4.0, 2, 3, 1]))
    write_html_report(tmp_path / "report.html", fixed, far, result.warp(far), result, title="")
    assert len(pictures(Elements((tmp_path / "report.html").read_text()))) == 18


def test_the_same_pair_gives_the_same_bytes(tmp_path: Path) -> None:
    assert write(tmp_path / "a.html") == write(tmp_path / "b.html")


def test_a_page_that_cannot_be_drawn_or_written_leaves_nothing(tmp_path: Path) -> None:
    fixed, moving, result = pair()
    with pytest.raises(InputError, match="shape"):
        write_html_report(tmp_path / "report.html", Volume(fixed.array[1:], AFFINE), moving, moving, result, title="")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        write_html_report(tmp_path / "file" / "report.html", fixed, moving, moving, result, title="")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
