"""Configurations: checked when made, whole in a report, and chosen by data set."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from dinoreg.config import (
    PRESETS,
    Config,
    DiscreteConfig,
    EncoderConfig,
    IntensityConfig,
    MindConfig,
    PcaConfig,
    PublishedConfig,
    QuirksConfig,
    RefineConfig,
    auto_preset,
    get_preset,
    modality,
)
from dinoreg.errors import ConfigError


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_comes_back_from_its_report(name: str) -> None:
    config = get_preset(name)
    assert config.preset == name
    assert Config.from_dict(config.to_dict()) == config
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_values_that_are_not_given_are_the_defaults() -> None:
    assert Config.from_dict({}) == Config()
    assert Config.from_dict({"refine": {"lncc": 2.0}}) == Config(refine=RefineConfig(lncc=2.0))


def test_whole_numbers_and_lists_of_json_mean_the_same_as_floats_and_tuples() -> None:
    found = Config.from_dict({"refine": {"levels": [[4, 10], [2, 5]], "rate": 1}, "intensity": {"ct_window": [-100, 200]}})
    assert found == Config(refine=RefineConfig(levels=((4.0, 10), (2.0, 5)), rate=1.0),
                           intensity=IntensityConfig(ct_window=(-100.0, 200.0)))


@pytest.mark.parametrize(("values", "message"), [
    ({"feature": "mind"}, r"config: unknown key feature; known are preset, "),
    ({"refine": {"lncc": 1.0, "lnnc": 1.0, "a": 0}}, r"config\.refine: unknown key a, lnnc"),
    ({"encoder": 5}, r"config\.encoder: expected a mapping of EncoderConfig; got int"),
    ({"encoder": None}, r"config\.encoder: expected a mapping"),
    ([("features", "mind")], r"config: expected a mapping of Config; got list"),
])
def test_unknown_keys_and_shapes_are_refused_by_name(values: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Config.from_dict(values)


@pytest.mark.parametrize("values", [
    {"features": 1}, {"features": None}, {"refine": {"rate": "fast"}}, {"refine": {"rate": True}}, {"refine": {"levels": 4}},
    {"refine": {"levels": [[4]]}}, {"refine": {"levels": [["a", "b"]]}}, {"refine": {"window": 7.5}}, {"mind": {"radius": 1.5}},
    {"encoder": {"crop": "no"}}, {"encoder": {"arch": 14}}, {"encoder": {"gap_mm": float("inf")}}, {"modalities": "CT"},
    {"modalities": ["CT"]}, {"intensity": {"ct_window": [1, 2, 3]}}, {"intensity": {"ct_window": 5}},
    {"discrete": {"levels": [[48.5, 2, 6]]}}, {"refine": {"levels": [[4, 10.5]]}}, {"published": {"rate": float("nan")}},
], ids=str)
def test_values_of_another_type_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Config.from_dict(values)


@pytest.mark.parametrize(("kind", "values"), [
    (IntensityConfig, {"ct_window": (0.0, 0.0)}), (IntensityConfig, {"cbct_window": (1.0, 0.0)}),
    (IntensityConfig, {"ct_window": (float("nan"), 0.0)}), (IntensityConfig, {"ct_window": (0.0, float("inf"))}),
    (IntensityConfig, {"percentiles": (-1.0, 50.0)}), (IntensityConfig, {"percentiles": (50.0, 101.0)}),
    (EncoderConfig, {"last_layers": 0}), (EncoderConfig, {"last_layers": 13}), (EncoderConfig, {"long_side_tokens": 3}),
    (EncoderConfig, {"long_side_tokens": 257}), (EncoderConfig, {"gap_mm": 0.0}), (EncoderConfig, {"axis": "oblique"}),
    (PcaConfig, {"components": 0}), (PcaConfig, {"components": 257}),
    (MindConfig, {"radius": -1}), (MindConfig, {"radius": 6}), (MindConfig, {"dilation": 0}), (MindConfig, {"dilation": 6}),
    (DiscreteConfig, {"levels": ()}), (DiscreteConfig, {"levels": ((7, 2, 6),)}),
    (DiscreteConfig, {"levels": ((48, 2, 6), (129, 2, 6))}), (DiscreteConfig, {"levels": ((48, 0, 6),)}),
    (DiscreteConfig, {"levels": ((48, 9, 6),)}), (DiscreteConfig, {"levels": ((48, 2, 0),)}),
    (DiscreteConfig, {"levels": ((48, 2, 13),)}), (DiscreteConfig, {"consistency_iterations": -1}),
    (DiscreteConfig, {"consistency_iterations": 101}),
    (RefineConfig, {"levels": ((0.4, 10),)}), (RefineConfig, {"levels": ((1.0, -1),)}), (RefineConfig, {"lncc": -0.1}),
    (RefineConfig, {"features": -0.1}), (RefineConfig, {"lncc": 0.0, "features": 0.0}),
    (RefineConfig, {"information": -0.1}), (RefineConfig, {"window": 1}),
    (RefineConfig, {"window": 6}), (RefineConfig, {"rate": 0.0}), (RefineConfig, {"rate": 1.1}),
    (RefineConfig, {"rate": float("nan")}),
    (RefineConfig, {"regularity": -1.0}), (RefineConfig, {"step_sigma": -1.0}), (RefineConfig, {"damping": 0.0}),
    (PublishedConfig, {"pool": 0}), (PublishedConfig, {"pool": 17}), (PublishedConfig, {"half_width": 0}),
    (PublishedConfig, {"half_width": 9}), (PublishedConfig, {"consistency_iterations": -1}),
    (PublishedConfig, {"iterations": -1}),
    (PublishedConfig, {"rate": 0.0}), (PublishedConfig, {"boxes": -1}), (PublishedConfig, {"box_width": 4}),
    (PublishedConfig, {"regularity": -1.0}),
    (QuirksConfig, {"token_grid": (3, 100)}), (QuirksConfig, {"token_grid": (100, 257)}), (QuirksConfig, {"token_grid": (10,)}),
    (QuirksConfig, {"gap_slices": -1}),
    (Config, {"features": "dino"}), (Config, {"modalities": ("CT", "PET")}), (Config, {"modalities": ("CT",)}),
    (Config, {"solver": "adam"}), (Config, {"quirks": QuirksConfig(folds_kept=True)}),
], ids=str)
def test_values_out_of_range_are_refused_when_they_are_made(kind: Any, values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="configuration: "):
        kind(**values)


@pytest.mark.parametrize(("kind", "values"), [
    (IntensityConfig, {"percentiles": (0.0, 100.0)}), (EncoderConfig, {"last_layers": 12, "long_side_tokens": 4}),
    (EncoderConfig, {"long_side_tokens": 256, "axis": "sagittal"}), (PcaConfig, {"components": 1}),
    (PcaConfig, {"components": 256}), (MindConfig, {"radius": 0, "dilation": 5}),
    (DiscreteConfig, {"levels": ((8, 1, 1), (128, 8, 12)), "consistency_iterations": 0}), (RefineConfig, {"levels": ()}),
    (RefineConfig, {"levels": ((0.5, 0),), "window": 3, "rate": 1.0, "regularity": 0.0, "step_sigma": 0.0}),
], ids=str)
def test_the_ends_of_the_ranges_are_allowed(kind: Any, values: dict[str, Any]) -> None:
    assert all(getattr(kind(**values), name) == value for name, value in values.items())


def test_a_configuration_cannot_be_changed_once_made() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().features = "mind"  # type: ignore[misc]
    assert hash(Config()) == hash(Config())


def test_an_unknown_preset_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(ConfigError, match=r"'thorax'; known are generic, .*thorax-cbct"):
        get_preset("thorax")


@pytest.mark.parametrize(("text", "expected"), [
    ("CT", "CT"), ("ct", "CT"), ("CT (FBCT)", "CT"), ("FBCT", "CT"), ("low-dose CT", "CT"), ("fan-beam CT", "CT"),
    ("CBCT", "CBCT"), ("Cone-beam CT", "CBCT"), ("CBCT_start", "CBCT"), ("cbct1", "CBCT"),
    ("MR", "MR"), ("MRI", "MR"), ("T1w", "MR"), ("t2", "MR"), ("MR-T1", "MR"), ("FLAIR", "MR"),
    ("", ""), ("PET", ""), ("US", ""), ("CTA2", ""), ("electron microscopy", ""), ("fact", ""),
])
def test_modality_is_read_from_a_data_sets_own_words(text: str, expected: str) -> None:
    assert modality(text) == expected


@pytest.mark.parametrize(("dataset", "modalities", "expected"), [
    ("ThoraxCBCT", ("CT", "CBCT"), "thorax-cbct"), ("OncoReg", (), "thorax-cbct"), ("", ("FBCT", "CBCT"), "thorax-cbct"),
    ("thoraxcbct_2023", ("", ""), "thorax-cbct"),
    ("AbdomenMRCT", ("MR", "CT"), "abdomen-mrct"), ("", ("CT", "T1w"), "abdomen-mrct"), ("Liver", ("CT", "MRI"), "abdomen-mrct"),
    ("OASIS", ("MR",), "brain-mr"), ("LUMIR", (), "brain-mr"), ("HippocampusMR", ("MR",), "brain-mr"), ("IXI", (), "brain-mr"),
    ("LungCT", ("CT",), "generic"), ("NLST", ("CT",), "generic"), ("AbdomenCTCT", ("CT", "CT"), "generic"),
    ("", (), "generic"), ("", ("MR", "MR"), "generic"), ("", ("PET", "CT"), "generic"),
])
def test_preset_is_chosen_by_name_and_modalities(dataset: str, modalities: tuple[str, ...], expected: str) -> None:
    assert auto_preset(dataset, modalities) == expected
    assert expected in PRESETS
