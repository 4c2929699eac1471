"""Stages: what they note, and that memory running out becomes an error with advice."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from dinoreg.errors import RegistrationError
from dinoreg.stages import advance, stage, watched

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


def test_whoever_watches_sees_every_stage_from_its_beginning_to_its_end() -> None:
    seen: list[tuple[str, int, int]] = []
    with watched(lambda *step: seen.append(step)):
        with stage("read", {}):
            pass
        with stage("encode", {}):
            advance(1, 3, part=0, parts=2)
            advance(2, 3, part=1, parts=2)
    with stage("write", {}):
        advance(1, 2)
    assert seen == [("read", 0, 1), ("read", 1, 1), ("encode", 0, 1), ("encode", 1, 6), ("encode", 5, 6), ("encode", 6, 6)]


def test_an_exception_of_the_watcher_ends_the_run_and_nobody_watches_after() -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), watched(stop), stage("read", {}):
        pytest.fail("the stage must not begin")
    with stage("read", {}):
        pass
