"""vLLM's OpenAI server, as its users start it: a dense checkpoint served sparse, over HTTP."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import tp_cases
from conftest import needs

from nm_act import Recipe, sparsify

pytestmark = [needs("vllm"), pytest.mark.slow]

PROMPT = [5, 7, 11, 13]
RECIPE = Recipe("8:16", mitigation=["var"])
OVERRIDES = {"quantization_config": {"quant_method": "nm_act", "recipe": RECIPE.to_dict(), "prepack": True}}
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_SERVER_DEV_MODE": "1"}


class Server:
    """A running server and what is asked of it."""

    def __init__(self, folder, *arguments: str):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [
            sys.executable,
            "-m",
            "vllm.entrypoints.openai.api_server",
            "--model",
            folder,
            "--port",
            str(self.port),
        ]
        self.log = folder.parent / "server.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*command, "--served-model-name", "tiny", *arguments],
                env=os.environ | ENVIRONMENT,
                cwd=folder.parent,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        deadline = time.monotonic() + 300
        while self.status("health") != 200:
            running = self.process.poll() is None and time.monotonic() < deadline
            assert running, self.log.read_text()[-5000:]
            time.sleep(0.5)

    def status(self, path: str) -> int:
        try:
            return self.open(path).status
        except OSError:
            return 0

    def open(self, path: str, body: dict | None = None):
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        return urllib.request.urlopen(
            urllib.request.Request(f"http://127.0.0.1:{self.port}/{path}", data, headers), timeout=120
        )

    def post(self, path: str, **body) -> dict:
        return json.loads(self.open(path, body).read() or "null")

    def refusal(self, path: str, **body) -> str:
        with pytest.raises(urllib.error.HTTPError) as refused:
            self.open(path, body)
        return refused.value.read().decode()

    def tokens(self, prompt: list[int], **options) -> list[int]:
        """Greedy continuation."""
        options = {
            "model": "tiny",
            "max_tokens": 8,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        } | options
        return self.post("v1/completions", prompt=prompt, **options)["choices"][0]["token_ids"]

    def group(self) -> list[str]:
        """Processes that the server started and that still run."""
        run = subprocess.run(["ps", "-o", "pid=,stat=", "-g", str(self.process.pid)], capture_output=True, text=True)
        return [line for line in run.stdout.splitlines() if " Z" not in line]


def _dense(folder, seed: int):
    """A tiny dense Llama with a character tokenizer and a chat template."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    model = tp_cases.build(seed)
    model.save_pretrained(folder)
    raw = Tokenizer(models.WordLevel({chr(code): code for code in range(128)}, unk_token="?"))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="?", bos_token="\x01", pad_token="\x00")
    tokenizer.chat_template = "{% for message in messages %}{{ message.role }}:{{ message.content }};{% endfor %}"
    tokenizer.save_pretrained(folder)
    return model


def _expected(dense, prompt: list[int], length: int = 8) -> list[int]:
    """What Transformers generates from the sparse model; no near tie, so that the order of sums decides nothing."""
    model = sparsify(dense, RECIPE).model
    tokens = model.generate(torch.tensor([prompt]), max_new_tokens=length, do_sample=False)[0]
    with torch.no_grad():
        best = model(tokens[None, :-1]).logits[0, len(prompt) - 1 :].topk(2).values
    assert (best[:, 0] - best[:, 1]).min() > 1e-3
    return tokens[len(prompt) :].tolist()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of two models with one architecture, and the tokens that each generates."""
    place = tmp_path_factory.mktemp("served")
    return {
        name: (place / name, _expected(_dense(place / name, seed), PROMPT))
        for name, seed in (("first", 0), ("second", 1))
    }


@pytest.fixture(scope="module")
def server(models):
    """vLLM's server of a dense model with ``--hf-overrides RECIPE``; stopped by SIGTERM, which ends all of its processes."""
    folder, _ = models["first"]
    served = Server(
        folder,
        *("--dtype", "float32", "--max-model-len", "64", "--max-num-seqs", "8"),
        *("--hf-overrides", json.dumps(OVERRIDES)),
    )
    yield served
    served.process.send_signal(signal.SIGTERM)
    try:
        code = served.process.wait(60)
        deadline = time.monotonic() + 20
        while served.group() and time.monotonic() < deadline:  # Python's resource tracker ends after its parent
            time.sleep(0.2)
    finally:
        left = served.group()
        if left:
            os.killpg(served.process.pid, signal.SIGKILL)
    assert (code, left) == (0, []), served.log.read_text()[-3000:]


def test_a_dense_checkpoint_is_served_sparse(server, models):
    assert "nm_act: 14 projections are sparse, 0 are dense, in 8 linear layers" in server.log.read_text()
    assert server.tokens(PROMPT) == models["first"][1]


def test_chat(server):
    messages = [{"role": "user", "content": "hello"}]
    reply = server.post("v1/chat/completions", model="tiny", messages=messages, max_tokens=4, ignore_eos=True)
    assert reply["usage"]["completion_tokens"] == 4
    assert reply["choices"][0]["finish_reason"] == "length"


def test_stream(server, models):
    options = {"model": "tiny", "max_tokens": 8, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    with server.open("v1/completions", {"prompt": PROMPT, "stream": True, **options}) as reply:
        lines = [line.decode().removeprefix("data: ").strip() for line in reply if line.startswith(b"data: ")]
    assert lines[-1] == "[DONE]"
    pieces = [json.loads(line)["choices"][0]["token_ids"] for line in lines[:-1]]
    assert len(pieces) > 1
    assert [token for piece in pieces for token in piece] == models["first"][1]


def test_eight_requests_at_once(server):
    prompts = [[first, *PROMPT] for first in range(20, 28)]
    alone = [server.tokens(prompt) for prompt in prompts]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(server.tokens, prompts)) == alone


def test_reload(server, models):
    """New weights of the same architecture, as training with vLLM in the loop does it; then the old ones.

    A reload without a path reads the last one again.
    """
    for name in ("second", "first"):
        folder, tokens = models[name]
        for arguments in ({"weights_path": str(folder)}, {}):
            server.post("collective_rpc", method="reload_weights", kwargs=arguments)
            server.post("reset_prefix_cache")
            assert server.tokens(PROMPT) == tokens


def test_what_is_refused_leaves_a_server_that_answers(server, models, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    folder, tokens = models["second"]
    server.post("collective_rpc", method="reload_weights", kwargs={"weights_path": str(folder)})
    server.post("reset_prefix_cache")
    LlamaForCausalLM(LlamaConfig(**tp_cases.SIZES | {"hidden_size": 64})).save_pretrained(other := tmp_path / "other")
    told = server.refusal("collective_rpc", method="reload_weights", kwargs={"weights_path": str(other)})
    assert "expected the weights of the model that is served, got others (of other sizes)" in told
    assert "0 layers have new weights and all others their old ones" in told
    assert server.tokens(PROMPT) == tokens
    server.refusal("v1/completions", model="tiny", prompt=[1] * 100, max_tokens=8)
    assert server.tokens(PROMPT) == tokens
    server.post("collective_rpc", method="reload_weights")  # the last path that was not refused
    assert server.tokens(PROMPT) == tokens
