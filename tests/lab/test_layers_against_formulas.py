"""Every criterion and mitigation, layer by layer, against a plain transcription of its formula.

End to end, models differ by rounding that flips near ties (docs/evaluate.md); single layers do not.
"""

import itertools

import pytest
import torch
from criterion_formulas import FORMULAS

import nm_act
from nm_act import LinearSpec, NMLinear
from nm_act.methods import criteria
from nm_act.ops import composed, formulas

IN, OUT, TOKENS = 64, 24, 40
CRITERIA = [name for name, each in criteria.CRITERIA.items() if not each.prunes_weight]
MITIGATIONS = (
    (),
    ("var",),
    ("dpts-mean",),
    ("dpts-median",),
    ("dpts-mean", "var"),
    ("dpts-median", "var"),
    ("spts",),
    ("lpts",),
    ("ls",),
    ("lpts", "var"),
    ("ls", "lpts"),
    ("ls", "lpts", "var"),
)
PATTERNS = ("2:4", "4:8", "8:16", "16:32", "50%")


def transcribed(x, weight, bias, pattern, criterion, mitigation, data):
    """Outputs [tokens, out] and masks [tokens, in] by the papers' formulas, in float64 and one token after another."""
    x, weight = x.double(), weight.double()
    if criterion in FORMULAS:
        channel = torch.from_numpy(FORMULAS[criterion](weight.detach().numpy()))
    else:
        channel = {"act": torch.ones(IN), "clact": x.square().sum(dim=0).sqrt()}[criterion]
    rows, masks = [], []
    for token in x:
        eta = torch.zeros(IN, dtype=torch.float64)
        if "dpts-mean" in mitigation:
            eta = token.mean().expand(IN)
        elif "dpts-median" in mitigation:
            eta = token.median().expand(IN)
        elif {"lpts", "spts"} & set(mitigation):
            eta = data["shift"].double()
        z = token - eta
        score = z.abs() * channel
        mask = torch.zeros(IN, dtype=torch.bool)
        group, keep = (IN, IN // 2) if pattern == "50%" else map(int, reversed(pattern.split(":")))
        for start in range(0, IN, group):
            order = sorted(range(start, start + group), key=lambda i: (-score[i].item(), i))
            mask[order[:keep]] = True
        pruned = torch.where(mask, z, 0.0)
        nu = (z.var(unbiased=False) / pruned.var(unbiased=False)).sqrt() if "var" in mitigation else 1.0
        y = nu * (weight @ pruned) + weight @ eta
        if "ls" in mitigation:
            y = y * data["column_scale"].double() + data["added_bias"].double()
        rows.append(y + bias.double())
        masks.append(mask)
    return torch.stack(rows), torch.stack(masks)


CASES = [*itertools.product(PATTERNS, CRITERIA, [()]), *itertools.product(PATTERNS, ["act", "clact"], MITIGATIONS[1:])]


@pytest.mark.parametrize(("pattern", "criterion", "mitigation"), CASES)
def test_layer(pattern, criterion, mitigation):
    generator = torch.Generator().manual_seed(len(mitigation))
    linear = torch.nn.Linear(IN, OUT)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(OUT, IN, generator=generator))
    x = torch.randn(TOKENS, IN, generator=generator) * torch.rand(IN, generator=generator).exp()
    layer = NMLinear.from_linear(linear, LinearSpec(pattern, criterion, mitigation))
    data = {name: torch.randn(value.shape, generator=generator) / 8 for name, value in layer.data().items()}
    layer.set_data(**data)
    expected, masks = transcribed(x, linear.weight, linear.bias, pattern, criterion, mitigation, data)
    with torch.no_grad():
        found = layer(x[None])[0]
    assert (found - expected).abs().max() < 2e-6 * expected.abs().max()
    scale = criteria.call_scale(x) if criterion == "clact" else layer.channel_scale
    z = formulas.shifted(x, data.get("shift"), layer.spec.token_shift)
    assert torch.equal(composed.survivors(z, layer.spec.pattern, scale), masks)


@pytest.mark.parametrize("pattern", ["2:4", "8:16"])
def test_pruned_weights(pattern):
    """The baselines prune the weight, each row for itself, by its magnitude and, for wanda, the input's norm."""
    generator = torch.Generator().manual_seed(0)
    weight, norm = torch.randn(OUT, IN, generator=generator), torch.rand(IN, generator=generator)
    keep, group = map(int, pattern.split(":"))
    for name, scale in (("weight-magnitude", torch.ones(IN)), ("wanda", norm)):
        pruned = criteria.prune_weight(name, weight, nm_act.NMPattern(pattern), norm)
        for row, out in zip(weight, pruned, strict=True):
            for start in range(0, IN, group):
                part = row[start : start + group]
                kept = (part * scale[start : start + group]).abs().topk(keep).indices
                expected = torch.zeros(group).scatter(0, kept, part[kept])
                assert torch.equal(out[start : start + group], expected)
