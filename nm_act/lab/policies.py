"""Published rules for which projections of a decoder become sparse, as fields of a recipe."""

from ..recipe import DEFAULT_PROJECTIONS, Recipe

POLICIES = {
    "all": DEFAULT_PROJECTIONS,
    "amber": ("q_proj", "gate_proj", "down_proj"),
    "alanova": ("k_proj", "v_proj", "gate_proj", "down_proj"),
}
"""Name -> projections whose inputs are pruned.

"amber" is Amber-Pruner's skip rule (never k, v, o, up) without its list of sensitive layers, which was published only
for Llama-3.1-8B; "alanova" is the subset of arXiv 2509.22166.
"""


def policy_of(recipe: Recipe) -> str:
    """Name of the policy that a recipe follows; "custom" if none.

    Examples
    --------
    >>> policy_of(Recipe("2:4")), policy_of(Recipe("2:4", skip_layers=[0]))
    ('all', 'custom')
    """
    if recipe.rules or recipe.skip_layers or recipe.phase != "both":
        return "custom"
    return next((name for name, chosen in POLICIES.items() if set(chosen) == set(recipe.projections)), "custom")
