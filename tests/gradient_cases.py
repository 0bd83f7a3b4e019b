"""Operands, formulas in float64 and comparisons of the tests of gradients."""

import torch

from nm_act import reference

OPS = torch.ops.nm_act
IN, OUT = 32, 24
PATTERNS = ("2:4", "8:16", "2:4+1")
LAYOUTS = ("in_out", "out_in")
SHIFTS = ("none", "mean", "median", "static", "static given", "mean given")


def kind_of(shift):
    """The operator's token_shift in a case of SHIFTS."""
    return "none" if "static" in shift else shift.split()[0]


def tensors(shift, *, tokens=(2, 3), layout="in_out", dtype=torch.float32, out=OUT):
    """Operands of sparse_linear; one token has a single value that is not 0."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *size: torch.randn(size, generator=generator)  # noqa: E731
    x = draw(*tokens, IN)
    x.view(-1, IN)[0] = torch.where(torch.arange(IN) == 5, 1.5, 0.0)
    weight = draw(IN, out).t() if layout == "in_out" else draw(out, IN)
    named = {"x": x, "weight": weight, "bias": draw(out), "column_scale": draw(out)}
    if "static" in shift:
        named["shift"] = draw(IN)
    if "given" in shift:
        named["shift_out"] = draw(out)
    return {name: value.to(dtype).requires_grad_() for name, value in named.items()}


def formula(named, pattern, token_shift, variance_correction, scale=None):
    """sparse_linear in float64 from its definition, the mask from the oracle."""
    x, weight = named["x"], named["weight"]
    eta, image = None, named.get("shift_out")
    if token_shift == "mean":
        eta, image = x.mean(dim=-1, keepdim=True), weight.sum(dim=1) if image is None else image
    elif token_shift == "median":
        eta, image = x.median(dim=-1, keepdim=True).values, weight.sum(dim=1) if image is None else image
    elif "shift" in named:
        image = weight @ named["shift"] if image is None else image
    z = x - (named.get("shift", 0.0 if eta is None else eta))
    p = z * reference.selection_mask(z.detach().float(), pattern, scale)
    y = p @ weight.t()
    if variance_correction:
        total, kept = z.var(dim=-1, correction=0, keepdim=True), p.var(dim=-1, correction=0, keepdim=True)
        y = y * (total / kept).sqrt()
    if image is not None:
        y = y + (image if eta is None else eta * image)
    return y * named["column_scale"] + named["bias"]


def operator(named, pattern, token_shift, variance_correction, scale=None, **options):
    keywords = {name: named[name] for name in ("shift", "shift_out", "column_scale") if name in named}
    return OPS.sparse_linear(
        named["x"],
        named["weight"],
        named["bias"],
        pattern.keep,
        pattern.group,
        channel_scale=scale,
        token_shift=token_shift,
        variance_correction=variance_correction,
        extra_columns=pattern.extra_columns,
        **keywords,
        **options,
    )


def loss_of(y):
    """Not linear in y."""
    return (y * y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).cos().view(y.shape)).sum()


def gradients(y, named):
    return dict(zip(named, torch.autograd.grad(loss_of(y), list(named.values())), strict=True))


def assert_near(actual, expected, limit, what=""):
    error = (actual.double() - expected.double()).abs().max() / expected.double().abs().max()
    assert error < limit, f"{what}: relative error {error:.1e}"


def in_float64(named):
    return {name: value.detach().double().requires_grad_() for name, value in named.items()}
