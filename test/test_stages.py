"""Stages: what they note, and that memory running out becomes an error with advice."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from dinoreg.errors import RegistrationError
from dinoreg.stages import stage

TOO_MUCH = 2**58  # bytes: more than any address space has


def test_stage_notes_seconds_and_peak_memory() -> None:
    stages: dict[str, dict[str, float]] = {}
    with stage("read", stages):
        held = np.ones(2**22)  # 32 MiB
    assert stages["read"]["seconds"] >= 0 and stages["read"]["peak_rss_mb"] > held.nbytes / 2**20


@pytest.mark.parametrize("take", [lambda: np.empty(TOO_MUCH, np.uint8), lambda: torch.empty(TOO_MUCH, dtype=torch.uint8)],
                         ids=["numpy", "torch"])
def test_memory_that_runs_out_is_an_error_with_advice(take) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(RegistrationError) as caught, stage("encode", {}):
        take()
    assert re.match(r"memory ran out in stage encode \(.*\); give the process more memory", str(caught.value))
    assert caught.value.exit_code == 6 and "\n" not in str(caught.value)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
                                   RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")])
def test_gpu_memory_that_runs_out_is_told_apart(error: Exception) -> None:
    with pytest.raises(RegistrationError, match=r"GPU memory ran out in stage refine .*--device cpu"), stage("refine", {}):
        raise error


def test_other_errors_pass() -> None:
    with pytest.raises(RuntimeError, match="shapes"), stage("refine", {}):
        raise RuntimeError("shapes do not match")
