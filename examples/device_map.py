"""A model larger than one device: accelerate places its layers, on disk if memory does not suffice.

python examples/device_map.py MODEL
"""

import importlib.util
import os
import sys
import tempfile

import torch
from transformers import AutoModelForCausalLM

import nm_act  # noqa: F401  (a sparse checkpoint loads sparse)


def main(model_path: str) -> None:
    """Load, generate, say where the layers are."""
    with tempfile.TemporaryDirectory() as folder:
        model = AutoModelForCausalLM.from_pretrained(model_path, device_map="auto", offload_folder=folder)
        tokens = model.generate(torch.tensor([[5, 7, 11, 13]]).to(model.device), max_new_tokens=8, do_sample=False)
        places = {"disk" if weight.is_meta else str(weight.device) for weight in model.parameters()}
        print(", ".join(sorted(places)), tokens[0].tolist())


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(f"expected MODEL, got {len(sys.argv) - 1} arguments; name the folder of a model")
    if not os.path.isfile(os.path.join(sys.argv[1], "config.json")):
        raise SystemExit(f"expected the folder of a model, got {sys.argv[1]} without config.json; save a model there")
    if importlib.util.find_spec("accelerate") is None:
        raise SystemExit(
            "expected accelerate, got none; install it with: pip install -e '.[accelerate]' in a checkout of nm_act"
        )
    main(sys.argv[1])
