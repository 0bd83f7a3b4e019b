"""A saved nm_act checkpoint in vLLM: only its name is needed, as in vLLM's server (docs/serving.md).

python examples/vllm_generate.py MODEL [DTYPE]

By default (dtype "auto") vLLM computes a float32 checkpoint in 16 bits, where other inputs survive. Pass float32
(`--dtype float32` to a server) to get the tokens that Transformers generates from it.
"""

import os
import sys

if __name__ == "__main__":  # vLLM starts processes that import this file again
    if len(sys.argv) not in (2, 3):
        raise SystemExit(f"expected MODEL [DTYPE], got {len(sys.argv) - 1} arguments; name a folder that nm_act saved")
    model, dtype = (*sys.argv[1:], "auto")[:2]
    if not os.path.isfile(os.path.join(model, "config.json")):
        raise SystemExit(f"expected the folder of a model, got {model} without config.json; save a model there")
    try:
        from vllm import LLM, SamplingParams
    except ImportError as error:
        raise SystemExit(
            "expected vLLM, got none; install it with: pip install -e '.[vllm]' in a checkout of nm_act"
        ) from error

    llm = LLM(model, dtype=dtype, max_model_len=64, max_num_seqs=2, skip_tokenizer_init=True)
    sampling = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False)
    (output,) = llm.generate([{"prompt_token_ids": [5, 7, 11, 13]}], sampling)
    print("generated", list(output.outputs[0].token_ids))
