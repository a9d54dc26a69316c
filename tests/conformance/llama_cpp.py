"""llama.cpp as a peer: its server in a process of its own, since what it dislikes it aborts at."""

import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qiusuo.data.tokenizer import Tokenizer
from qiusuo.engine.language_model import LanguageModel
from qiusuo.model.transformer import Transformer

# Float32 cache, plain attention, one thread: what is compared is the model, not its shortcuts.
SERVER = """
import sys
import xllamacpp as x

p = x.CommonParams()
p.model.path, p.n_ctx, p.n_parallel, p.warmup, p.verbosity = sys.argv[1], 1024, 1, False, 0
p.cpuparams.n_threads = p.cpuparams_batch.n_threads = 1
p.cache_type_k = p.cache_type_v = x.ggml_type.GGML_TYPE_F32
p.flash_attn_type = x.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
if sys.argv[2] == "mtp":
    p.speculative.types = [x.common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_MTP]
    draft = p.speculative.draft
    draft.cache_type_k = draft.cache_type_v = x.ggml_type.GGML_TYPE_F32
    draft.n_max, draft.p_min = 1, 0.0
server = x.Server(p)
print(server.listening_address, flush=True)
sys.stdin.read()
"""


class LoadError(RuntimeError):
    """llama.cpp did not take the file; the message is its own."""


@dataclass(frozen=True)
class Server:
    address: str

    def complete(self, prompt: Sequence[int], tokens: int, **options: Any) -> dict[str, Any]:
        """The answer to `/completion`: token ids in "tokens"."""
        request = {"prompt": list(prompt), "n_predict": tokens, "return_tokens": True}
        return self._post("/completion", request | {"cache_prompt": False} | options)

    def tokenize(self, text: str) -> list[int]:
        return self._post("/tokenize", {"content": text})["tokens"]

    def _post(self, route: str, content: dict[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(
            self.address + route,
            data=json.dumps(content).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=300) as answer:
            return json.load(answer)


@contextmanager
def serve(path: Path, *, mtp: bool = False) -> Iterator[Server]:
    """llama.cpp with this model; ``mtp``: it drafts with the MTP module, a token at a time."""
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(path), "mtp" if mtp else "plain"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"GGML_NO_BACKTRACE": "1"},
    )
    try:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        if not address.startswith("http"):
            raise LoadError(process.communicate()[1][-2000:])
        yield Server(address)
    finally:
        process.kill()
        process.communicate()


@dataclass(frozen=True)
class Agreement:
    """``same_answers`` of ``prompts`` whole greedy answers are the same tokens; at ``same_first``
    of ``positions`` the likeliest token is. ``difference``: in the log-probability of any of the
    five likeliest, exceeded at one position in a hundred, where two experts may be as likely."""

    prompts: int
    same_answers: int
    positions: int
    same_first: int
    difference: float


def compare(
    server: Server,
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    steps: int,
) -> Agreement:
    """Greedy answers token by token; then answers that llama.cpp draws at temperature 1, along
    which both are asked for the probabilities of every next token."""
    ends = model.config.eos_token_id
    stops = frozenset(ends if isinstance(ends, tuple) else () if ends is None else (ends,))
    ours = LanguageModel(model, None, draft="none").generate(prompts, max_tokens=steps)
    banned = [[token, False] for token in range(tokenizer.vocab_size) if _odd(tokenizer, token)]
    same_answers = same_first = 0
    differences: list[float] = []
    for seed, (prompt, answer) in enumerate(zip(prompts, ours, strict=True)):
        theirs = server.complete(prompt, steps, temperature=0)["tokens"]
        same_answers += _before(theirs, stops) == _before(answer.token_ids, stops)
        options = dict(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=seed, n_probs=5)
        drawn = server.complete(prompt, steps, logit_bias=banned, ignore_eos=True, **options)
        likeliest = [entry["top_logprobs"] for entry in drawn["completion_probabilities"]]
        assert len(likeliest) == len(drawn["tokens"]) == steps
        for logprobs_W, entries in zip(
            _logprobs(model, prompt, drawn["tokens"]), likeliest, strict=True
        ):
            same_first += int(logprobs_W.argmax()) == entries[0]["id"]
            found = [logprobs_W[entry["id"]].item() - entry["logprob"] for entry in entries]
            differences.append(max(map(abs, found)))
    difference = sorted(differences)[len(differences) * 99 // 100]
    return Agreement(len(prompts), same_answers, len(differences), same_first, difference)


def _odd(tokenizer: Tokenizer, token: int) -> bool:
    """Parts of characters, for which the server gives no probabilities, and special tokens."""
    text = tokenizer.decode([token])
    return token in tokenizer.special_tokens.values() or not text or "\ufffd" in text


def _before(tokens: list[int], stops: frozenset[int]) -> list[int]:
    end = next((place for place, token in enumerate(tokens) if token in stops), len(tokens))
    return tokens[:end]


@torch.no_grad()
def _logprobs(model: Transformer, prompt: Sequence[int], answer: list[int]) -> torch.Tensor:
    """Of every token of the answer, over the vocabulary [T, W]."""
    hidden_BTD = model(torch.tensor([[*prompt, *answer]])).x_BTD
    return model.logits(hidden_BTD)[0, len(prompt) - 1 : -1].log_softmax(-1)
