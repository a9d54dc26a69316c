"""The public face of a model: weights and tokenizer together, ready to read and to write."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qiusuo.checkpoint.files import CheckpointError, restore_folder
from qiusuo.checkpoint.huggingface import load_huggingface, save_huggingface
from qiusuo.data.tokenizer import Tokenizer
from qiusuo.engine.generate import check_tokens, generate
from qiusuo.engine.sampling import Sampling
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

    def save(
        self, folder: str | Path, format: str = "hf", dtype: str | torch.dtype | None = None
    ) -> Path:
        """Write the model and its tokenizer as a Hugging Face folder."""
        if format != "hf":
            raise ValueError(f"format {format!r} is not written; expected 'hf'")
        return save_huggingface(self.model, folder, dtype=_dtype(dtype), tokenizer=self.tokenizer)

    @property
    def stop_ids(self) -> frozenset[int]:
        eos = self.config.eos_token_id
        if eos is None:
            return frozenset()
        return frozenset(eos) if isinstance(eos, tuple) else frozenset([eos])

    @property
    def _device(self) -> torch.device:
        return self.model.model.embed_tokens.weight.device

    def _encode(self, text: str) -> list[int]:
        if self.tokenizer is None:
            raise ValueError("this model came without a tokenizer.json: give token ids")
        bos = self.tokenizer.bos_id
        return ([] if bos is None else [bos]) + self.tokenizer.encode(text)

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
) -> LanguageModel:
    """Load a model folder in Hugging Face layout, or a run folder (its finished model).

    ``dtype``: "float32", "bfloat16" or None for the type the weights were saved in.
    """
    folder = Path(path)
    restore_folder(folder)
    restore_folder(folder / "model")
    if (folder / "model" / "config.json").is_file():
        folder = folder / "model"
    if not folder.is_dir():
        raise CheckpointError(f"{path} is not a folder; give a model folder or a run folder")
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} holds no config.json, so it is not a model folder")
    model = load_huggingface(folder, dtype=_dtype(dtype), device=device)
    tokenizer = Tokenizer.load(folder) if (folder / "tokenizer.json").is_file() else None
    return LanguageModel(model, tokenizer)


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in known:
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(known)}")
    return known[dtype]
