"""Shared by the tests of operators on CPUs and GPUs: weight layouts, options of the selection and of a product, errors."""

import torch


def stored(weight: torch.Tensor, layout: str) -> torch.Tensor:
    """``weight [out, in]``, in memory as the layout says."""
    return weight if layout == "out_in" else weight.t().contiguous().t()


def relative_error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    assert actual.shape == exact.shape
    assert not actual.isnan().any()
    return ((actual.double() - exact.double()).norm() / exact.double().norm()).item()


def selections(in_features: int) -> dict[str, dict]:
    """Every option of the selection alone; a zero, a negative and non-finite scales are part of the contract."""
    scale = torch.randn(in_features)
    scale[0], scale[1 % in_features], scale[-1] = 0.0, float("inf"), float("nan")
    return {
        "plain": {},
        "channel scale": {"channel_scale": scale},
        "static shift": {"shift": torch.randn(in_features)},
        "mean": {"token_shift": "mean"},
        "median": {"token_shift": "median"},
    }


def linear_options(in_features: int, out_features: int, device: str = "cuda") -> dict[str, dict]:
    """Every option of sparse_linear alone, and most of them together."""
    generator = torch.Generator().manual_seed(3)
    draw = lambda size: torch.randn(size, generator=generator).to(device)  # noqa: E731
    return {
        "plain": {},
        "channel scale": {"channel_scale": draw(in_features).abs()},
        "static shift": {"shift": 0.3 * draw(in_features)},
        "mean": {"token_shift": "mean"},
        "median": {"token_shift": "median"},
        "variance": {"variance_correction": True},
        "column scale": {"column_scale": 1 + 0.1 * draw(out_features)},
        "shift, variance, column scale": {
            "shift": 0.3 * draw(in_features),
            "variance_correction": True,
            "column_scale": 1 + 0.1 * draw(out_features),
        },
        "all": {
            "channel_scale": draw(in_features).abs(),
            "token_shift": "median",
            "variance_correction": True,
            "column_scale": 1 + 0.1 * draw(out_features),
        },
    }
