"""Joint PCA: exact, foreground only, additive over volumes, the same to the bit every time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from dinoreg.errors import RegistrationError
from dinoreg.pca import Moments, fit_basis, project, token_moments


def sample(seed: int, channels: int = 48, slices: int = 5) -> tuple[Tensor, Tensor]:
    """Correlated tokens with a large common part, as real ones have, and a foreground; float16."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(channels, channels, generator=torch.Generator().manual_seed(99))
    directions *= torch.logspace(0, -2, channels)[:, None]
    tokens = torch.randn(slices, 11, 13, channels, generator=generator) @ directions + 3 * torch.linspace(-1, 1, channels)
    return tokens.half(), torch.rand(slices, 11, 13, generator=generator) > 0.4


def pair_moments(channels: int = 48) -> tuple[Moments, np.ndarray]:
    """Moments of two volumes together, and their foreground tokens in one float64 matrix."""
    volumes = [sample(1, channels), sample(2, channels, slices=3)]
    first, second = (token_moments(*volume) for volume in volumes)
    return first + second, np.concatenate([tokens[wanted].double().numpy() for tokens, wanted in volumes])


def test_subspace_and_variances_are_those_of_an_svd_of_all_tokens() -> None:
    moments, everything = pair_moments()
    basis = fit_basis(moments, 8)
    centred = everything - everything.mean(0)
    _, singular, rows = np.linalg.svd(centred, full_matrices=False)
    # float32 products of tokens of order 1: variances to 1e-6 of the largest, directions to that over the gap between them
    np.testing.assert_allclose(basis.mean.numpy(), everything.mean(0), atol=1e-9)
    np.testing.assert_allclose(basis.variance.numpy(), singular[:8] ** 2 / len(everything), rtol=1e-5)
    assert basis.total_variance == pytest.approx((singular**2).sum() / len(everything), rel=1e-6)
    cosines = np.abs((rows[:8] * basis.components.numpy().T).sum(1))
    assert cosines.min() > 1 - 1e-8
    np.testing.assert_allclose(basis.components.T @ basis.components, np.eye(8), atol=1e-12)


def test_a_large_common_token_costs_no_digits() -> None:
    """Second moments about zero would lose the variance of 1 beside a mean of 1000 in float32."""
    generator = torch.Generator().manual_seed(3)
    tokens = 1000 + torch.randn(4, 20, 20, 6, generator=generator) * torch.tensor([3.0, 1, 1, 1, 1, 0.5])
    moments = token_moments(tokens, torch.ones(4, 20, 20, dtype=torch.bool))
    expected = np.cov(tokens.reshape(-1, 6).double().numpy(), rowvar=False, bias=True)
    np.testing.assert_allclose((moments.scatter / moments.count).numpy(), expected, atol=1e-4)  # float32 holds 1000 to 6e-5


def test_moments_add_up_in_any_order_and_grouping() -> None:
    parts = [token_moments(*sample(seed)) for seed in (1, 2, 3)]
    tokens = torch.cat([sample(seed)[0] for seed in (1, 2, 3)])
    wanted = torch.cat([sample(seed)[1] for seed in (1, 2, 3)])
    whole = token_moments(tokens, wanted)
    for moments in (parts[0] + parts[1] + parts[2], parts[2] + (parts[1] + parts[0])):
        assert moments.count == whole.count == int(wanted.sum())
        torch.testing.assert_close(moments.mean, whole.mean, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(moments.scatter, whole.scatter, rtol=1e-9, atol=1e-9)


def test_background_tokens_do_not_matter() -> None:
    tokens, wanted = sample(4)
    changed = torch.where(wanted[..., None], tokens, torch.tensor(float("nan"), dtype=torch.float16))
    first, second = token_moments(tokens, wanted), token_moments(changed, wanted)
    assert torch.equal(first.scatter, second.scatter)
    basis = fit_basis(first, 4)
    found = project(changed, wanted, basis, True)
    assert torch.equal(found, project(tokens, wanted, basis, True))
    assert not found[~wanted].any() and found[wanted].any(1).all()


def test_result_is_the_same_to_the_bit_on_any_number_of_threads() -> None:
    """Plain eigh and plain products differ in their last bits between one thread and three."""
    volumes = [sample(5, channels=384, slices=2), sample(6, channels=384, slices=2)]
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2, 3, 4):
            torch.set_num_threads(number)
            first, second = (token_moments(*volume) for volume in volumes)
            basis = fit_basis(first + second, 24)
            results.append((basis.components, basis.mean, basis.variance, project(*volumes[0], basis, True)))
            assert torch.get_num_threads() == number
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


def test_signs_are_fixed_by_the_largest_entry() -> None:
    basis = fit_basis(pair_moments()[0], 12)
    largest = basis.components.abs().argmax(0)
    assert (basis.components[largest, torch.arange(12)] > 0).all()


@pytest.mark.parametrize("center", [True, False])
def test_projection_is_that_of_the_formula_with_and_without_the_mean(center: bool) -> None:
    tokens, wanted = sample(1)
    basis = fit_basis(pair_moments()[0], 6)
    rows = tokens[wanted].double() - (basis.mean if center else 0)
    expected = rows @ basis.components
    # float32 products of 48 terms of order 1
    torch.testing.assert_close(project(tokens, wanted, basis, center)[wanted].double(), expected, rtol=0, atol=1e-4)


def test_too_few_tokens_or_channels_or_no_variation_are_refused() -> None:
    tokens, wanted = sample(7)
    few = torch.zeros_like(wanted)
    few[0, 0, :6] = True
    with pytest.raises(RegistrationError, match="more than 6 foreground tokens, found 6"):
        fit_basis(token_moments(tokens, few), 6)
    fit_basis(token_moments(tokens, few), 5)
    with pytest.raises(RegistrationError, match=r"49 components.*48 channels"):
        fit_basis(token_moments(tokens, wanted), 49)
    with pytest.raises(RegistrationError, match="all foreground tokens are the same"):
        fit_basis(token_moments(torch.full_like(tokens, 0.3), wanted), 4)
    with pytest.raises(RegistrationError, match="found 0"):
        fit_basis(token_moments(tokens, torch.zeros_like(wanted)), 4)
