"""Sparse layers of every kind that derives something from its weight, and the check that they follow a change."""

import copy

import torch
from torch import nn

from nm_act import NMLinear
from nm_act.methods.criteria import CRITERIA
from nm_act.recipe import LinearSpec

SPECS = {
    "act": LinearSpec("2:4"),
    **{name: LinearSpec("8:16", name) for name, each in CRITERIA.items() if each.formula is not None},
    "rsparse-4": LinearSpec("2:4", "wina", ("rsparse-4",)),
    "weight-magnitude": LinearSpec("2:4", "weight-magnitude"),
    "wanda": LinearSpec("2:4", "wanda"),
    "dpts-mean": LinearSpec("2:4", mitigation=("dpts-mean",)),
    "dpts-median": LinearSpec("2:4", mitigation=("dpts-median",)),
    "spts": LinearSpec("2:4", mitigation=("spts",)),
    "lpts": LinearSpec("2:4", mitigation=("lpts", "var")),
    "ls": LinearSpec("2:4", mitigation=("ls",)),
    "pcs": LinearSpec("2:4", "wina", ("pcs",)),
    "larosa": LinearSpec("2:4", "wina", ("larosa",)),
    "permute": LinearSpec("2:4", "wina", ("permute",)),
    "lifted": LinearSpec("2:4+1", "wina"),
}
SIZES = (64, 24)


def dense_layer(seed: int) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(*SIZES)


def random_data(layer: NMLinear) -> dict[str, torch.Tensor]:
    torch.manual_seed(5)
    data = {name: torch.rand(value.shape) + 0.5 for name, value in layer.data().items()}
    if "rotation" in data:
        data["rotation"] = torch.linalg.qr(data["rotation"]).Q
    if "input_order" in data:
        data["input_order"] = torch.arange(SIZES[0]).float()
    return data


def sparse_layer(name: str, dense: nn.Linear, layout: str = "in_out") -> NMLinear:
    layer = NMLinear.from_linear(copy.deepcopy(dense), SPECS[name], weight_layout=layout, lift=name == "lifted")
    layer.set_data(**random_data(layer))
    return layer.eval()


X = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def check_follows(layer: NMLinear, weight: torch.Tensor, name: str) -> None:
    """The layer equals one that was made from this weight; and the weight is one that matters."""
    dense = dense_layer(0)
    other = sparse_layer(name, dense)(X)
    dense.weight.copy_(weight)
    expected = sparse_layer(name, dense)(X)
    assert (other - expected).abs().max() > 0.1
    for _ in range(2):
        torch.testing.assert_close(layer(X), expected, rtol=1e-4, atol=1e-5)
