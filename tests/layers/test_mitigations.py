"""Every method against a transcription of its formula in float64, and the identities that hold between methods."""

import copy

import pytest
import torch
from torch import nn

from nm_act import reference
from nm_act.layers.linear import NMLinear
from nm_act.layers.tokens import TokenContext
from nm_act.methods import mitigations
from nm_act.ops import composed
from nm_act.patterns import NMPattern, TopKPattern, as_pattern
from nm_act.recipe import LinearSpec

IN, OUT, RANK = 32, 24, 4


def _layer(spec: LinearSpec, *, bias=True, **data) -> tuple[nn.Linear, NMLinear]:
    torch.manual_seed(1)
    dense = nn.Linear(IN, OUT, bias=bias)
    layer = NMLinear.from_linear(copy.deepcopy(dense), spec)
    layer.set_data(**data)
    return dense.double(), layer


def _data(spec: LinearSpec) -> dict[str, torch.Tensor]:
    """Arbitrary calibrated data of the right shapes; a rotation is orthogonal, a smoothing positive."""
    generator = torch.Generator().manual_seed(2)
    data = {}
    for name in mitigations.data_of(spec):
        shape = mitigations.shape_of(name, IN, OUT, mitigations.rank_of(spec.mitigation))
        data[name] = torch.randn(shape, generator=generator) * 0.3
    if "rotation" in data:
        data["rotation"] = torch.linalg.qr(data["rotation"]).Q
    if "smoothing" in data:
        data["smoothing"] = data["smoothing"].abs() + 0.1
    return data


def _keep(score: torch.Tensor, pattern: str) -> torch.Tensor:
    """Mask of the best scores, by sorting each group (no ties in these inputs)."""
    pattern = as_pattern(pattern)
    if isinstance(pattern, TopKPattern):
        keep, groups = pattern.keep_of(score.shape[-1]), score.unflatten(-1, (1, -1))
    else:
        keep, groups = pattern.keep, score.unflatten(-1, (-1, pattern.group))
    threshold = groups.sort(dim=-1, descending=True).values[..., keep - 1 : keep]
    return (groups >= threshold).flatten(-2)


def _p(x, pattern, scale=1.0):
    return x * _keep((x * scale).abs(), pattern)


def _var(x):
    return ((x - x.mean(-1, keepdim=True)) ** 2).mean(-1, keepdim=True)


def _shift(x, d, eta, pattern):
    """(P(X - eta) + eta) W^T + b: the shift is put back in front of the product, as the papers write it."""
    return (_p(x - eta, pattern) + eta) @ d.weight.T + d.bias


def _dpts_var(x, d, pattern):
    eta = x.mean(-1, keepdim=True)
    z = x - eta
    nu = (_var(z) / _var(_p(z, pattern))).sqrt()
    return nu * (_p(z, pattern) @ d.weight.T) + eta @ d.weight.sum(1)[None] + d.bias


def _low_rank(x, d, data, pattern):
    ab = data["low_rank_out"] @ data["low_rank_in"]
    pruned = _p(x, pattern)
    return pruned @ d.weight.T + (x - pruned) @ ab.T + d.bias


def _var_ls_lpts(x, d, c, pattern):
    z = x - c["shift"]
    nu = (_var(z) / _var(_p(z, pattern))).sqrt()
    y = nu * (_p(z, pattern) @ d.weight.T) + d.weight @ c["shift"]
    return y * c["column_scale"] + d.bias + c["added_bias"]


FORMULAS = {
    ("var",): lambda x, d, c, p: (_var(x) / _var(_p(x, p))).sqrt() * (_p(x, p) @ d.weight.T) + d.bias,
    ("dpts-mean",): lambda x, d, c, p: _shift(x, d, x.mean(-1, keepdim=True), p),
    ("dpts-median",): lambda x, d, c, p: _shift(x, d, x.median(-1, keepdim=True).values, p),
    ("dpts-mean", "var"): lambda x, d, c, p: _dpts_var(x, d, p),
    ("spts",): lambda x, d, c, p: _shift(x, d, c["shift"], p),
    ("spts-scalar",): lambda x, d, c, p: _shift(x, d, c["shift"], p),
    ("lpts",): lambda x, d, c, p: _shift(x, d, c["shift"], p),
    ("ls",): lambda x, d, c, p: (_p(x, p) @ d.weight.T) * c["column_scale"] + d.bias + c["added_bias"],
    ("ls", "lpts", "var"): _var_ls_lpts,
    ("rsparse-4",): _low_rank,
    ("rsparse-4-trained",): _low_rank,
    ("pcs",): lambda x, d, c, p: _p(x / c["smoothing"], p) @ (d.weight * c["smoothing"]).T + d.bias,
    ("larosa",): lambda x, d, c, p: _p(x @ c["rotation"], p) @ (d.weight @ c["rotation"]).T + d.bias,
    ("permute",): lambda x, d, c, p: _p(x, p) @ d.weight.T + d.bias,  # the order is folded into other layers
    ("rsparse-4-fit",): _low_rank,
}


@torch.no_grad()
@pytest.mark.parametrize("names", FORMULAS, ids="+".join)
@pytest.mark.parametrize("pattern", ["2:4", "8:16", "50%"])
@pytest.mark.parametrize("differentiable", [False, True], ids=["operator", "composed"])
def test_method_equals_its_formula_in_float64(names, pattern, differentiable):
    spec = LinearSpec(pattern, mitigation=names)
    data = _data(spec)
    dense, layer = _layer(spec, **data)
    layer.differentiable = differentiable
    # 33 tokens, more than decode takes at once, and an odd number of features' medians
    x = torch.randn(3, 11, IN, generator=torch.Generator().manual_seed(3)) + 0.2
    expected = FORMULAS[names](x.double(), dense, {k: v.double() for k, v in data.items()}, pattern)
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-4, atol=1e-5)


def test_every_mitigation_has_a_formula():
    assert set(mitigations.MITIGATIONS) <= {name for names in FORMULAS for name in names}


@torch.no_grad()
@pytest.mark.parametrize("names", [("rsparse-4", "lpts", "ls", "var"), ("larosa", "rsparse-4", "dpts-mean", "var")])
def test_combinations_keep_their_parts(names):
    """What the module's head says: the low-rank term unscaled, everything else in the selection's basis."""
    spec = LinearSpec("2:4", mitigation=names)
    data = _data(spec)
    dense, layer = _layer(spec, **data)
    c = {k: v.double() for k, v in data.items()}
    x = torch.randn(17, IN).double()
    ab = c["low_rank_out"] @ c["low_rank_in"]
    q = c.get("rotation", torch.eye(IN).double())
    v, t = (dense.weight - ab) @ q, x @ q
    eta = c["shift"] if "shift" in c else t.mean(-1, keepdim=True).expand_as(t)
    nu = (_var(t - eta) / _var(_p(t - eta, "2:4"))).sqrt()
    y = (nu * (_p(t - eta, "2:4") @ v.T) + eta @ v.T) * c.get("column_scale", 1.0)
    y = y + dense.bias + c.get("added_bias", 0.0) + x @ ab.T
    torch.testing.assert_close(layer(x.float()).double(), y, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("names", [("rsparse-4",), ("larosa", "ls"), ("spts", "var")], ids="+".join)
@pytest.mark.parametrize("shape", [(IN,), (0, IN), (1, IN)], ids=str)
def test_few_tokens(names, shape):
    spec = LinearSpec("2:4", mitigation=names)
    _, layer = _layer(spec, **_data(spec))
    x = torch.randn(shape)
    rows = layer(torch.cat([x.reshape(-1, IN), torch.randn(20, IN)]))
    torch.testing.assert_close(layer(x), rows[: x.numel() // IN].view(*shape[:-1], OUT), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_identities():
    x = torch.randn(9, IN).double()
    w = torch.randn(OUT, IN).double()
    eta = x.mean(-1, keepdim=True)
    p = _p(x - eta, "2:4")
    torch.testing.assert_close((p + eta) @ w.T, p @ w.T + eta * w.sum(1))
    nu = reference.variance_ratio(x, _p(x, "2:4"))
    torch.testing.assert_close(_var(nu * _p(x, "2:4")), _var(x))
    quads = reference.selection_mask(x, NMPattern("2:4"))
    assert torch.equal(quads.unflatten(-1, (-1, 16)).sum(-1), torch.full((9, IN // 16), 8))
    energy = [(_p(x, pattern) ** 2).unflatten(-1, (-1, 16)).sum(-1) for pattern in ("2:4", "8:16")]
    assert (energy[1] >= energy[0]).all()


@torch.no_grad()
def test_a_low_rank_pair_of_full_rank_is_the_dense_layer():
    low_in, low_out = mitigations.low_rank_of(_layer(LinearSpec("2:4"))[0].weight, OUT)
    dense, layer = _layer(LinearSpec("2:4", mitigation=[f"rsparse-{OUT}"]), low_rank_in=low_in, low_rank_out=low_out)
    x = torch.randn(9, IN)
    torch.testing.assert_close(layer(x).double(), dense(x.double()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("out", [OUT, 2 * IN])
def test_the_fitted_pair_leaves_less_error_than_any_other(out):
    w, x = torch.randn(out, IN).double(), torch.randn(500, IN).double() @ torch.randn(IN, IN).double()
    lost = x - _p(x, "2:4")
    error = lambda pair: (lost @ (w - pair[1].double() @ pair[0].double()).T).square().sum().item()  # noqa: E731
    best = error(mitigations.fitted_low_rank_of(w, lost.T @ lost, RANK))
    # The optimum by another way: what the rank-R part of the errors themselves leaves.
    assert best == pytest.approx(torch.linalg.svdvals(lost @ w.T)[RANK:].square().sum().item(), rel=1e-5)
    assert best < error(mitigations.low_rank_of(w, RANK))


def test_the_low_rank_pair_is_the_best_of_its_rank():
    w = torch.randn(OUT, IN)
    low_in, low_out = mitigations.low_rank_of(w, RANK)
    u, s, v = torch.linalg.svd(w.double())
    torch.testing.assert_close((low_out @ low_in).double(), u[:, :RANK] * s[:RANK] @ v[:RANK], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_rotation_without_selection_changes_nothing():
    """LaRoSA with keep == group: what is pruned is all that differs from dense."""
    q = mitigations.rotation_of(torch.cov(torch.randn(IN, 100)))
    torch.testing.assert_close(q.T @ q, torch.eye(IN), rtol=0, atol=1e-5)
    spec = LinearSpec("31:32", mitigation=["larosa"])
    dense, layer = _layer(spec, rotation=q)
    x = torch.randn(9, IN)
    rotated = (x @ q).double()
    lost = rotated - _p(rotated, "31:32")
    expected = dense(x.double()) - lost @ (dense.weight @ q.double()).T
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-4, atol=1e-5)


def test_rotation_has_the_largest_variance_first():
    scale = torch.linspace(1, 3, IN)
    x = torch.randn(4000, IN) * scale
    variance = (x @ mitigations.rotation_of(torch.cov(x.T))).var(dim=0)
    assert (variance.diff() <= 1e-3).all()


def test_smoothing_never_divides_by_zero():
    w = torch.randn(OUT, 4)
    w[:, 1] = 0.0
    s = mitigations.smoothing_of(torch.tensor([0.0, 2.0, 2.0, 8.0]), w)
    expected = [1.0, 1.0, *(torch.tensor([2.0, 8.0]) / w[:, 2:].abs().amax(0)).sqrt().tolist()]
    torch.testing.assert_close(s, torch.tensor(expected))
    assert s.reciprocal().isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("criterion", ["act", "clact", "wina", "variance"])
def test_smoothing_under_every_criterion(criterion):
    spec = LinearSpec("2:4", criterion, ("pcs",))
    data = _data(spec)
    dense, layer = _layer(spec, **data)
    s = data["smoothing"].double()
    x, w = torch.randn(9, IN).double() / s, dense.weight * s
    scale = {"act": 1.0, "clact": x.norm(dim=0), "wina": w.norm(dim=0), "variance": w.var(dim=0, correction=0)}
    expected = _p(x, "2:4", scale[criterion]) @ w.T + dense.bias
    torch.testing.assert_close(layer((x * s).float()).double(), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_clact_ranks_by_the_norms_of_each_sequence():
    dense, layer = _layer(LinearSpec("2:4", "clact"))
    x = torch.randn(2, 7, IN) * torch.rand(2, 1, IN)
    expected = torch.stack([_p(s, "2:4", s.norm(dim=0)) @ dense.weight.T + dense.bias for s in x.double()])
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer(x[0]), layer(x)[0])
    assert layer(x[:0]).shape == (0, 7, OUT)


class Stack(nn.Module):
    """A decoder stack of one layer, which may flatten its tokens."""

    def __init__(self, layer, flatten):
        super().__init__()
        self.layer, self.flatten = layer, flatten

    def forward(self, inputs_embeds, attention_mask=None):
        y = self.layer(inputs_embeds.flatten(0, 1) if self.flatten else inputs_embeds)
        return y.view(*inputs_embeds.shape[:2], -1)


@torch.no_grad()
@pytest.mark.parametrize("flatten", [False, True])
def test_clact_leaves_padding_out_and_finds_sequences(flatten):
    _, layer = _layer(LinearSpec("2:4", "clact"))
    x = torch.randn(2, 7, IN) * torch.rand(2, 1, IN)
    expected = [layer(x[0]), layer(x[1, 3:])]
    x[1, :3] = 100 * torch.randn(3, IN)
    layer.token_context = TokenContext(0)
    stack = Stack(layer, flatten)
    layer.token_context.attach(stack)
    mask = torch.ones(2, 7, dtype=torch.int64)
    mask[1, :3] = 0
    y = stack(x, attention_mask=mask)
    torch.testing.assert_close(y[0], expected[0])
    torch.testing.assert_close(y[1, 3:], expected[1])
    assert not torch.equal(stack(x)[1, 3:], expected[1])


@torch.no_grad()
@pytest.mark.parametrize("shape", [(IN,), (1, IN), (5, 1, IN)], ids=str)
def test_clact_equals_act_for_one_token(shape):
    _, layer = _layer(LinearSpec("2:4", "clact"))
    _, act = _layer(LinearSpec("2:4"))
    x = torch.randn(shape)
    assert torch.equal(layer(x), act(x))


@torch.no_grad()
@pytest.mark.parametrize("criterion", ["weight-magnitude", "wanda"])
def test_weight_pruning_leaves_the_activation_dense(criterion):
    spec = LinearSpec("2:4", criterion)
    data = {name: value.abs() for name, value in _data(spec).items()}
    dense, layer = _layer(spec, **data)
    x = torch.randn(9, IN)
    pruned = _p(dense.weight, "2:4", data.get("input_norm", torch.ones(IN)).double())
    torch.testing.assert_close(layer(x).double(), x.double() @ pruned.T + dense.bias, rtol=1e-4, atol=1e-5)
    assert torch.equal(layer.weight.double(), dense.weight)


@pytest.mark.parametrize("name", ["lpts", "ls", "rsparse-4", "pcs", "larosa", "permute"])
def test_uncalibrated_layers_say_so(name):
    layer = NMLinear(IN, OUT, spec=LinearSpec("2:4", mitigation=[name]))
    with pytest.raises(RuntimeError, match=r"expected calibrated data for 2:4 act .*, got no .*nm-act calibrate"):
        layer(torch.randn(3, IN))


@pytest.mark.parametrize(
    "data", [{"shift": torch.zeros(IN + 1)}, {"rotation": torch.eye(IN)}, {"shift": torch.zeros(IN, 1)}]
)
def test_data_of_another_layer_is_refused(data):
    layer = NMLinear(IN, OUT, spec=LinearSpec("2:4", mitigation=["lpts"]))
    with pytest.raises(ValueError, match=r"expected calibrated data among shift \[32\], got .*another recipe or model"):
        layer.set_data(**data)


@torch.no_grad()
@pytest.mark.parametrize("names", [("ls", "lpts"), ("rsparse-4",), ("larosa",)], ids="+".join)
@pytest.mark.parametrize("assign", [False, True])
def test_calibrated_data_travels_in_the_state_dict(names, assign):
    spec = LinearSpec("2:4", mitigation=names)
    _, layer = _layer(spec, **_data(spec))
    other = NMLinear(IN, OUT, spec=spec)
    other.load_state_dict(layer.state_dict(), assign=assign)
    x = torch.randn(3, IN)
    assert torch.equal(other(x), layer(x))
    assert set(layer.state_dict()) == {"weight", "bias", *mitigations.data_of(spec)}


@torch.no_grad()
def test_vectors_stay_float32_and_derived_data_follows_the_stored_weight():
    spec = LinearSpec("2:4", mitigation=["ls", "lpts", "rsparse-4"])
    data = _data(spec)
    _, layer = _layer(spec, **data)
    layer.to(torch.bfloat16)
    assert layer.shift.dtype == layer.column_scale.dtype == torch.float32
    assert torch.equal(layer.shift, data["shift"])
    assert layer.low_rank_in.dtype == layer.operand_weight.dtype == torch.bfloat16
    ab = layer.low_rank_out.double() @ layer.low_rank_in.double()
    torch.testing.assert_close(layer.operand_weight.double(), layer.weight.double() - ab, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(layer.shift_out.double(), layer.operand_weight.double() @ data["shift"].double())
    assert layer(torch.randn(3, IN, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_gradients_with_a_constant_mask():
    spec = LinearSpec("2:4", mitigation=["ls", "lpts", "rsparse-4", "var"])
    dense, layer = _layer(spec, **_data(spec))
    layer.differentiable = True
    for value in layer.data().values():
        value.requires_grad_()
    x = torch.randn(5, IN)
    with torch.no_grad():
        mask = _keep((x - layer.shift).abs(), "2:4")

    def formula(shift, column_scale, added_bias, low_in, low_out):
        z = x.double() - shift
        kept = z * mask
        v = dense.weight - low_out @ low_in
        y = (_var(z) / _var(kept)).sqrt() * (kept @ v.T) + v @ shift
        return y * column_scale + dense.bias + added_bias + x.double() @ low_in.T @ low_out.T

    data = [value.detach().double().requires_grad_() for value in layer.data().values()]
    target = torch.randn(5, OUT)
    actual = torch.autograd.grad(((layer(x) - target) ** 2).mean(), list(layer.data().values()))
    expected = torch.autograd.grad(((formula(*data) - target) ** 2).mean(), data)
    for got, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-5)


def test_a_survivor_that_is_zero_has_a_gradient():
    x = torch.tensor([[0.0, 0.0, 0.0, 2.0]], requires_grad=True)
    composed.sparse_linear(x, torch.ones(3, 4), None, NMPattern("2:4")).sum().backward()
    assert x.grad.tolist() == [[3.0, 0.0, 0.0, 3.0]]  # the lowest index wins the tie


def test_composed_selection_passes_the_gradient_of_survivors_only():
    x = torch.randn(3, IN, requires_grad=True)
    y = composed.sparse_linear(x, torch.eye(IN), None, NMPattern("2:4"))
    y.sum().backward()
    assert torch.equal(x.grad, _keep(x.detach().abs(), "2:4").float())


@pytest.mark.parametrize("percent", [3, 50, 96.9])
@pytest.mark.parametrize("scaled", [False, True])
def test_top_k_selects_as_the_oracle_does(percent, scaled):
    generator = torch.Generator().manual_seed(4)
    ties = torch.randint(-3, 4, (5, IN), generator=generator).float()
    odd = torch.tensor([0.0, -0.0, float("inf"), float("nan"), 3e38, 1.0, -1.0, -float("inf")]).repeat(IN // 8)
    z = torch.cat([ties, odd[None], torch.full((1, IN), -0.0), torch.randn(4, IN, generator=generator)])
    scale = torch.randint(0, 3, (IN,), generator=generator).float() if scaled else None
    pattern = TopKPattern(percent)
    expected = torch.where(reference.selection_mask(z, pattern, scale), z, torch.zeros(()))
    torch.testing.assert_close(composed.select(z, pattern, scale), expected, rtol=0, atol=0, equal_nan=True)
