"""Joint principal components of the tokens of two volumes: exact, streamed, the same to the last bit every time.

The scatter matrix of C channels is C x C, so it is summed slice by slice in double precision and no matrix of all tokens ever
exists. One ``Moments`` describes a volume for good; two of them added describe the pair (Chan, Golub and LeVeque 1983), so a
volume's share can be kept and combined with any partner.

Cost for n foreground tokens of C channels: 2 n C^2 + 10 C^3 operations; memory 3 C^2 doubles and one slice of tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from dinoreg.errors import RegistrationError


@contextmanager
def one_thread() -> Iterator[None]:
    """Linear algebra libraries split sums by the number of threads, which shows in the last bits: here they get one.

    Against the encoder, which keeps its threads, this is 1/12 L of the work of a transformer of L blocks.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True, eq=False)
class Moments:
    """First and second moments of a set of tokens.

    Attributes:
        count: number of tokens.
        mean: (c,) float64.
        scatter: (c, c) float64, sum over the tokens of (x - mean)(x - mean)^T.
    """

    count: int
    mean: Tensor
    scatter: Tensor

    def __add__(self, other: Moments) -> Moments:
        """Moments of both sets together."""
        count = self.count + other.count
        if count == 0:
            return self
        shift = other.mean - self.mean
        between = torch.outer(shift, shift) * (self.count * other.count / count)
        mean = (self.count * self.mean + other.count * other.mean) / count
        return Moments(count, mean, self.scatter + other.scatter + between)


@dataclass(frozen=True, eq=False)
class Basis:
    """Principal components.

    Attributes:
        components: (c, k) float64, orthonormal columns by falling variance; the entry of largest magnitude of each is positive.
        mean: (c,) float64.
        variance: (k,) float64, variance of the tokens along each column.
        total_variance: along all c directions together.
    """

    components: Tensor
    mean: Tensor
    variance: Tensor
    total_variance: float


@one_thread()
def token_moments(tokens: Tensor, foreground: Tensor, device: torch.device | str = "cpu") -> Moments:
    """Moments of the foreground tokens of a volume.

    Each slice is centred on its own mean before its float32 product, so that a large common token costs no digits, and the
    slices are added in double precision. The result is the same to the bit whatever the number of threads.

    Args:
        tokens: (slices, h, w, c), any float type.
        foreground: (slices, h, w) bool.
        device: where products are computed.

    Returns:
        The moments, on the CPU.
    """
    c = tokens.shape[-1]
    moments = Moments(0, torch.zeros(c, dtype=torch.float64), torch.zeros(c, c, dtype=torch.float64))
    for slice_tokens, wanted in zip(tokens, foreground, strict=True):
        x = slice_tokens[wanted].to(device, torch.float32)  # (n, c)
        if len(x) == 0:
            continue
        mean = x.mean(0, dtype=torch.float64)
        x -= mean.float()
        rest = x.mean(0, dtype=torch.float64)  # left over by rounding to float32
        scatter = (x.T @ x).double() - len(x) * torch.outer(rest, rest)
        moments = moments + Moments(len(x), mean.cpu(), scatter.cpu())
    return moments


@one_thread()
def fit_basis(moments: Moments, components: int) -> Basis:
    """The leading eigenvectors of the covariance, by a symmetric eigen-decomposition in double precision.

    Raises:
        RegistrationError: when there are fewer channels or tokens than components need, or the tokens do not vary.
    """
    channels = len(moments.mean)
    if components > channels:
        raise RegistrationError(f"PCA: {components} components were asked for, but the tokens have {channels} channels")
    if moments.count <= components:
        raise RegistrationError(f"PCA: {components} components need more than {components} foreground tokens, found "
                                f"{moments.count}; is the mask too small, or the slice gap too wide?")
    covariance = moments.scatter / moments.count
    total = float(covariance.trace())
    if not total > 1e-12 * float(moments.mean.square().sum()):
        raise RegistrationError("PCA: all foreground tokens are the same; is the image constant?")
    values, vectors = torch.linalg.eigh(covariance)  # ascending
    vectors = vectors[:, -components:].flip(1)
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))  # (1, k)
    return Basis(vectors * largest.sign(), moments.mean, values[-components:].flip(0).clamp_min(0), total)


@one_thread()
def project(tokens: Tensor, foreground: Tensor, basis: Basis, center: bool, device: torch.device | str = "cpu") -> Tensor:
    """Foreground tokens in the basis, slice by slice.

    Args:
        tokens: (slices, h, w, c), any float type.
        foreground: (slices, h, w) bool.
        basis: of c channels and k components.
        center: subtract the mean token first. The published code does not; a constant is added to both volumes alike then.
        device: where products are computed and where the result lies.

    Returns:
        (slices, h, w, k) float32, zero in the background.
    """
    components = basis.components.to(device, torch.float32)
    mean = basis.mean.to(device, torch.float32)
    projected = torch.zeros(*foreground.shape, components.shape[1], device=device)
    for out, slice_tokens, wanted in zip(projected, tokens, foreground, strict=True):
        x = slice_tokens[wanted].to(device, torch.float32)
        out[wanted.to(device)] = (x - mean if center else x) @ components
    return projected
