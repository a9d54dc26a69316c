"""The public face of a model: weights and tokenizer together, ready to read and to write."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qiusuo.checkpoint.export import export
from qiusuo.checkpoint.files import CheckpointError
from qiusuo.checkpoint.inventory import check_tokenizer
from qiusuo.checkpoint.load import checkpoint_of, load_model
from qiusuo.checkpoint.open import open_checkpoint
from qiusuo.checkpoint.stored import Progress
from qiusuo.data.chat_template import Message as GivenMessage
from qiusuo.data.errors import DataError
from qiusuo.data.tokenizer import Tokenizer
from qiusuo.engine.generate import check_tokens, generate
from qiusuo.engine.sampling import Sampling
from qiusuo.engine.text_stream import Part, TextStream, ThoughtSplitter
from qiusuo.model.config import ModelConfig
from qiusuo.model.transformer import Transformer

# T tokens, W vocabulary.


@dataclass(frozen=True)
class Completion:
    """``text`` leaves out the end token; ``token_ids`` and ``logprobs`` have it."""

    text: str
    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str


@dataclass(frozen=True)
class Message:
    """A model's turn of a conversation. ``reasoning_content`` is its thought without the marks,
    None where it had none."""

    content: str
    reasoning_content: str | None
    token_ids: list[int]
    finish_reason: str
    role: str = "assistant"


OnText = Callable[[Part, str], None]
"""Called with each piece of a thought or an answer as it comes."""


class LanguageModel:
    """A model and its tokenizer (None where a folder has none: then token ids only)."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer | None) -> None:
        self.model, self.tokenizer = model.eval(), tokenizer

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    @torch.inference_mode()
    def logits(self, token_ids: Sequence[int]) -> Tensor:
        """Float32 logits [T, W] after each of these tokens."""
        check_tokens(self.model, token_ids)
        tokens_BT = torch.tensor([list(token_ids)], device=self._device)
        return self.model.logits(self.model(tokens_BT).x_BTD)[0]

    def generate(
        self,
        prompts: Sequence[str] | Sequence[Sequence[int]],
        *,
        max_tokens: int = 64,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> list[Completion]:
        """Continue texts (a beginning-of-text token is put before each) or token ids as given."""
        if isinstance(prompts, str):
            raise TypeError("prompts is a list: write generate([text])")
        sampling = Sampling(max_tokens, temperature, top_k, top_p, seed)
        ids = [self._encode(p) if isinstance(p, str) else list(p) for p in prompts]
        answers = generate(self.model, ids, sampling, self.stop_ids)
        return [
            Completion(self._text(a.token_ids), a.token_ids, a.logprobs, a.finish_reason)
            for a in answers
        ]

    def chat(
        self,
        messages: Sequence[GivenMessage],
        *,
        max_tokens: int = 1024,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        seed: int = 0,
        thinking: bool = False,
        on_text: OnText | None = None,
    ) -> Message:
        """Answer a conversation through the model's own template. ``thinking`` asks templates that
        know both for a thought first; R1's always opens one. ``on_text`` hears the answer grow.

        Raises DataError for messages that the template refuses or the context cannot hold."""
        tokenizer = self._needed_tokenizer()
        prompt = tokenizer.apply_chat_template(messages, thinking=thinking)
        if len(prompt) >= (limit := self.config.max_position_embeddings):
            raise DataError(
                f"the conversation has {len(prompt)} tokens and leaves no room for an answer: the "
                f"context holds {limit}; shorten it, or begin anew"
            )
        stream, splitter = TextStream(tokenizer), ThoughtSplitter(tokenizer.opens_thought(prompt))
        parts: dict[Part, list[str]] = {Part.THOUGHT: [], Part.ANSWER: []}

        def give(pieces: Iterable[tuple[Part, str]]) -> None:
            for part, text in pieces:
                parts[part].append(text)
                if on_text is not None:
                    on_text(part, text)

        stop_ids = self.stop_ids

        def on_token(_row: int, token: int) -> None:
            if token not in stop_ids:
                give(splitter.push(stream.push(token)))

        sampling = Sampling(max_tokens, temperature, top_k, top_p, seed)
        [answer] = generate(self.model, [prompt], sampling, stop_ids, on_token)
        give(splitter.push(stream.finish()))
        give(splitter.finish())
        thought = "".join(parts[Part.THOUGHT])
        return Message(
            content="".join(parts[Part.ANSWER]),
            reasoning_content=thought or None,
            token_ids=answer.token_ids,
            finish_reason=answer.finish_reason,
        )

    def save(
        self, place: str | Path, format: str = "hf", dtype: str | torch.dtype | None = None
    ) -> Path:
        """Write the model and its tokenizer: ``format`` "hf" for a folder, "gguf" for a file.
        ``dtype`` as ``qiusuo export`` knows it; None keeps the weights' own."""
        name = str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else dtype
        return export(checkpoint_of(self.model, self.tokenizer), place, format, name)

    @property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end an answer: those of the config, and the tokenizer's own."""
        eos = self.config.eos_token_id
        ends: list[int | None] = list(eos) if isinstance(eos, tuple) else [eos]
        if self.tokenizer is not None:
            ends.append(self.tokenizer.eos_id)
        return frozenset(end for end in ends if end is not None)

    @property
    def _device(self) -> torch.device:
        return self.model.model.embed_tokens.weight.device

    def _needed_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise ValueError("this model came without a tokenizer.json: give token ids")
        return self.tokenizer

    def _encode(self, text: str) -> list[int]:
        tokenizer = self._needed_tokenizer()
        return [*tokenizer.text_start, *tokenizer.encode(text)]

    def _text(self, token_ids: list[int]) -> str:
        if self.tokenizer is None:
            return ""
        if token_ids and token_ids[-1] in self.stop_ids:
            token_ids = token_ids[:-1]
        # A vocabulary is often padded (V3's to 129,280): such rows have an id and no text.
        known = self.tokenizer.vocab_size
        return self.tokenizer.decode([token for token in token_ids if token < known])


def load(
    path: str | Path,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
) -> LanguageModel:
    """Load a model: a folder in Hugging Face layout, a .gguf file, a run folder (its finished
    model), or a name that was pulled.

    ``dtype``: "float32", "bfloat16", "float16", or None for the type the weights were saved in
    (bfloat16 for FP8 and quantised ones). CheckpointError for what is not there, does not fit
    together or needs more memory than is free.
    """
    _check_device(device)
    wanted = _dtype(dtype)
    checkpoint = open_checkpoint(path)
    tokenizer = checkpoint.read_tokenizer()
    check_tokenizer(checkpoint, tokenizer)
    model = load_model(checkpoint, dtype=wanted, device=device, progress=progress)
    return LanguageModel(model, tokenizer)


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in known:
        raise CheckpointError(f"dtype {dtype!r} is not one of {', '.join(known)}")
    return known[dtype]


def _check_device(device: str | torch.device) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # which of them depends on the device
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"device {str(device)!r} cannot be used: {reason}") from error
