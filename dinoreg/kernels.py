"""Compiled loops (numba) for what a CPU spends its time on; the torch forms beside their callers say what they compute.

All take float32 arrays in C order and are written for rows along the last axis, which the compiler turns into vector
instructions. ``low`` and ``high`` are a slab of the first axis, so that threads can share it (``dinoreg.compiled.run``). Every
element is computed by itself, in an order that the slabs do not change: results are the same to the bit for any number of
threads.

Where a volume is sampled, ``place`` (3, 3) says where: along axis a, cell x with displacement d lies at
``place[a, 0] x + place[a, 1] + place[a, 2] d`` of the volume that is sampled, and no further out than its first and last cell.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numba
import numpy as np

Loop = TypeVar("Loop", bound=Callable[..., Any])
X1, X2, X3, X4 = "f4[::1]", "f4[:,::1]", "f4[:,:,::1]", "f4[:,:,:,::1]"  # float32 arrays in C order of 1 to 4 axes
I1, I2, F8, F82 = "i8[::1]", "i8[:,::1]", "f8[::1]", "f8[:,::1]"


def _writable(folder: Path) -> bool:
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return os.access(folder, os.W_OK)


def _settle_cache() -> None:
    """numba keeps what it compiled beside this file or in the user's cache. Where neither can be written, as in a container, it
    gets a folder for this process, filled with what ``NUMBA_CACHE_DIR`` holds, if that is set."""
    given = numba.config.CACHE_DIR
    home = [Path(os.environ["HOME"]) / ".cache"] if os.environ.get("HOME") else []
    if any(_writable(folder) for folder in ([Path(given)] if given else [Path(__file__).parent / "__pycache__", *home])):
        return
    folder = tempfile.mkdtemp(prefix="dinoreg-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    if given and Path(given).is_dir():
        shutil.copytree(given, folder, dirs_exist_ok=True, copy_function=shutil.copyfile)
    numba.config.CACHE_DIR = folder


def _compiled(*types: str) -> Callable[[Loop], Loop]:
    """Compile for (low, high, *types), unless a former process did."""
    return _translated(f"void(i8, i8, {', '.join(types)})", nogil=True, cache=True)


def _translated(*arguments: Any, **options: Any) -> Callable[[Loop], Loop]:
    # Sums over channels in any order, and multiplications fused with additions: settled when compiled, whatever the threads.
    decorate: Callable[[Loop], Loop] = numba.njit(*arguments, **options, error_model="numpy",
                                                  fastmath={"contract", "reassoc", "nsz"})
    return decorate


_settle_cache()


@_translated()
def _along_row(row: Any, start: Any, taps: Any, into: Any) -> None:
    """A banded matrix along a row, see ``axes``."""
    n = into.size
    if start.size == 1:
        weights = taps[0]
        for k in range(n):
            into[k] = weights[k] * row[k]
        for t in range(1, taps.shape[0]):
            weights = taps[t]
            shifted = row[t : t + n]
            for k in range(n):
                into[k] += weights[k] * shifted[k]
    else:
        for k in range(n):
            s = np.float32(0)
            for t in range(taps.shape[1]):
                s += taps[k, t] * row[start[k] + t]
            into[k] = s


@_translated()
def _add_rows(rows: Any, start: int, taps: Any, into: Any) -> None:
    """The sum over t of taps[t] rows[start + t], four rows at a time."""
    last = taps.size // 4 * 4
    into[:] = 0
    for t in range(0, last, 4):
        a, b, c, d = rows[start + t], rows[start + t + 1], rows[start + t + 2], rows[start + t + 3]
        wa, wb, wc, wd = taps[t], taps[t + 1], taps[t + 2], taps[t + 3]
        for n in range(into.size):
            into[n] += wa * a[n] + wb * b[n] + (wc * c[n] + wd * d[n])
    for t in range(last, taps.size):
        a, wa = rows[start + t], taps[t]
        for n in range(into.size):
            into[n] += wa * a[n]


@_compiled(X4, I1, X2, I1, X2, I1, X2, X4)
def axes(low: int, high: int, x: Any, start_i: Any, taps_i: Any, start_j: Any, taps_j: Any, start_k: Any, taps_k: Any,
         out: Any) -> None:
    """A banded matrix along each axis of x (c, i, j, k): out[o] = sum over t of taps[o, t] x[start[o] + t].

    Along k with as many cells out as in, taps_k is (t, o) instead and start_k is -start of the first row: rows are then padded.
    ``low`` and ``high`` count planes (c, i) of ``out``.
    """
    ni, nj = out.shape[1:3]
    mj, mk = x.shape[2:]
    margin = start_k[0] if start_k.size == 1 else 0
    plane = np.empty((mj, mk), np.float32)
    row = np.zeros(mk + 2 * margin, np.float32)
    for index in range(low, high):
        c, i = index // ni, index % ni
        for j in range(mj):
            into = plane[j]
            source = x[c, start_i[i], j]
            w = taps_i[i, 0]
            for k in range(mk):
                into[k] = w * source[k]
            for t in range(1, taps_i.shape[1]):
                source = x[c, start_i[i] + t, j]
                w = taps_i[i, t]
                for k in range(mk):
                    into[k] += w * source[k]
        for j in range(nj):
            _add_rows(plane, start_j[j], taps_j[j], row[margin : margin + mk])
            _along_row(row, start_k, taps_k, out[c, i, j])


@_translated()
def _locate(place: Any, axis: int, x: int, d: Any, n: int) -> Any:
    """Along an axis of n cells, the lower cell, the share of the upper one, and what a displacement adds: 0 beyond the border."""
    p = place[axis, 0] * np.float32(x) + place[axis, 1] + place[axis, 2] * d
    gain, last = place[axis, 2], np.float32(n - 1)
    if not p > np.float32(0):  # NaN, too: no cell outside is ever read. (min and max would take three times as long.)
        p, gain = np.float32(0), np.float32(0)
    if p >= last:
        p, gain = last, np.float32(0)
    cell = min(int(p), max(n - 2, 0))
    return cell, p - np.float32(cell), gain


@_compiled(X4, X4, X2, X4)
def warp(low: int, high: int, x: Any, disp: Any, place: Any, out: Any) -> None:
    """Trilinear samples out (c, i, j, k) of x (c, i', j', k') where disp (3, i, j, k) points."""
    channels, mi, mj, mk = x.shape
    si, sj, sk = np.uint64(mj * mk if mi > 1 else 0), np.uint64(mk if mj > 1 else 0), np.uint64(1 if mk > 1 else 0)
    size = mi * mj * mk
    flat = x.reshape(-1)
    nj, nk = disp.shape[2:]
    at = np.empty(nk, np.uint64)
    share = np.empty((3, nk), np.float32)
    for i in range(low, high):
        for j in range(nj):
            for k in range(nk):
                ci, share[0, k], _ = _locate(place, 0, i, disp[0, i, j, k], mi)
                cj, share[1, k], _ = _locate(place, 1, j, disp[1, i, j, k], mj)
                ck, share[2, k], _ = _locate(place, 2, k, disp[2, i, j, k], mk)
                at[k] = (ci * mj + cj) * mk + ck
            for c in range(channels):
                volume = flat[c * size : (c + 1) * size]
                into = out[c, i, j]
                for k in range(nk):
                    a, fj, fk = at[k], share[1, k], share[2, k]
                    v00 = volume[a] + fk * (volume[a + sk] - volume[a])
                    a += sj
                    v01 = volume[a] + fk * (volume[a + sk] - volume[a])
                    a += si
                    v11 = volume[a] + fk * (volume[a + sk] - volume[a])
                    a -= sj
                    v10 = volume[a] + fk * (volume[a + sk] - volume[a])
                    v0 = v00 + fj * (v01 - v00)
                    v1 = v10 + fj * (v11 - v10)
                    into[k] = v0 + share[0, k] * (v1 - v0)


@_compiled(X3, X4, X2, X3, X4)
def warp_slope(low: int, high: int, x: Any, disp: Any, place: Any, upstream: Any, slope: Any) -> None:
    """The derivative by disp of the samples of x (i', j', k'), times upstream (i, j, k): slope (3, i, j, k)."""
    mi, mj, mk = x.shape
    si, sj, sk = np.uint64(mj * mk if mi > 1 else 0), np.uint64(mk if mj > 1 else 0), np.uint64(1 if mk > 1 else 0)
    flat = x.reshape(-1)
    nj, nk = disp.shape[2:]
    for i in range(low, high):
        for j in range(nj):
            for k in range(nk):
                ci, fi, gain_i = _locate(place, 0, i, disp[0, i, j, k], mi)
                cj, fj, gain_j = _locate(place, 1, j, disp[1, i, j, k], mj)
                ck, fk, gain_k = _locate(place, 2, k, disp[2, i, j, k], mk)
                a = np.uint64((ci * mj + cj) * mk + ck)
                d00 = flat[a + sk] - flat[a]
                v00 = flat[a] + fk * d00
                a += sj
                d01 = flat[a + sk] - flat[a]
                v01 = flat[a] + fk * d01
                a += si
                d11 = flat[a + sk] - flat[a]
                v11 = flat[a] + fk * d11
                a -= sj
                d10 = flat[a + sk] - flat[a]
                v10 = flat[a] + fk * d10
                u = upstream[i, j, k]
                v0, v1 = v00 + fj * (v01 - v00), v10 + fj * (v11 - v10)
                d0, d1 = d00 + fj * (d01 - d00), d10 + fj * (d11 - d10)
                e0, e1 = v01 - v00, v11 - v10
                slope[0, i, j, k] = u * gain_i * (v1 - v0)
                slope[1, i, j, k] = u * gain_j * (e0 + fi * (e1 - e0))
                slope[2, i, j, k] = u * gain_k * (d0 + fi * (d1 - d0))


@_compiled(X4, X4, X3, X3, X4, X2, F8, X4)
def ssd(low: int, high: int, fixed: Any, moving: Any, fixed_weight: Any, moving_weight: Any, disp: Any, place: Any, loss: Any,
        slope: Any) -> None:
    """Weighted squared difference over channels, and its derivative by disp with the weights as they are.

    Features are (i, j, k, c), the moving ones (i', j', k', c); ``loss`` (i,) gets the sum of each plane, slope is (3, i, j, k).
    """
    mi, mj, mk, channels = moving.shape
    si, sj, sk = np.uint64(mj * mk if mi > 1 else 0), np.uint64(mk if mj > 1 else 0), np.uint64(1 if mk > 1 else 0)
    step_i, step_j, step_k = si * np.uint64(channels), sj * np.uint64(channels), sk * np.uint64(channels)
    flat, weights = moving.reshape(-1), moving_weight.reshape(-1)
    nj, nk = disp.shape[2:]
    for i in range(low, high):
        sum_plane = 0.0
        for j in range(nj):
            for k in range(nk):
                ci, fi, gain_i = _locate(place, 0, i, disp[0, i, j, k], mi)
                cj, fj, gain_j = _locate(place, 1, j, disp[1, i, j, k], mj)
                ck, fk, gain_k = _locate(place, 2, k, disp[2, i, j, k], mk)
                at = np.uint64((ci * mj + cj) * mk + ck)
                w00 = weights[at] + fk * (weights[at + sk] - weights[at])
                w01 = weights[at + sj] + fk * (weights[at + sj + sk] - weights[at + sj])
                w10 = weights[at + si] + fk * (weights[at + si + sk] - weights[at + si])
                w11 = weights[at + si + sj] + fk * (weights[at + si + sj + sk] - weights[at + si + sj])
                w0, w1 = w00 + fj * (w01 - w00), w10 + fj * (w11 - w10)
                weight = fixed_weight[i, j, k] * (w0 + fi * (w1 - w0))
                if weight == 0:
                    slope[0, i, j, k] = slope[1, i, j, k] = slope[2, i, j, k] = 0
                    continue
                own = fixed[i, j, k]
                a00 = at * np.uint64(channels)
                a01, a10 = a00 + step_j, a00 + step_i
                a11 = a10 + step_j
                s = gi = gj = gk = np.float32(0)
                for channel in range(channels):
                    c = np.uint64(channel)
                    x00, x01, x10, x11 = flat[a00 + c], flat[a01 + c], flat[a10 + c], flat[a11 + c]
                    d00, d01 = flat[a00 + step_k + c] - x00, flat[a01 + step_k + c] - x01
                    d10, d11 = flat[a10 + step_k + c] - x10, flat[a11 + step_k + c] - x11
                    v00, v01, v10, v11 = x00 + fk * d00, x01 + fk * d01, x10 + fk * d10, x11 + fk * d11
                    e0, e1 = v01 - v00, v11 - v10
                    v0, v1 = v00 + fj * e0, v10 + fj * e1
                    d0, d1 = d00 + fj * (d01 - d00), d10 + fj * (d11 - d10)
                    difference = v0 + fi * (v1 - v0) - own[c]
                    s += difference * difference
                    gi += difference * (v1 - v0)
                    gj += difference * (e0 + fi * (e1 - e0))
                    gk += difference * (d0 + fi * (d1 - d0))
                sum_plane += weight * s
                double = np.float32(2) * weight
                slope[0, i, j, k] = double * gain_i * gi
                slope[1, i, j, k] = double * gain_j * gj
                slope[2, i, j, k] = double * gain_k * gk
        loss[i] = sum_plane


@_compiled(X4, X3, X3, X3, X3, "f4", F8)
def correlation(low: int, high: int, means: Any, fixed_mean: Any, fixed_var: Any, fixed_weight: Any, moving_weight: Any,
                floor: float, loss: Any) -> None:
    """From window means of m, m m and f m (3, i, j, k) to what their slope needs, in place: see ``dinoreg.refine.LNCC``."""
    nj, nk = fixed_mean.shape[1:]
    for i in range(low, high):
        sum_plane = 0.0
        for j in range(nj):
            one, two, three = means[0, i, j], means[1, i, j], means[2, i, j]
            f, var_f, wf, wm = fixed_mean[i, j], fixed_var[i, j], fixed_weight[i, j], moving_weight[i, j]
            for k in range(nk):
                mean = one[k]
                variance = max(two[k] - mean * mean, np.float32(0)) + floor
                covariance = three[k] - f[k] * mean
                covariance += floor if covariance >= 0 else -floor
                a = wf[k] * wm[k] * covariance / (var_f[k] * variance)
                ab = a * covariance / variance
                sum_plane += a * covariance
                one[k] = a
                two[k] = ab
                three[k] = a * f[k] - ab * mean
        loss[i] = sum_plane


@_compiled(X4, X4, X1, X2, F82)
def bend(low: int, high: int, slope: Any, disp: Any, scale: Any, weights: Any, energy: Any) -> None:
    """Add the slope of the diffusion energy, in place: slope[c] becomes scale[c] slope[c] less the sum over the axes a of
    weights[c, a] times the second derivative of disp[c] along a.

    Neighbours beyond the border are the border's. ``energy`` (i, 3) gets the sum over each plane of disp[c] times what is taken
    from slope[c]: minus twice the energy.
    """
    ni, nj, nk = disp.shape[1:]
    change = np.empty(nk, np.float32)
    for i in range(low, high):
        for c in range(3):
            line = 0.0
            wi, wj, wk = weights[c, 0], weights[c, 1], weights[c, 2]
            for j in range(nj):
                x, g = disp[c, i, j], slope[c, i, j]
                above, below = disp[c, max(i - 1, 0), j], disp[c, min(i + 1, ni - 1), j]
                left, right = disp[c, i, max(j - 1, 0)], disp[c, i, min(j + 1, nj - 1)]
                for k in range(nk):
                    two = np.float32(2) * x[k]
                    change[k] = wi * (above[k] + below[k] - two) + wj * (left[k] + right[k] - two)
                for k in range(1, nk - 1):
                    change[k] += wk * (x[k - 1] + x[k + 1] - np.float32(2) * x[k])
                if nk > 1:
                    change[0] += wk * (x[1] - x[0])
                    change[nk - 1] += wk * (x[nk - 2] - x[nk - 1])
                for k in range(nk):
                    line += x[k] * change[k]
                    g[k] = scale[c] * g[k] - change[k]
            energy[i, c] = line


@_compiled(X4, X4, X4, "f4", "f4", X1, "f4", "f4")
def adam(low: int, high: int, slope: Any, first: Any, second: Any, share_first: float, share_second: float, rate: Any,
         bias_second: float, damping: float) -> None:
    """The moments of the slope (3, i, j, k), moved by the given shares, and the step that they give, in place of the slope."""
    nj, nk = slope.shape[2:]
    for i in range(low, high):
        for c in range(3):
            for j in range(nj):
                g, m, v = slope[c, i, j], first[c, i, j], second[c, i, j]
                for k in range(nk):
                    m[k] += share_first * (g[k] - m[k])
                    v[k] += share_second * (g[k] * g[k] - v[k])
                    g[k] = -rate[c] * m[k] / (np.sqrt(bias_second * v[k]) + damping)


@_compiled(X3, X3, X2, X2, "i8", X2, I2, I1, X2, I1, X2, X3, "f4", "b1", X4)
def cost(low: int, high: int, fixed: Any, moving: Any, fixed_weight: Any, moving_weight: Any, pitch: int, over_i: Any,
         span_i: Any, start_j: Any, taps_j: Any, start_k: Any, taps_k: Any, valid: Any, unknown: float, first_axis_fastest: bool,
         out: Any) -> None:
    """Part of a cost volume: see ``dinoreg.convex.cost_volume``. ``low`` and ``high`` count the steps along i and j together.

    Features (c, i, j k), c a multiple of 4, the moving ones with half a search range more on either side of each axis. Rows are
    ``pitch`` long in both, the longer ones' length: so that a step is one distance in memory for a whole plane. ``over_i`` is a
    (coarse, fine) matrix, ``span_i[i]`` the coarse cells from and to which i counts; along j and k they are as in ``axes``. A
    negative ``unknown`` leaves the weights out of account: the result is the sum.
    """
    channels, ni, size = fixed.shape
    nj, steps = size // pitch, moving.shape[1] - ni + 1
    nk = pitch - steps + 1
    size -= steps - 1  # up to the last cell
    mi, mj, mk = out.shape[1:]
    weighted = unknown >= 0
    margin = start_k[0] if start_k.size == 1 else 0
    fields = 2 if weighted else 1
    cells = np.zeros((nj, fields * pitch), np.float32)  # a row of squared differences, a row of overlap
    squared = np.empty(nj * pitch, np.float32)
    plane, volume = np.empty((mj, fields * pitch), np.float32), np.empty((steps, mi, mj, fields * pitch), np.float32)
    plane_flat, volume_flat = plane.reshape(-1), volume.reshape((steps, mi, -1))
    line, mean, share = np.zeros(nk + 2 * margin, np.float32), np.empty(mk, np.float32), np.empty(mk, np.float32)
    for pair in range(low, high):
        di, dj = pair // steps, pair % steps
        volume[:] = 0
        for i in range(ni):
            for dk in range(steps):
                shift = dj * pitch + dk
                for c in range(0, channels, 4):
                    f0, f1, f2, f3 = fixed[c, i], fixed[c + 1, i], fixed[c + 2, i], fixed[c + 3, i]
                    m0, m1 = moving[c, i + di, shift : shift + size], moving[c + 1, i + di, shift : shift + size]
                    m2, m3 = moving[c + 2, i + di, shift : shift + size], moving[c + 3, i + di, shift : shift + size]
                    if c == 0:
                        squared[:] = 0
                    for n in range(size):
                        u, v, w, x = f0[n] - m0[n], f1[n] - m1[n], f2[n] - m2[n], f3[n] - m3[n]
                        squared[n] += u * u + v * v + (w * w + x * x)
                for j in range(nj):
                    into = cells[j]
                    start = j * pitch
                    if weighted:
                        wf, wm = fixed_weight[i, start : start + nk], moving_weight[i + di, start + shift : start + shift + nk]
                        for n in range(nk):
                            both = wf[n] * wm[n]
                            into[n] = both * squared[start + n]
                            into[pitch + n] = both
                    else:
                        into[:nk] = squared[start : start + nk]
                for o in range(mj):
                    _add_rows(cells, start_j[o], taps_j[o], plane[o])
                for o in range(span_i[i, 0], span_i[i, 1]):
                    weight, into = over_i[o, i], volume_flat[dk, o]
                    for n in range(plane_flat.size):
                        into[n] += weight * plane_flat[n]
        for dk in range(steps):
            index = (dk * steps + dj) * steps + di if first_axis_fastest else (di * steps + dj) * steps + dk
            for i in range(mi):
                for j in range(mj):
                    line[margin : margin + nk] = volume[dk, i, j, :nk]
                    _along_row(line, start_k, taps_k, mean)
                    into = out[index, i, j]
                    if weighted:
                        line[margin : margin + nk] = volume[dk, i, j, pitch : pitch + nk]
                        _along_row(line, start_k, taps_k, share)
                        known = valid[i, j]
                        for n in range(mk):
                            into[n] = (mean[n] + unknown) / (share[n] + unknown) * known[n]
                    else:
                        into[:] = mean


@_compiled(X2, X3, I1)
def cheapest(low: int, high: int, costs: Any, penalties: Any, pick: Any) -> None:
    """The candidate of each cell that is cheapest in cost and penalty together, the first one among equals.

    ``costs`` (n^3, cells), the candidates' last axis fastest; ``penalties`` (3, n, cells), to be added up over the axes; ``pick``
    (cells,). ``low`` and ``high`` count blocks of 512 cells.
    """
    cells, steps = costs.shape[1], penalties.shape[1]
    block = 512
    best, two, index = np.empty(block, np.float32), np.empty(block, np.float32), np.empty(block, np.int32)
    for b in range(low, high):
        start = b * block
        width = min(block, cells - start)
        best[:] = np.inf
        index[:] = 0
        for slow in range(steps):
            p = penalties[0, slow, start : start + width]
            for middle in range(steps):
                q = penalties[1, middle, start : start + width]
                for n in range(width):
                    two[n] = p[n] + q[n]
                for fast in range(steps):
                    candidate = np.int32((slow * steps + middle) * steps + fast)
                    r, c = penalties[2, fast, start : start + width], costs[candidate, start : start + width]
                    for n in range(width):
                        value = c[n] + (two[n] + r[n])
                        less = value < best[n]
                        best[n] = value if less else best[n]
                        index[n] = candidate if less else index[n]
        for n in range(width):
            pick[start + n] = index[n]
