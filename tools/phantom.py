"""A procedural chest in deep inspiration: grey values in HU, labels, and the forks of the lungs' vessel trees as landmarks.

Drawn on a grid twice as fine as the images, in patient coordinates: x to the right, y to the front, z to the head, in mm, origin
at the centre of the image. Nothing in it comes from a patient.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from scipy import ndimage

Point = tuple[float, float, float]

SHAPE = (112, 96, 80)
SPACING = 3.0  # mm
MARGIN = 6  # voxels of anatomy beyond the image on every side, so that motion never pulls in nothing
HALF = SPACING / 2  # spacing of the fine grid; voxel i of the image is its sample 2 (i + MARGIN)
AFFINE = np.array([[-SPACING, 0, 0, SPACING * (SHAPE[0] - 1) / 2], [0, -SPACING, 0, SPACING * (SHAPE[1] - 1) / 2],
                   [0, 0, SPACING, -SPACING * (SHAPE[2] - 1) / 2], [0, 0, 0, 1.0]])  # array axes run to L, P, S as from DICOM
MIDLINE = np.arange(-160.0, 161.0)  # heights (mm) at which the course of the spine is tabulated
LABELS = {1: "right lung", 2: "left lung", 3: "heart", 4: "aorta", 5: "liver", 6: "bone", 7: "trachea and main bronchi"}


def fine_axes() -> list[np.ndarray]:
    """Patient coordinates (mm) of the fine grid along its three axes, shaped to broadcast."""
    axes = []
    for axis, n in enumerate(SHAPE):
        index = np.arange(2 * (n + 2 * MARGIN) - 1) / 2 - MARGIN
        mm = (AFFINE[axis, axis] * index + AFFINE[axis, 3]).astype(np.float32)
        axes.append(mm.reshape([-1 if a == axis else 1 for a in range(3)]))
    return axes


def smooth_noise(rng: np.random.Generator, shape: tuple[int, ...], cell: int) -> np.ndarray:
    """Random field of unit variance that varies over ``cell`` samples: random blocks, averaged along each axis."""
    fine = rng.standard_normal([n // cell + 1 for n in shape], dtype=np.float32)
    for axis, n in enumerate(shape):
        fine = np.take(np.repeat(fine, cell, axis=axis), np.arange(n), axis=axis)
        fine = ndimage.uniform_filter1d(fine, cell, axis=axis)
    return fine / fine.std()


def occupied(distance: np.ndarray) -> np.ndarray:
    """Share of a fine voxel inside a surface, from the signed distance in mm (negative inside)."""
    return np.clip(0.5 - distance / HALF, 0.0, 1.0)


def ellipsoid(x: np.ndarray, y: np.ndarray, z: np.ndarray, centre: Point, radii: Point, power: float = 2.0) -> np.ndarray:
    """Signed distance (approximate, mm, negative inside) to a superellipsoid."""
    s = sum(np.abs((c - m) / r) ** power for c, m, r in zip((x, y, z), centre, radii, strict=True)) ** (1 / power)
    return (s - 1.0) * min(radii)


@dataclass
class Canvas:
    """The fine grid while the anatomy is drawn on it: grey values in HU and labels."""

    axes: list[np.ndarray]
    hu: np.ndarray = field(init=False)
    labels: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        shape = tuple(axis.size for axis in self.axes)
        self.hu = np.full(shape, -1000.0, dtype=np.float32)
        self.labels = np.zeros(shape, dtype=np.uint8)

    def fill(self, share: np.ndarray, value: np.ndarray | float, label: int | None = None) -> None:
        """Blend ``value`` in where ``share`` is 1; a label is set (0: erased) where it is at least a half."""
        self.hu += share * (value - self.hu)
        if label is not None:
            self.labels[np.broadcast_to(share >= 0.5, self.labels.shape)] = label

    def tube(self, points: npt.ArrayLike, radii: npt.ArrayLike, value: float, label: int | None = None, *,
             flatten: Point = (1.0, 1.0, 1.0), only: np.ndarray | None = None) -> None:
        """A round tube along a polyline; ``flatten`` scales the axes before distances are taken, ``only`` confines it."""
        points = np.asarray(points, dtype=np.float32)
        radii = np.broadcast_to(np.asarray(radii, dtype=np.float32), len(points))
        for p, q, rp, rq in zip(points[:-1], points[1:], radii[:-1], radii[1:], strict=True):
            reach = max(rp, rq) / min(flatten) + HALF
            box = []
            for axis, mm in enumerate(self.axes):
                inside = np.flatnonzero(np.abs(mm.ravel() - (p[axis] + q[axis]) / 2) <= abs(q[axis] - p[axis]) / 2 + reach)
                box.append(slice(inside[0], inside[-1] + 1) if inside.size else slice(0, 0))
            crop = tuple(box)
            if any(s.start == s.stop for s in box):
                continue
            local = [mm[tuple(s if a == axis else slice(None) for a, s in enumerate(box))] for axis, mm in enumerate(self.axes)]
            way = [(q[a] - p[a]) * flatten[a] for a in range(3)]
            offset = [(local[a] - p[a]) * flatten[a] for a in range(3)]
            along = np.clip(sum(o * w for o, w in zip(offset, way, strict=True)) / max(sum(w * w for w in way), 1e-6), 0, 1)
            distance = np.sqrt(sum((o - along * w) ** 2 for o, w in zip(offset, way, strict=True)))
            share = occupied(distance - (rp + along * (rq - rp)))
            if only is not None:
                share = share * only[crop]
            self.hu[crop] += share * (value - self.hu[crop])
            if label is not None:
                self.labels[crop][share >= 0.5] = label


def cavity_radii(z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Half width and half depth (mm) of the chest cavity at height z; both fall to 0 above the lung tops."""
    taper = np.sqrt(np.clip(1 - (np.maximum(z + 30, 0) / 142) ** 2, 0.0, 1.0)) * (1 - 0.04 * np.clip((-z - 60) / 60, 0, 1))
    return 121 * taper, 86 * taper


def draw_anatomy(rng: np.random.Generator) -> tuple[Canvas, np.ndarray, np.ndarray]:
    """The chest in inspiration: canvas, the body (bool, same grid) and the landmarks, (n, 3) in patient mm."""
    canvas = Canvas(fine_axes())
    x, y, z = canvas.axes
    shape = canvas.hu.shape
    texture = smooth_noise(rng, shape, 3)

    # skin, fat, muscle
    top = np.clip((z - 30) / 100, 0, 1) ** 2
    chest = 7 * np.exp(-((np.abs(x) - 62) / 36) ** 2 - ((z - 12) / 46) ** 2) * (y > 0)  # breast and pectoral muscles
    furrow = 5 * np.exp(-(x / 17) ** 2) * np.where(y > 0, 0.8, 1.0)
    body = (np.abs(x / (157 - 30 * top)) ** 2.5 + np.abs((y + 4) / (109 - 22 * top + chest - furrow)) ** 2.5) ** 0.4
    depth = (1 - body) * (109 - 22 * top)  # mm below the skin
    canvas.fill(occupied(-depth), -98 + 6 * texture)
    marbling = smooth_noise(rng, shape, 5)
    canvas.fill(occupied(9 + 3 * np.sin(x / 19) * np.cos(z / 27) - depth), np.where(marbling > 1.7, -30, 52) + 7 * texture)

    # chest cavity with its contents: lungs above the diaphragm, abdomen below, mediastinum between
    half_width, half_depth = cavity_radii(z)
    cavity = (np.abs(x / np.maximum(half_width, 1)) ** 2.4 + np.abs((y + 6) / np.maximum(half_depth, 1)) ** 2.4) ** (1 / 2.4)
    cavity = (cavity - 1) * np.maximum(half_depth, 8)
    canvas.fill(occupied(cavity + 1), -95 + 5 * texture)
    domes = [top_mm - 62 * (((x - mid) / 66) ** 2 + ((y - 2) / 84) ** 2 + 0.12 * ((y - 2) / 84))
             for mid, top_mm in ((60, -41), (-62, -53))]
    diaphragm = np.maximum(domes[0], domes[1])
    heart = ellipsoid(x * 0.9 + y * 0.35 - z * 0.25, y * 0.95 - x * 0.3, z * 0.95 + x * 0.25, (-22, 14, -33), (50, 38, 41), 2.2)
    core_width = 29 + 6 * np.exp(-((z - 10) / 28) ** 2) - 17 * np.clip((y + 5) / 50, 0, 1)  # the lungs almost meet in front
    core = (np.sqrt((x / core_width) ** 2 + ((y + 14) / 78) ** 2) - 1) * core_width
    mediastinum = np.minimum(core, heart - 4)
    spine_y = -63 - 5 * np.cos(z / 75)
    gutter = np.sqrt((x / 1.25) ** 2 + (y - spine_y + 9) ** 2) - 27  # what the vertebrae take from the cavity
    lung = np.maximum.reduce([cavity + 3, -mediastinum, diaphragm + 2 - z, -gutter])
    lung_share = occupied(lung)
    parenchyma = -862 - 0.55 * (y + 10) + 14 * smooth_noise(rng, shape, 6) + 10 * texture
    canvas.fill(lung_share * (x > 0), parenchyma, 1)
    canvas.fill(lung_share * (x <= 0), parenchyma, 2)
    for side in (1, -1):  # fissures between the lobes, as faint sheets
        sheet = np.abs((z + 12) - 0.75 * (y + 10) + 6 * np.sin(side * x / 40)) * 0.8
        canvas.fill(0.16 * occupied(sheet - 0.6) * lung_share * (side * x > 0), 0.0)

    # below the diaphragm
    abdomen = np.maximum(cavity + 4, z - diaphragm + 3)
    under_gutter = np.maximum(abdomen, -gutter)
    liver = np.maximum(under_gutter, -(x + 42 - 0.25 * (y + 20)))
    canvas.fill(occupied(liver), 92 + 6 * texture, 5)
    spleen = np.maximum(under_gutter, ellipsoid(x, y, z, (-84, -38, -98), (34, 42, 44)))
    canvas.fill(occupied(spleen), 104 + 6 * texture)
    stomach = np.maximum(under_gutter, ellipsoid(x, y, z, (-62, 26, -98), (38, 40, 40)))
    canvas.fill(occupied(stomach), 62 + 5 * texture)
    canvas.fill(occupied(stomach + 4), np.where(y > 40, -940, 14 + 5 * texture))
    portal = grow_tree(rng, np.array([18.0, -8.0, -118.0]), sample_inside(rng, canvas, liver < -6, 90), 0.5)
    draw_tree(canvas, portal, leaf=1.0, value=138, only=occupied(liver))

    # heart and great vessels (contrast-enhanced), oesophagus
    canvas.fill(occupied(heart - 3), -85 + 5 * texture)
    canvas.fill(occupied(heart), 98 + 6 * texture, 3)
    for centre, radii in (((-40, 16, -38), (22, 17, 27)), ((-8, 30, -32), (17, 15, 24)), ((-10, -12, -22), (25, 14, 19)),
                          ((20, 10, -28), (15, 17, 24))):  # left and right ventricle, left and right atrium
        canvas.fill(occupied(np.maximum(ellipsoid(x, y, z, centre, radii), heart + 6)), 178 + 6 * texture)
    canvas.tube([(28, 6, 140), (27, 8, 60), (26, 8, 0)], [8, 9, 10], 205)
    canvas.tube([(-10, 24, -12), (-18, 12, 18), (-14, 2, 22)], [13, 13, 12], 190)
    canvas.tube([(-14, 2, 20), (14, -6, 16), (42, -8, 10)], [11, 10, 8], 190)
    canvas.tube([(-14, 2, 22), (-34, -12, 22), (-47, -18, 14)], [11, 9, 8], 190)
    canvas.tube([(-16, -14, -10), (-44, -16, -16)], [8, 6], 185)
    canvas.tube([(6, -12, -12), (42, -14, -14)], [8, 6], 185)
    for path in ([(6, 4, 50), (16, 2, 90), (24, 4, 145)], [(-4, -6, 52), (-12, -4, 100), (-16, -2, 145)],
                 [(-14, -18, 52), (-24, -14, 100), (-30, -12, 145)]):
        canvas.tube(path, 5, 195)
    aorta = [(2, 12, -22), (10, 16, 5), (13, 14, 28), (8, 5, 43), (-4, -12, 50), (-17, -30, 46), (-25, -42, 30), (-27, -46, 5),
             (-26, -47, -40), (-20, -46, -90), (-12, -44, -150)]
    canvas.tube(aorta, [14, 15, 15, 14.5, 14, 13.5, 13, 12.5, 12, 11.5, 11], 200, 4)
    canvas.tube([(-3, -34, 150), (-6, -38, 20), (-8, -36, -60), (-14, -22, -120)], 7, 38)
    canvas.tube([(-3, -34, 150), (-6, -38, 20), (-8, -36, -60)], 2, -250)

    # airways and the vessel trees of the lungs
    airways = [([(0, -6, 150), (1, -12, 80), (2, -21, 34)], [9, 9, 8.5]),
               ([(2, -21, 34), (22, -23, 18), (44, -24, 2)], [7.5, 7, 5]),
               ([(2, -21, 34), (-22, -24, 16), (-48, -26, 0)], [7, 6, 5])]
    for path, radii in airways:
        canvas.tube(path, np.add(radii, 2.0), 40)
    for path, radii in airways:
        canvas.tube(path, radii, -990, 7)
    forks = []
    for side, inside in ((1, lung < -5), (-1, lung < -5)):
        inside = inside & (side * x > 0)
        for root, leaves, bronchus in (((44, -10, 10), 330, False), ((44, -15, -14), 260, False), ((46, -24, 0), 60, True)):
            start = np.array([side * root[0] - (2 if side < 0 else 0), root[1], root[2]], dtype=np.float64)
            tree = grow_tree(rng, start, sample_inside(rng, canvas, inside, leaves), 0.35)
            if bronchus:
                draw_tree(canvas, tree, leaf=1.5, value=-480, only=lung_share)
                draw_tree(canvas, tree, leaf=0.9, value=-985, only=lung_share)
            else:
                radii = draw_tree(canvas, tree, leaf=0.82, value=60, only=lung_share)
                forks.append(tree.forks(radii, 1.15))
    draw_bones(canvas, rng, spine_y)
    canvas.hu += 4 * texture * (canvas.hu > -300)
    return canvas, depth > 0, np.concatenate(forks)


def sample_inside(rng: np.random.Generator, canvas: Canvas, inside: np.ndarray, count: int) -> np.ndarray:
    """``count`` random points (patient mm) in a region of the fine grid."""
    picked = rng.choice(np.flatnonzero(inside), count, replace=False)
    indices = np.unravel_index(picked, inside.shape)
    return np.stack([axis.ravel()[index] for axis, index in zip(canvas.axes, indices, strict=True)], axis=1)


@dataclass
class Tree:
    """A rooted tree of points: ``points`` (n, 3) in patient mm, ``parent`` of each (the root is its own)."""

    points: np.ndarray
    parent: np.ndarray

    def leaves_below(self) -> np.ndarray:
        """Number of leaves that hang on each point."""
        count = np.zeros(len(self.parent), dtype=np.int64)
        count[np.setdiff1d(np.arange(len(count)), self.parent)] = 1
        for n in range(len(count) - 1, 0, -1):  # children come after their parents
            count[self.parent[n]] += count[n]
        return count

    def forks(self, radii: np.ndarray, thinnest: float) -> np.ndarray:
        """Points with two children or more whose vessel is at least ``thinnest`` mm in radius."""
        children = np.bincount(self.parent[1:], minlength=len(self.parent))
        return self.points[(children >= 2) & (radii >= thinnest) & (np.arange(len(children)) > 0)]


def grow_tree(rng: np.random.Generator, root: np.ndarray, targets: np.ndarray, balance: float) -> Tree:
    """Join targets to the root one by one, each where the way there plus ``balance`` times the way on to the root is least."""
    points, parent, path = [root], [0], [0.0]
    left = np.asarray(targets, dtype=np.float64)
    cost = np.linalg.norm(left - root, axis=1)
    joint = np.zeros(len(left), dtype=np.int64)
    while len(left):
        pick = int(np.argmin(cost))
        origin = joint[pick]
        length = float(np.linalg.norm(left[pick] - points[origin]))
        bend = 0.10 * length * rng.standard_normal(3)  # vessels are not straight
        middle = (left[pick] + points[origin]) / 2 + bend
        for point, step in ((middle, 0.5), (left[pick], 1.0)):
            points.append(point)
            parent.append(origin if step < 1 else len(points) - 2)
            path.append(path[origin] + step * length)
        left, cost, joint = (np.delete(a, pick, axis=0) for a in (left, cost, joint))
        for new in (len(points) - 2, len(points) - 1):
            through = np.linalg.norm(left - points[new], axis=1) + balance * path[new]
            joint = np.where(through < cost, new, joint)
            cost = np.minimum(cost, through)
    return Tree(np.array(points), np.array(parent))


def draw_tree(canvas: Canvas, tree: Tree, leaf: float, value: float, only: np.ndarray) -> np.ndarray:
    """Draw a tree, thinnest branches first; a vessel that feeds n leaves has radius leaf * n^(1/2.7). Returns the radii (mm)."""
    radii = leaf * tree.leaves_below() ** (1 / 2.7)
    for n in np.argsort(radii[1:], kind="stable") + 1:
        up = tree.parent[n]
        canvas.tube([tree.points[up], tree.points[n]], [min(radii[up], 1.25 * radii[n]), radii[n]], value, only=only)
    return radii


def draw_bones(canvas: Canvas, rng: np.random.Generator, spine_y: np.ndarray) -> None:
    """Spine, ribs with their cartilage, sternum, shoulder blades and collar bones: cortical shell, spongy inside."""
    x, y, z = canvas.axes
    spongy = 190 + 55 * smooth_noise(rng, canvas.hu.shape, 3)
    phase = np.abs((z + 300) % 25.0 - 12.5)  # 0 at the middle of a vertebra, 12.5 in the middle of a disc
    waist = 1 - 0.10 * np.cos(phase / 12.5 * np.pi)
    column = np.sqrt((x / 1.2) ** 2 + (y - spine_y) ** 2) - 15.5 * waist
    canvas.fill(occupied(np.maximum(column, 8 - phase)), 95, 0)
    canvas.fill(occupied(np.maximum(column, phase - 9.5)), 620, 6)
    canvas.fill(occupied(np.maximum(column + 2, phase - 7.8)), spongy)
    canal = np.sqrt((x / 1.15) ** 2 + (y - spine_y + 25) ** 2)
    canvas.fill(occupied(np.maximum(np.abs(canal - 11) - 2.6, phase - 10)), 480, 6)
    canvas.fill(occupied(canal - 8.5), 25, 0)
    centre_y = np.interp(MIDLINE, z.ravel(), spine_y.ravel())
    for middle in np.arange(-162.5, 170, 25.0):  # the middle of each vertebra
        at = float(np.interp(middle, MIDLINE, centre_y))
        canvas.tube([(0, at - 35, middle), (0, at - 50, middle - 14)], [4.5, 3.5], 520, 6)
        for side in (1, -1):
            canvas.tube([(side * 11, at - 22, middle), (side * 31, at - 30, middle + 3)], 4.5, 500, 6)
    for number in range(11):
        start_z = 127 - 25.0 * number
        for side in (1, -1):
            draw_rib(canvas, side, start_z, number, centre_y)
    path = [(0.0, float(cavity_radii(height)[1]) - 1.0, height) for height in np.arange(78.0, -22.0, -6.0)]
    for radius, value in ((6.5, 560), (4.2, 170)):
        canvas.tube(path, radius, value, 6, flatten=(0.38, 1.0, 0.6))
    for side in (1, -1):
        canvas.tube([(side * 14, 42, 86), (side * 60, 36, 103), (side * 118, 2, 108)], 6, 560, 6)
        canvas.tube([(side * 14, 42, 86), (side * 60, 36, 103), (side * 118, 2, 108)], 3.6, 200)
        blade = [(side * 84, -88, 84 - 12 * n) for n in range(8)]
        canvas.tube(blade, [20, 22, 22, 20, 17, 14, 10, 6], 540, 6, flatten=(0.9, 5.0, 0.9))
        canvas.tube([(side * 66, -92, 74), (side * 128, -52, 98)], 6, 480, 6)


def draw_rib(canvas: Canvas, side: int, start_z: float, number: int, centre_y: np.ndarray) -> None:
    """One rib: from the vertebra round the cavity, falling towards the front; its last part is cartilage."""
    floating = number >= 9
    angles = np.radians(np.linspace(-89, 5 if floating else 62, 46))  # -90 points to the back, 0 to the side
    heights = start_z - (26 + 3.4 * min(number, 7)) * (1 - np.cos(np.linspace(0, np.pi * 0.86, 46))) / 2
    half_width, half_depth = cavity_radii(heights)
    cosine, sine = np.cos(angles), np.sin(angles)
    stretch = (np.abs(cosine) ** 2.4 + np.abs(sine) ** 2.4) ** (-1 / 2.4)
    path = np.stack([side * (half_width + 4.5) * cosine * stretch, (half_depth + 4.5) * sine * stretch - 6, heights], axis=1)
    path = path[(half_width > 38) & (np.abs(path[:, 0]) > 21)]
    if len(path) < 6:  # above the lung tops
        return
    head = (side * 17.0, float(np.interp(start_z, MIDLINE, centre_y)) - 8, start_z + 2)
    path = np.concatenate([[head], path])
    bone = len(path) if floating else int(0.84 * len(path))
    if not floating:
        front_z = float(path[-1, 2])
        front = (side * 12.0, float(cavity_radii(np.array(max(front_z, -20.0)))[1]) - 4, front_z + 6 + 2.2 * max(number - 5, 0))
        canvas.tube(np.concatenate([path[bone - 1:], [front]]), 4.8, 120)
    canvas.tube(path[:bone], 5.4, 640, 6, flatten=(1.0, 1.0, 0.78))
    canvas.tube(path[:bone], 3.2, 260, flatten=(1.0, 1.0, 0.78))
