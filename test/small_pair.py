"""A pair of small blobs on different grids, and a configuration that registers it in a tenth of a second."""

from __future__ import annotations

import numpy as np
from fake_encoder import affine
from scipy import ndimage

from dinoreg.align import Alignment
from dinoreg.config import Config, DiscreteConfig, RefineConfig
from dinoreg.volume import Volume

SHIFT_MM = np.array([4.0, -3.0, 2.0])  # RAS, from a point of the fixed image to the same anatomy in the moving one
QUICK = Config(features="mind", discrete=DiscreteConfig(levels=((12, 2, 3),), consistency_iterations=5),
               refine=RefineConfig(levels=((2, 20), (1, 20)), regularity=0.1))
UNMOVED = Alignment(np.eye(4), 0.8, 0.8, 0.0, needed=False)  # in place of an estimate, for tests of other things
_WORLD = ndimage.gaussian_filter(np.random.default_rng(3).standard_normal((96, 96, 96)), 4.0)
_WORLD = 1000 * (_WORLD - _WORLD.min()) / np.ptp(_WORLD)


def scan(header: np.ndarray, shape: tuple[int, int, int], moved_mm: np.ndarray | float = 0.0) -> Volume:
    """What a scanner with this grid, put in the middle of the world, sees of the world after it moved; int16."""
    header = header.copy()
    header[:3, 3] = -header[:3, :3] @ ((np.array(shape) - 1) / 2)
    at = np.einsum("ab,bijk->aijk", header[:3, :3], np.indices(shape)) + header[:3, 3, None, None, None]
    at -= np.reshape(np.broadcast_to(moved_mm, 3), (3, 1, 1, 1))
    return Volume(np.rint(ndimage.map_coordinates(_WORLD, at + 47.5, order=1, mode="mirror")).astype(np.int16), header)


def small_pair() -> tuple[Volume, Volume]:
    """Fixed (RAS, 2 mm) and moving (LPS, oblique, other spacing and shape)."""
    return (scan(affine((2.0, 2.0, 2.0), "RAS"), (24, 26, 22)),
            scan(affine((2.0, 1.8, 2.2), "LPS", 10.0), (32, 34, 30), moved_mm=SHIFT_MM))
