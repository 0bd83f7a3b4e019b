"""A saved nm_act checkpoint in vLLM: nothing but its name is needed, `vllm serve MODEL` works the same way.

python examples/vllm_generate.py MODEL
"""

import sys

if __name__ == "__main__":  # vLLM starts processes that import this file again
    if len(sys.argv) != 2:
        raise SystemExit(f"expected MODEL, got {len(sys.argv) - 1} arguments; name a folder that nm_act saved")
    try:
        from vllm import LLM, SamplingParams
    except ImportError as error:
        raise SystemExit("expected vLLM, got none; install it with: pip install 'nm_act[vllm]'") from error

    llm = LLM(sys.argv[1], dtype="auto", max_model_len=64, max_num_seqs=2, skip_tokenizer_init=True)
    sampling = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False)
    (output,) = llm.generate([{"prompt_token_ids": [5, 7, 11, 13]}], sampling)
    print("generated", list(output.outputs[0].token_ids))
