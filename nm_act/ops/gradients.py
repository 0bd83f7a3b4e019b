"""Formulas of the gradients in :mod:`nm_act.ops.autograd`.

``Y = (nu * (P(X - eta) @ W^T) + shift term) * column_scale + bias`` has, with ``G`` the gradient of Y,
``H = (G * column_scale) @ W`` and M the mask, the gradient ``nu * M * H`` with respect to X - eta: one masked product.
Statistics of a token (nu, a mean) are functions of X and add their terms; a median passes its gradient to the element
that it picked, as in ``torch.median``. A channel scale only affects the selection, so its gradient is 0.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..patterns import NMPattern
from . import composed, formulas, operators


class Selection:
    """``Z = X - eta`` [tokens, in], its mask and survivors, and their gradients with respect to X and eta.

    ``options`` are the operator's: n, m, extra_columns and token_shift.
    """

    def __init__(self, x: Tensor, channel_scale: Tensor | None, shift: Tensor | None, options: Mapping[str, Any]):
        self.x, self.channel_scale, self.shift = x.reshape(-1, x.shape[-1]), channel_scale, shift
        self.pattern = NMPattern(options["n"], options["m"], options["extra_columns"])
        self.token_shift: str = options["token_shift"]

    def prune(self) -> Tensor:
        """``P(Z)`` from the operator itself: the same bits as in the forward pass."""
        return operators.prune(
            self.x, self.pattern, channel_scale=self.channel_scale, shift=self.shift, token_shift=self.token_shift
        )

    def shifted(self) -> Tensor:
        """Z itself."""
        return formulas.shifted(self.x, self.shift, self.token_shift)

    def masked(self, gradient: Tensor) -> Tensor:
        """Gradient of Z from that of the survivors."""
        mask = composed.survivors(self.shifted(), self.pattern, self.channel_scale)
        return torch.where(mask, gradient, gradient.new_zeros(()))

    def eta(self) -> Tensor:
        """The token's shift [tokens, 1], float32."""
        return formulas.token_shift_values(self.x, self.token_shift)

    def through_eta(self, of_z: Tensor, of_eta: Tensor | None) -> Tensor:
        """Gradient of X from that of Z and from ``of_eta`` [tokens, 1], that of eta in the shift term, or None."""
        if self.token_shift == "none":
            return of_z
        wide = of_z.float()
        whole = (0 if of_eta is None else of_eta) - wide.sum(dim=-1, keepdim=True)
        if self.token_shift == "mean":
            return wide + whole / wide.shape[-1]
        picked = self.x.detach().float().median(dim=-1, keepdim=True).indices
        return wide + torch.zeros_like(wide).scatter(-1, picked, whole)


class Variance:
    """nu = sqrt(Var Z / Var P) of a token [tokens, 1] and its gradient, float32."""

    def __init__(self, z: Tensor, pruned: Tensor):
        self.survivors = pruned
        self.z, self.pruned = (each.double() - each.double().mean(dim=-1, keepdim=True) for each in (z, pruned))
        self.total, self.kept = (each.square().mean(dim=-1, keepdim=True) for each in (self.z, self.pruned))
        self.nu = formulas.ratio_root(self.total, self.kept).float()

    def gradients(self, of_nu: Tensor) -> tuple[Tensor, Tensor]:
        """Of Z and of P: ``nu * (Z - mean Z) / (N Var Z)`` and ``-nu * (P - mean P) / (N Var P)`` times of_nu."""
        usable = (self.total != 0) & (self.kept != 0)
        factor = torch.where(usable, of_nu.double() * self.nu.double() / self.z.shape[-1], 0.0)
        total, kept = (torch.where(usable, each, 1.0) for each in (self.total, self.kept))
        return (self.z * (factor / total)).float(), (self.pruned * (-factor / kept)).float()


def linear_gradients(
    gradient: Tensor, saved: tuple[Any, ...], options: Mapping[str, Any], needs: Mapping[str, bool]
) -> dict[str, Tensor]:
    """Gradients by argument name, only of those in ``needs``; no product is computed for the others."""
    x, weight, channel_scale, shift, shift_out, column_scale = saved
    selection = Selection(x, channel_scale, shift, options)
    gradient = gradient.reshape(selection.x.shape[0], weight.shape[0])
    found = {}
    if needs["bias"]:
        found["bias"] = gradient.sum(dim=0)
    if needs["channel_scale"]:
        found["channel_scale"] = torch.zeros_like(channel_scale)
    if needs["column_scale"]:
        # In float32, as in the forward: in float16 the unscaled product may overflow.
        y = formulas.linear_of_pruned(
            selection.x,
            selection.prune(),
            weight,
            shift=shift,
            token_shift=options["token_shift"],
            shift_out=shift_out,
            variance_correction=options["variance_correction"],
            compute_dtype=torch.float32,
        )
        found["column_scale"] = (gradient.float() * y).sum(dim=0).to(column_scale.dtype)
    # From here on the gradient of nu * (P @ W^T) + shift term.
    if column_scale is not None:
        gradient = (gradient.float() * column_scale.float()).to(x.dtype)
    if not (needs["x"] or needs["weight"] or needs["shift"] or needs["shift_out"]):
        return found
    variance = Variance(selection.shifted(), selection.prune()) if options["variance_correction"] else None
    if needs["shift_out"]:
        eta = 1.0 if shift is not None else selection.eta()
        found["shift_out"] = (gradient.float() * eta).sum(dim=0).to(shift_out.dtype)
    if needs["weight"]:
        pruned = selection.prune() if variance is None else variance.survivors
        found["weight"] = _weight_gradient(gradient, pruned, variance, weight, selection, shift_out)
    if needs["x"] or needs["shift"]:
        found |= _input_gradients(gradient, variance, weight, selection, shift_out, needs)
    if needs["x"]:
        found["x"] = found["x"].to(x.dtype).view(x.shape)
    return found


def _weight_gradient(
    gradient: Tensor,
    pruned: Tensor,
    variance: Variance | None,
    weight: Tensor,
    selection: Selection,
    shift_out: Tensor | None,
) -> Tensor:
    """``(nu * G)^T @ P`` in the weight's memory layout, plus the shift image's part if the operator computes it."""
    scaled = gradient if variance is None else (gradient.float() * variance.nu).to(gradient.dtype)
    is_in_out = weight.stride(0) == 1 and weight.stride(1) != 1
    product = (pruned.t() @ scaled).t() if is_in_out else scaled.t() @ pruned
    if shift_out is not None or (selection.shift is None and selection.token_shift == "none"):
        return product
    if selection.shift is not None:
        image = gradient.sum(dim=0, dtype=torch.float32)[:, None] * selection.shift.float()
    else:
        image = (gradient.float() * selection.eta()).sum(dim=0)[:, None]
    return product + image.to(product.dtype)


def _input_gradients(
    gradient: Tensor,
    variance: Variance | None,
    weight: Tensor,
    selection: Selection,
    shift_out: Tensor | None,
    needs: Mapping[str, bool],
) -> dict[str, Tensor]:
    """Gradients of x, float32 [tokens, in], and of a static shift."""
    found = {}
    product = gradient @ weight  # H
    if variance is None:
        of_z = selection.masked(product)
    else:
        of_nu = (variance.survivors.float() * product.float()).sum(dim=-1, keepdim=True)
        through_z, through_pruned = variance.gradients(of_nu)
        of_z = selection.masked(product.float() * variance.nu + through_pruned) + through_z
    if needs["shift"] and selection.shift is not None:
        of_shift = -of_z.sum(dim=0, dtype=torch.float32)
        if shift_out is None:
            of_shift = of_shift + product.sum(dim=0, dtype=torch.float32)
        found["shift"] = of_shift.to(selection.shift.dtype)
    if not needs["x"]:
        return found
    of_eta = None
    if selection.token_shift != "none":
        image = product if shift_out is None else gradient.float() * shift_out.float()
        of_eta = image.sum(dim=-1, keepdim=True, dtype=torch.float32)
    found["x"] = selection.through_eta(of_z, of_eta)
    return found
