"""The compiled loops: each gives what its torch form gives in double precision, to the bit the same on any number of threads."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dinoreg import compiled
from dinoreg.convex import FeatureVolume, candidates, cost_volume, coupled_convex
from dinoreg.grid import apply_axes, area_matrix, box_matrix, gaussian_matrix, linear_matrix, shape3, warp, warp_slope
from dinoreg.refine import LNCC, FeatureSSD, MutualInformation, refine

SHAPES = [(13, 9, 21), (5, 1, 17), (1, 6, 1)]
ROUNDING = 2e-6  # of the largest value: float32 sums of some ten products


@pytest.fixture(autouse=True)
def threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(compiled, "SMALL", 0)  # so that small volumes are split among threads as well
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def smooth(*shape: int, seed: int = 0, sigma: float = 1.5) -> Tensor:
    noise = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return apply_axes(noise, [gaussian_matrix(n, sigma) for n in shape[-3:]])


def field(shape: tuple[int, ...], size: float = 2.5) -> Tensor:
    """Displacements, some of them beyond the border. Samples stay off the cells' centres, where the slope jumps."""
    disp = smooth(3, *shape, seed=7, sigma=3.0)
    disp = disp * (size / disp.abs().max())
    near = (disp - disp.round()).abs() < 0.02
    return torch.where(near, disp + 0.05, disp)


def assert_close(found: Tensor, expected: Tensor, tolerance: float = ROUNDING) -> None:
    assert found.dtype == torch.float32 and expected.dtype == torch.float64
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance * max(float(expected.abs().max()), 1e-6))


def volume(values: Tensor) -> FeatureVolume:
    return FeatureVolume(values, smooth(*values.shape[1:], seed=5).sigmoid().to(values))


def data_terms(shape: tuple[int, ...], kind: type[Tensor] | torch.dtype) -> dict[str, object]:
    f, m = ((0.5 + 0.15 * smooth(*shape, seed=seed, sigma=1.0)).clamp(0, 1).to(kind) for seed in (1, 2))
    wf, wm = (smooth(*shape, seed=seed).sigmoid().to(kind) for seed in (3, 4))
    one, two = (smooth(11, *shape, seed=seed).to(kind) for seed in (5, 6))
    return {"ssd": FeatureSSD(volume(one), volume(two)), "lncc": LNCC(f, m, wf, wm, 5),
            "information": MutualInformation(f, m, wf, wm)}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["gauss", "box", "coarser", "finer", "mixed"])
def test_matrices_along_the_axes(kind: str, shape: tuple[int, int, int]) -> None:
    x = smooth(2, *shape, sigma=0.5)
    boxes, finer = [box_matrix(n, 5) for n in shape], [linear_matrix(n, 2 * n + 1) for n in shape]
    matrices = {"gauss": [gaussian_matrix(n, 1.3) for n in shape], "box": [b.T.contiguous() for b in boxes],
                "coarser": [area_matrix(n, -(-n // 2)) for n in shape], "finer": finer, "mixed": [boxes[0], None, finer[2]]}[kind]
    assert_close(apply_axes(x, matrices), apply_axes(x.double(), matrices))


def test_full_matrices_have_no_band_to_gain_by() -> None:
    x, matrices = smooth(2, 6, 5, 7), [torch.randn(n, n, generator=torch.Generator().manual_seed(n)) for n in (6, 5, 7)]
    assert_close(apply_axes(x, matrices), apply_axes(x.double(), matrices))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("lattice", [None, (7, 8, 9)])
def test_samples_and_their_slopes(shape: tuple[int, int, int], lattice: tuple[int, int, int] | None) -> None:
    x, disp = smooth(3, *shape), field(lattice or shape)
    upstream = smooth(1, *shape3(disp), seed=2)
    # float32 places of up to 20 cells are known to 2e-6 of a cell
    assert_close(warp(x, disp), warp(x.double(), disp.double()), 1e-5)
    assert_close(warp_slope(x[:1], disp, upstream), warp_slope(x[:1].double(), disp.double(), upstream.double()), 1e-5)


def test_no_cell_is_read_where_a_field_is_not_finite() -> None:
    x, disp = smooth(2, 6, 7, 8), torch.zeros(3, 6, 7, 8)
    disp[0, 0, 0, 0], disp[1, 1, 1, 1], disp[2, 2, 2, 2] = torch.nan, torch.inf, -torch.inf
    found = warp(x, disp)  # would end the process
    assert torch.equal(found[:, 0, 0, 0], x[:, 0, 0, 0]) and torch.equal(found[:, 1, 1, 1], x[:, 1, 6, 1])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["ssd", "lncc", "information"])
def test_data_terms(name: str, shape: tuple[int, int, int]) -> None:
    disp = field(shape)
    single, double = (data_terms(shape, kind)[name].gradient(disp.to(kind)) for kind in (torch.float32, torch.float64))
    # LNCC divides by variances of 1e-5 and more, which float32 squares of up to 1 give to 1e-7
    tolerance = {"ssd": 1e-5, "lncc": 2e-2, "information": 1e-4}[name]
    assert float(single[0]) == pytest.approx(float(double[0]), rel=max(tolerance, 1e-4), abs=1e-7)
    if float(double[1].abs().max()) > 1e-6:
        assert_close(single[1], double[1], tolerance)


class Given:
    """A data term that pulls towards a field."""

    def __init__(self, target: Tensor) -> None:
        self.target = target

    def gradient(self, disp: Tensor) -> tuple[Tensor, Tensor]:
        return (disp - self.target).square().mean(), disp - self.target


@pytest.mark.parametrize("shape", SHAPES)
def test_steps_of_adam(shape: tuple[int, int, int]) -> None:
    found, expected = (refine(Given(field(shape).to(kind)), torch.zeros(3, *shape, dtype=kind), (1.0, 2.5, 1.5), 7, rate=0.25,
                              regularity=0.5, step_sigma=1.0, damping=0.01)[0] for kind in (torch.float32, torch.float64))
    assert_close(found, expected, 1e-5)


@pytest.mark.parametrize(("shape", "coarse"), [((13, 9, 21), (6, 5, 7)), ((9, 8, 10), (9, 8, 10)), ((3, 1, 12), (2, 1, 12))])
def test_cost_of_every_candidate_and_its_cheapest(shape: tuple[int, int, int], coarse: tuple[int, int, int]) -> None:
    pair = [volume(smooth(6, *shape, seed=seed, sigma=0.7)) for seed in (5, 6)]
    doubles = [FeatureVolume(x.features.double(), x.weight.double()) for x in pair]
    found, expected = cost_volume(*pair, 2, coarse), cost_volume(*doubles, 2, coarse)
    assert_close(found, expected, 1e-5)
    steps = candidates(2) * torch.tensor([b / a for a, b in zip(shape, coarse, strict=True)])
    assert_close(coupled_convex(found, steps), coupled_convex(expected, steps.double()), 1e-3)


def test_the_first_of_equal_candidates_is_taken() -> None:
    costs = torch.ones(27, 700)
    costs[[4, 20], ::2] = 0
    assert compiled.cheapest(costs, torch.zeros(3, 3, 700)).tolist() == [4, 0] * 350


def results(shape: tuple[int, int, int]) -> list[Tensor]:
    """Of every loop."""
    disp = field(shape)
    out = [warp(smooth(3, *shape), disp), warp_slope(smooth(1, *shape), disp, smooth(1, *shape, seed=2)),
           apply_axes(smooth(2, *shape), [box_matrix(n, 5) for n in shape])]
    cost = cost_volume(volume(smooth(5, *shape)), volume(smooth(5, *shape, seed=1)), 2, (9, 8, 7))
    out += [cost, coupled_convex(cost, candidates(2))]
    for term in data_terms(shape, torch.float32).values():
        out += refine(term, disp, (1.0, 1.5, 1.0), 3, rate=0.25, regularity=0.5, step_sigma=1.0, damping=0.01)[:1]
        out += term.gradient(disp)
    return out


def test_any_number_of_threads_gives_the_same_bits() -> None:
    shape, found = (23, 18, 21), []
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        found.append(results(shape))
    for one, *others in zip(*found, strict=True):
        assert all(torch.equal(one, other) for other in others)


def test_an_error_in_a_thread_is_raised() -> None:
    def fail(low: int, high: int) -> None:
        raise ValueError(f"{low}")

    for number in (1, 2):
        torch.set_num_threads(number)
        with pytest.raises(ValueError, match="0"):
            compiled.run(fail, 10, 10)


def test_threads_work_again_in_a_forked_process() -> None:
    torch.set_num_threads(2)
    x = smooth(2, 12, 11, 10)
    before = apply_axes(x, [box_matrix(n, 5) for n in shape3(x)])
    child = os.fork()
    if child == 0:
        after = apply_axes(x, [box_matrix(n, 5) for n in shape3(x)])
        os._exit(0 if torch.equal(after, before) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# ---- what was compiled is kept

PRINT_CACHE = """
import os, sys
refused = sys.argv[1:]
access = os.access
os.access = lambda path, mode: not any(str(path).startswith(r) for r in refused) and access(path, mode)
from dinoreg import kernels
print(kernels.adam.stats.cache_path)
print(sum(kernels.adam.stats.cache_hits.values()))
"""


def kept(cache: Path, *refused: Path) -> tuple[Path, int]:
    """Load the loops in a process that may not write to ``refused``: where it keeps what it compiles, and what it found there."""
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", PRINT_CACHE, *map(str, refused)], capture_output=True, text=True, check=True,
                          env={"PATH": os.environ["PATH"], "PYTHONPATH": str(root), "NUMBA_CACHE_DIR": str(cache)})
    path, hits = done.stdout.split()
    return Path(path), int(hits)


@pytest.mark.slow
def test_a_cache_that_cannot_be_written_is_copied_and_used(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    made, hits = kept(cache)
    assert made.parent == cache and hits == 0
    copied, hits = kept(cache, cache)
    assert cache not in copied.parents and hits == 1
    assert not copied.exists()  # gone with its process


def test_import_of_the_package_loads_no_compiler() -> None:
    code = "import sys, dinoreg, dinoreg.grid, dinoreg.refine; sys.exit('numba' in sys.modules)"
    root = Path(__file__).resolve().parents[1]
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(root)})
