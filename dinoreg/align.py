"""Where the moving image lies before anything is deformed: a similarity transform (rotation, scale, translation), found from the
images alone, and whether it is needed.

Both images are compared by MIND-SSC on a lattice of some 14 000 cells. The measure is what a transform explains: the sum over
the overlap of 1 - |f - m|^2, divided by the size of the fixed image. Unrelated tissue differs by 1 on average and explains
nothing, so that a small overlap, however good, is no bargain. Neither one contrast nor an overlap is assumed.

* ``Search``: for one rotation and scale, all translations at once (Fourier transforms); rotations and scales by a pattern search
  from the best of a coarse set. It needs no start, and headers that are anywhere do not matter.
* ``polish``: Gauss-Newton steps (Levenberg's damping) on the same measure, on this lattice and a finer one.
* ``align``: the verdict. The headers are believed unless the images say otherwise: headers and estimate are both given what the
  registration itself can reach (``convex.discrete``), and the estimate has to explain more by a clear margin, and to move the
  image far. So a pair that the registration reaches by itself keeps its field to the bit.

Everything is done on the CPU in an order that no number of threads changes.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy import fft, ndimage
from scipy.spatial.transform import Rotation

from dinoreg.config import IntensityConfig
from dinoreg.convex import FeatureVolume, discrete
from dinoreg.errors import InputError
from dinoreg.features import unrelated_distance
from dinoreg.grid import gradient, lattice_shape, resize, resize_disp, total
from dinoreg.initial import Matrix
from dinoreg.mind import mind_ssc
from dinoreg.preprocess import grown, on_grid, to_unit_range, valid_region, within
from dinoreg.volume import Volume

Points = npt.NDArray[np.float64]
Turn = tuple[int, int, int, int]  # rotation vector (RAS) and logarithm of the scale, in steps

CELLS = 24**3  # of the lattice over the fixed image
FINER = 1.6  # times as many an axis for the last steps
STEP_DEGREES, STEP_SCALE = 4.0, 0.04  # of ``Turn``: a motion of about half a cell at the border
FIRST = 6  # steps between the coarse set's rotations: 24 degrees
FIRST_SCALE = 4  # and scales: 17 %
STARTS = 3  # of the coarse set that are followed up
ROUNDS = 20  # of ``polish``, at most
REACH = 8  # the registration moves everything by up to 1/8 of the longest side
FAR = 0.05  # of the longest side: a mean motion that asks for a start of its own
CLEAR = 0.04  # more explained, as a share, than with the headers alone, to be believed against them


@dataclass(frozen=True, eq=False)
class Alignment:
    """What was found.

    Attributes:
        matrix: float64 4x4, RAS mm, fixed point -> moving point.
        by_headers, by_matrix: share of the fixed image that each explains after what the registration itself can reach.
        distance_mm: root mean square over the fixed image of the distance between where headers and matrix lead.
        needed: whether registration should start from the matrix.
    """

    matrix: Matrix
    by_headers: float
    by_matrix: float
    distance_mm: float
    needed: bool

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for reports."""
        return dataclasses.asdict(self) | {"matrix": self.matrix.tolist()}

    def __str__(self) -> str:
        """How the moving image was moved, in words."""
        linear = self.matrix[:3, :3]
        scale = float(np.cbrt(np.linalg.det(linear)))
        degrees = float(np.rad2deg(Rotation.from_matrix(linear / scale).magnitude()))
        return (f"by {self.distance_mm:.0f} mm in the mean: turned by {degrees:.0f} degrees, made {1 / scale:.2f} times as large "
                f"and shifted (similarity of the images: {100 * self.by_matrix:.0f} %; by the headers alone "
                f"{100 * self.by_headers:.0f} %)")


def align(fixed: Volume, moving: Volume, fixed_mask: Volume | None = None, moving_mask: Volume | None = None,
          kinds: Sequence[str] = ("", ""), intensity: IntensityConfig | None = None) -> Alignment:
    """Find where the moving image lies.

    Args:
        fixed, moving: on any grids; the headers need not overlap.
        fixed_mask, moving_mask: where the images count, on any grids, each in the space of its image.
        kinds: modalities of both, and
        intensity: their grey value windows, as for the registration.

    Raises:
        InputError: an image, or what its mask leaves of it, is empty or has no contrast.
    """
    intensity = intensity or IntensityConfig()
    f = View.of(fixed, fixed_mask, kinds[0], intensity, "fixed")
    m = View.of(moving, moving_mask, kinds[1], intensity, "moving")
    cell = float(np.prod([n * s for n, s in zip(fixed.shape, fixed.spacing, strict=True)]) / CELLS) ** (1 / 3)
    coarse, fine = ((f.coarser(mm), m.coarser(mm)) for mm in (cell, cell / FINER))
    starts = [polish(*coarse, start) for start in Search(*coarse).best()]
    matrix = polish(*fine, max(starts, key=lambda start: reached(*coarse, start)))
    by_headers, by_matrix = (reached(*coarse, start) for start in (np.eye(4), matrix))
    away = applied(matrix, coarse[0].points()) - coarse[0].points()
    distance = float(np.sqrt((away**2).sum(1).mean()))
    longest = max(n * s for n, s in zip(fixed.shape, fixed.spacing, strict=True))
    needed = distance > FAR * longest and by_matrix > by_headers + CLEAR * abs(by_matrix)
    return Alignment(matrix, by_headers, by_matrix, distance, needed)


@dataclass(frozen=True, eq=False)
class View:
    """An image (i, j, k) in [0, 1] with weights, and its affine (voxel -> RAS mm)."""

    image: npt.NDArray[np.float32]
    weight: npt.NDArray[np.float32]
    affine: Matrix

    @classmethod
    def of(cls, volume: Volume, mask: Volume | None, kind: str, intensity: IntensityConfig, name: str) -> View:
        """An image as the registration sees it."""
        array = np.asarray(volume.array, dtype=np.float32)
        try:
            unit = to_unit_range(array, kind, intensity)
        except InputError as error:
            raise InputError(f"{name} image: {error}") from error
        valid = valid_region(array)
        if mask is not None:
            valid &= grown(np.asarray(on_grid(mask, volume, order=0)) != 0)
        if not valid.any():
            raise InputError(f"the {name} mask leaves nothing of the {name} image: correct it, or leave it out")
        return cls(unit, valid.astype(np.float32), volume.affine)

    @property
    def cell(self) -> Points:
        """Distance of voxel centres in mm along each axis (3,)."""
        return np.asarray(np.linalg.norm(self.affine[:3, :3], axis=0))

    @property
    def centre(self) -> Points:
        """The middle of the image, RAS mm (3,)."""
        return np.asarray(self.affine[:3, :3] @ ((np.array(self.image.shape) - 1) / 2) + self.affine[:3, 3])

    def points(self) -> Points:
        """All voxel centres, RAS mm (n, 3)."""
        return applied(self.affine, np.indices(self.image.shape).reshape(3, -1).T.astype(np.float64))

    def coarser(self, cell_mm: float) -> View:
        """The same on a lattice of about ``cell_mm``."""
        old = (self.image.shape[0], self.image.shape[1], self.image.shape[2])
        new = lattice_shape(old, list(self.cell), cell_mm)
        image, weight = resize(torch.from_numpy(np.stack([self.image, self.weight])), new).numpy()
        ratio = np.array(old) / np.array(new)
        step = np.diag([*ratio, 1.0])
        step[:3, 3] = (ratio - 1) / 2
        return View(image, weight, self.affine @ step)

    def features(self, affine: Matrix, shape: Sequence[int]) -> FeatureVolume:
        """MIND and weights on a lattice; beyond the image lies more of its border, with no weight."""
        matrix = np.linalg.solve(self.affine, affine)
        image, weight = (ndimage.affine_transform(x, matrix[:3, :3], matrix[:3, 3], output_shape=tuple(shape), order=1,
                                                  mode="nearest") for x in (self.image, self.weight))
        index = np.ogrid[tuple(slice(n) for n in shape)]
        for row, n in zip(matrix, self.image.shape, strict=False):
            weight *= within(row[3] + sum(factor * line for factor, line in zip(row, index, strict=False)), n)
        return FeatureVolume(mind_ssc(torch.from_numpy(image)), torch.from_numpy(weight))


class Search:
    """The best of all translations, for any rotation and scale."""

    def __init__(self, fixed: View, moving: View) -> None:
        self.fixed, self.moving = fixed, moving
        self.seen = fixed.features(fixed.affine, fixed.image.shape)
        self.tried: dict[Turn, tuple[float, Matrix]] = {}
        self.spectra: dict[tuple[int, ...], list[npt.NDArray[np.complex64]]] = {}

    def best(self) -> list[Matrix]:
        """The transforms (4x4, fixed -> moving) to which the search leads from the best of the coarse set, to about half a cell;
        mostly one."""
        turns: list[Turn] = [(a, b, c, 0) for a, b, c in itertools.product((-FIRST, 0, FIRST), repeat=3) if not a * b * c]
        turns += [(0, 0, 0, FIRST_SCALE), (0, 0, 0, -FIRST_SCALE)]
        turns.sort(key=self.explained, reverse=True)
        return [self.tried[turn][1] for turn in sorted({self.climbed(turn) for turn in turns[:STARTS]})]

    def climbed(self, turn: Turn) -> Turn:
        """Where a pattern search leads: to the best neighbour while there is a better one, then with half the step."""
        step = FIRST // 2
        while step:
            a, b, c, s = turn
            around = [(a + step, b, c, s), (a - step, b, c, s), (a, b + step, c, s), (a, b - step, c, s), (a, b, c + step, s),
                      (a, b, c - step, s), (a, b, c, s + step), (a, b, c, s - step)]
            nearby = max(around, key=self.explained)
            if self.explained(nearby) > self.explained(turn):
                turn = nearby
            else:
                step //= 2
        return turn

    def explained(self, turn: Turn) -> float:
        """What the best translation explains."""
        if turn not in self.tried:
            rotation = Rotation.from_rotvec(np.deg2rad(STEP_DEGREES * np.array(turn[:3]))).as_matrix()
            self.tried[turn] = self._translated(rotation * np.exp(STEP_SCALE * turn[3]))
        return self.tried[turn][0]

    def _translated(self, linear: Points) -> tuple[float, Matrix]:
        """What the best translation of a linear part (3x3, fixed -> moving) explains, and the whole transform.

        With f on the fixed lattice, m on one of the same cells that holds the whole moving image, turned and scaled:
        sum_x wf(x) wm(x + t) (|f(x) - m(x + t)|^2 - 1) is a sum of correlations, one a channel, for every t.
        """
        fixed, moving = self.fixed, self.moving
        turned = linear @ fixed.affine[:3, :3]  # cells -> mm of the moving image
        extent = np.abs(np.linalg.solve(turned, moving.affine[:3, :3])) @ np.array(moving.image.shape)
        wide = [int(n) for n in np.ceil(extent)]
        lattice = np.eye(4)
        lattice[:3, :3] = turned
        lattice[:3, 3] = moving.centre - turned @ ((np.array(wide) - 1) / 2)
        m = moving.features(lattice, wide)
        size = tuple(fft.next_fast_len(a + b - 1, real=True) for a, b in zip(fixed.image.shape, wide, strict=True))
        if size not in self.spectra:
            self.spectra[size] = [np.conj(x) for x in _spectra(self.seen, size, first=True)]
        left, right = self.spectra[size], _spectra(m, size, first=False)
        difference = sum((a * b for a, b in zip(left, right, strict=True)), start=np.zeros_like(left[0]))
        scale = 1 / float(unrelated_distance(self.seen.features, m.features, self.seen.weight, m.weight))
        match = fft.irfftn(scale * difference - left[-1] * right[0], size)  # the last and the first are the weights' own
        where = int(match.argmin())
        shift = [t - n if t >= w else t for t, n, w in zip(np.unravel_index(where, size), size, wide, strict=True)]
        step = np.eye(4)
        step[:3, 3] = shift
        return -float(match.flat[where]) / float(total(self.seen.weight)), lattice @ step @ np.linalg.inv(fixed.affine)


def _spectra(x: FeatureVolume, size: Sequence[int], *, first: bool) -> list[npt.NDArray[np.complex64]]:
    """Of w |x|^2, -2 w x, w for the first image, of w, w x, w |x|^2 for the other: their products add up to w w' |x - x'|^2."""
    square = x.weight * x.features.square().sum(0)
    channels = [square, *(-2 * x.weight * x.features), x.weight] if first else [x.weight, *(x.weight * x.features), square]
    return [fft.rfftn(channel.numpy(), size) for channel in channels]


def polish(fixed: View, moving: View, matrix: Matrix) -> Matrix:
    """Improve a transform (4x4, fixed -> moving) until it moves no cell by more than 1/50.

    Gauss-Newton on the weighted feature difference, for a rotation vector, the logarithm of the scale and a translation, along
    the fixed axes and around the middle; a step that does not explain more is taken back and damped.
    """
    shape, cell = fixed.image.shape, fixed.cell
    seen = fixed.features(fixed.affine, shape)
    frame = np.eye(4)  # mm along the fixed axes, from the middle -> RAS mm
    frame[:3, :3], frame[:3, 3] = fixed.affine[:3, :3] / cell, fixed.centre
    back = np.asarray(np.linalg.inv(frame))
    local = applied(back, fixed.points())
    motion = np.zeros((len(local), 3, 7))  # of every point by the seven parameters
    for a, b, c in ((0, 1, 2), (1, 2, 0), (2, 0, 1)):
        motion[:, b, a], motion[:, c, a] = -local[:, c], local[:, b]  # e_a x p
    motion[:, :, 3], motion[:, :, 4:] = local, np.eye(3)
    best, most, damping, trial = matrix, -np.inf, 1e-3, matrix
    hessian, slope = np.asarray(np.eye(7)), np.asarray(np.zeros(7))
    for _ in range(ROUNDS):
        f, m = _scaled(seen, moving.features(trial @ fixed.affine, shape))
        if (value := explained(f, m)) > most + 1e-5:
            best, most, damping = trial, value, damping / 4
            hessian, slope = _normal_equations(f, m, cell, motion)
        else:
            damping *= 16
        change = np.linalg.lstsq(hessian + damping * np.diag(np.diag(hessian)), slope, rcond=None)[0]
        if np.abs(np.einsum("nap,p->na", motion, change)).max() < 0.02 * cell.min():
            break
        step = np.eye(4)
        step[:3, :3], step[:3, 3] = np.exp(change[3]) * Rotation.from_rotvec(change[:3]).as_matrix(), change[4:]
        trial = best @ frame @ step @ back
    return best


def _normal_equations(f: FeatureVolume, m: FeatureVolume, cell: Points, motion: Points) -> tuple[Points, Points]:
    """Matrix (7, 7) and right-hand side (7,) of the least squares step; feature slopes are those of the moving image."""
    weight = (f.weight * m.weight).flatten()
    residual = (f.features - m.features).flatten(1)
    slopes = [(gradient(m.features, axis) / float(cell[axis])).flatten(1) for axis in range(3)]  # each (c, n)
    square = torch.stack([torch.stack([(a * b).sum(0) for b in slopes]) for a in slopes]) * weight  # (3, 3, n)
    pull = torch.stack([(a * residual).sum(0) for a in slopes]) * weight  # (3, n)
    weighted = np.einsum("abn,nbp->nap", square.numpy().astype(np.float64), motion)
    return np.einsum("nap,naq->pq", weighted, motion), np.einsum("an,nap->p", pull.numpy().astype(np.float64), motion)


def reached(fixed: View, moving: View, matrix: Matrix) -> float:
    """What a start explains after a discrete search as far as the registration's own."""
    shape = fixed.image.shape
    seen, there = fixed.features(fixed.affine, shape), moving.features(matrix @ fixed.affine, shape)
    if not there.weight.any():
        return 0.0
    f, m = _scaled(seen, there)
    lattice = (shape[0], shape[1], shape[2])
    coarse = lattice_shape(lattice, (1.0, 1.0, 1.0), 2)
    disp, _, _ = discrete(f, m, max(1, round(max(shape) / REACH)), coarse, 15)
    return explained(f, m.warp(resize_disp(disp, lattice)))


def explained(f: FeatureVolume, m: FeatureVolume) -> float:
    """1 - |f - m|^2, summed over the overlap, by the size of the fixed image; features are scaled."""
    return float(total(f.weight * m.weight * (1 - (m.features - f.features).square().sum(0))) / total(f.weight))


def _scaled(a: FeatureVolume, b: FeatureVolume) -> tuple[FeatureVolume, FeatureVolume]:
    scale = unrelated_distance(a.features, b.features, a.weight, b.weight).rsqrt()
    return FeatureVolume(a.features * scale, a.weight), FeatureVolume(b.features * scale, b.weight)


def applied(matrix: Matrix, points: Points) -> Points:
    """Points (n, 3), led by a 4x4 matrix."""
    return np.asarray(np.einsum("ab,nb->na", matrix[:3, :3], points) + matrix[:3, 3])
