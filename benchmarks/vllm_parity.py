"""How often vLLM generates what Transformers does, and what a difference comes from.

python benchmarks/vllm_parity.py MODEL [--tokens 48] [--recipe NAME=JSON ...]

For each recipe and prompt, in float32 and greedily, one sequence at a time: the number of equal tokens of vLLM (eager)
and of Transformers token by token; and how far Transformers' logits for the same text are apart when it reads it token
by token and at once. For the first token that differs, the first selection that differs on the way to it is printed:
the scores of the two inputs that changed places, their distance, and the distance of the two engines' inputs there.
"""

import argparse
import json
import os
import re
import tempfile
from collections import defaultdict
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nm_act import NMLinear, Recipe, ops, sparsify

PROMPTS = [
    "The capital of France is",
    "Water boils at a temperature of",
    "To sort a list in Python, you can",
    "Once upon a time, in a small village by the sea,",
    "The three laws of thermodynamics state that",
    "A balanced breakfast should contain",
    "In 1969, the Apollo 11 mission",
    "The main difference between a virus and a bacterium is",
    "Dear Sir or Madam, I am writing to",
    "Photosynthesis is the process by which",
]
RECIPES = {
    "dense": None,
    "8:16": {"pattern": "8:16"},
    "8:16 wina+var": {"pattern": "8:16", "criterion": "wina", "mitigation": ["var"]},
}
MERGED = {"qkv_proj": "q_proj", "gate_up_proj": "gate_proj"}


class Watch:
    """What each layer reads, over all calls; a callable that vLLM's worker runs, too."""

    def __init__(self, what: str):
        self.what = what

    def __call__(self, model):
        if self.what == "start":
            model.seen = defaultdict(list)
            for name, module in model.named_modules():
                last = name.rpartition(".")[2]
                if last in ("q_proj", "o_proj", "gate_proj", "down_proj", *MERGED):
                    key = name.removesuffix(last) + MERGED.get(last, last)
                    module.register_forward_pre_hook(
                        lambda _, x, key=key: model.seen[key].append(x[0].detach().flatten(0, -2).clone())
                    )
        elif self.what == "clear":
            model.seen.clear()
        else:
            torch.save({key: torch.cat(value) for key, value in model.seen.items()}, self.what)


@torch.no_grad()
def incremental(model, tokens: list[int], prompt: int) -> torch.Tensor:
    """Logits of a text whose prompt is read at once and the rest token by token."""
    cache, rows = None, []
    for piece in (tokens[:prompt], *([token] for token in tokens[prompt:])):
        output = model(torch.tensor([piece]), past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        rows.append(output.logits[0])
    return torch.cat(rows)


def first_flip(model, mine, theirs, prompt: int) -> str:
    """The first selection that differs: by token, then by the layers' order."""
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, NMLinear)]
    for token in range(min(map(len, (*mine.values(), *theirs.values())))):
        for name, layer in layers:
            read = re.sub("[kv]_proj$", "q_proj", name).replace("up_proj", "gate_proj")
            inputs = [seen[read][token] for seen in (mine, theirs)]
            scores = [x.abs() if layer.channel_scale is None else x.abs() * layer.channel_scale for x in inputs]
            options = {"channel_scale": layer.channel_scale}
            kept = [ops.prune(x[None], layer.spec.pattern, **options)[0] != 0 for x in inputs]
            changed = (kept[0] != kept[1]).nonzero().flatten()
            if len(changed):
                group = layer.spec.pattern.group
                one, two = changed[changed // group == changed[0] // group][:2].tolist()
                (here, there), apart = scores, (inputs[0] - inputs[1]).norm() / inputs[0].norm()
                return (
                    f"token {token} ({'prompt' if token < prompt else 'generated'}), {name}, inputs {one} and {two}: "
                    f"{here[one]:.7g} and {here[two]:.7g} in Transformers, {there[one]:.7g} and {there[two]:.7g} in "
                    f"vLLM; apart by {abs(here[one] - here[two]) / here[one]:.1e}, the engines' inputs by {apart:.1e}"
                )
    return "no selection differs"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--recipe", action="append", default=[], metavar="NAME=JSON")
    arguments = parser.parse_args()
    os.environ |= {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    from vllm import LLM, SamplingParams

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    prompts = [tokenizer(text)["input_ids"] for text in PROMPTS]
    recipes = RECIPES | {name: json.loads(text) for name, _, text in (each.partition("=") for each in arguments.recipe)}
    for name, fields in recipes.items():
        recipe = None if fields is None else Recipe(**fields)
        overrides = {}
        if recipe is not None:
            overrides["quantization_config"] = {"quant_method": "nm_act", "recipe": recipe.to_dict()}
        options = {"dtype": "float32", "max_model_len": 512, "max_num_seqs": 1, "enforce_eager": True}
        llm = LLM(arguments.model, hf_overrides=overrides, enable_prefix_caching=False, **options)
        llm.apply_model(Watch("start"))
        model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
        if recipe is not None:
            model = sparsify(model, recipe).model
        Watch("start")(model)
        sampling = SamplingParams(temperature=0, max_tokens=arguments.tokens, ignore_eos=True)
        equal, apart = 0, []
        for text, prompt in zip(PROMPTS, prompts, strict=True):
            llm.apply_model(Watch("clear"))
            (output,) = llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)
            theirs = list(output.outputs[0].token_ids)
            ids = torch.tensor([prompt])
            mine = model.generate(ids, max_new_tokens=arguments.tokens, do_sample=False, eos_token_id=None)[0]
            mine = mine[len(prompt) :].tolist()
            same = next((i for i, pair in enumerate(zip(mine, theirs, strict=True)) if pair[0] != pair[1]), len(mine))
            equal += same == len(mine)
            with torch.no_grad():
                whole = model(torch.tensor([prompt + mine])).logits[0]
            model.seen.clear()
            pieces = incremental(model, prompt + mine, len(prompt))
            apart.append(((whole - pieces).norm(dim=-1) / whole.norm(dim=-1)).median().item())
            told = f"{name}: {text!r}: {same} of {len(mine)} tokens equal; Transformers against itself {apart[-1]:.1e}"
            if same < len(mine) and recipe is not None:
                with tempfile.TemporaryDirectory() as folder:
                    llm.apply_model(Watch(str(Path(folder) / "seen.pt")))
                    seen = torch.load(Path(folder) / "seen.pt")
                here = {key: torch.cat(value)[: len(prompt) + same] for key, value in model.seen.items()}
                seen = {key: value[: len(prompt) + same] for key, value in seen.items()}
                told += "\n  " + first_flip(model, here, seen, len(prompt))
            print(told, flush=True)
        print(f"{name}: {equal} of {len(prompts)} prompts equal", flush=True)
        del llm


if __name__ == "__main__":
    main()
