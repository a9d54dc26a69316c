"""The tables of a recipe that are no stages: what each key means and may be."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TokenizerSection(Section):
    """Which tokenizer: trained on the corpora, or loaded from ``path``."""

    kind: Literal["bpe", "characters", "path"] = "bpe"
    vocab_size: int = Field(4096, ge=300)
    min_frequency: int = Field(1, ge=1)
    path: str | None = None

    @model_validator(mode="after")
    def path_where_needed(self) -> TokenizerSection:
        if (self.kind == "path") != (self.path is not None):
            raise ValueError("path is given where kind is 'path', and only there")
        return self

    def spec(self) -> dict[str, Any]:
        """What ``data.prepare`` reads."""
        if self.path is not None:
            return {"path": self.path}
        if self.kind == "characters":
            return {"kind": "characters", "min_frequency": self.min_frequency}
        return {"kind": "bpe", "vocab_size": self.vocab_size}


class AdapterSection(Section):
    """Train a part beside the frozen weights. ``lora``: two thin matrices of ``rank`` beside each
    matrix (of the modules named in ``modules``, all where none is), weighted by alpha / rank.
    ``esft``: the experts that the first stage's data uses most, up to a share ``experts`` of it."""

    kind: Literal["lora", "esft"] = "lora"
    rank: int = Field(16, ge=1)
    alpha: float = Field(32.0, gt=0)
    modules: tuple[str, ...] = ()
    experts: float = Field(0.2, gt=0, le=1)


class CorpusEntry(Section):
    """``source``: a built-in or pulled corpus by name, or a file or folder of the user's own."""

    source: str
    weight: float = Field(1.0, gt=0)


class DataSection(Section):
    corpora: tuple[CorpusEntry, ...] = Field(min_length=1)
    validation_fraction: float = Field(0.05, gt=0, lt=1)
    fill_in_the_middle: float = Field(0.0, ge=0, le=1)
    deduplicate: Literal["none", "exact", "near"] = "none"
    isolate_documents: bool = False

    @property
    def duplicate_threshold(self) -> float | None:
        """Similarity from which a document counts as a copy of an earlier one."""
        return {"none": None, "exact": 1.0, "near": 0.8}[self.deduplicate]


class OptimizerSection(Section):
    """``muon`` takes the matrices inside the blocks at ``learning_rate``, AdamW the rest at
    ``adamw_learning_rate``; with ``adamw`` AdamW takes all at ``adamw_learning_rate``."""

    kind: Literal["muon", "adamw"] = "muon"
    learning_rate: float = Field(0.02, gt=0)
    adamw_learning_rate: float = Field(0.003, gt=0)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    momentum: float = Field(0.95, ge=0, lt=1)
    weight_decay: float = Field(0.1, ge=0)
    clip: float = Field(1.0, gt=0)


class ScheduleSection(Section):
    """Warm-up, then constant with a linear decay at the end (wsd), or a cosine."""

    kind: Literal["wsd", "cosine"] = "wsd"
    warmup_steps: int = Field(20, ge=0)
    decay_fraction: float = Field(0.3, ge=0, le=1)
    final_fraction: float = Field(0.0, ge=0, le=1)


class BalanceSection(Section):
    """V3 §2.1.2: the bias moves by ``bias_update_speed`` a step towards idle experts; the
    sequence-wise loss is weighted by ``sequence_weight``; V3's own values are the defaults."""

    bias_update_speed: float = Field(0.001, ge=0)
    sequence_weight: float = Field(0.0001, ge=0)


class ExtendSection(Section):
    """A context ``factor`` times as long from this stage on, by YaRN (model/extension.py).
    ``original``: how many positions the model has learnt, where those are not all of its
    max_position_embeddings."""

    factor: float = Field(gt=1)
    original: int | None = Field(None, ge=1)
    beta_fast: float = Field(32.0, gt=0)
    beta_slow: float = Field(1.0, gt=0)
    mscale: float = Field(1.0, ge=0)


class SamplesSection(Section):
    """What the model writes, at every validation and at the end."""

    prompts: tuple[str, ...] = ()
    max_tokens: int = Field(64, ge=1)
    temperature: float = Field(0.8, ge=0)
    top_p: float = Field(0.95, gt=0, le=1)


class TaskEntry(Section):
    """Problems of one task. ``difficulties`` are drawn evenly, one that is listed twice twice as
    often; ``corpus`` and ``options`` are for tasks that are made from texts (verse: its poems)."""

    task: str
    difficulties: tuple[int, ...] = Field(min_length=1)
    weight: float = Field(1.0, gt=0)
    corpus: str | None = None
    options: dict[str, Any] = Field(default_factory=dict)


class AskSection(Section):
    """How a problem is put to the model: ``prompt`` in the few signs a small model knows,
    ``question`` in words; with or without a thought."""

    text: Literal["prompt", "question"] = "prompt"
    thinking: bool = True
    system: str | None = None


class EvaluationSection(Section):
    """What every stage's model is asked before, in between and after: ``count`` held-out problems
    of each difficulty, once greedily and ``samples`` times at ``temperature``. Of ``answers``, the
    known solutions of held-out problems, the loss is told: what a model forgets shows there."""

    tasks: tuple[TaskEntry, ...] = ()
    answers: tuple[TaskEntry, ...] = ()
    count: int = Field(200, ge=1)
    samples: int = Field(8, ge=0)
    temperature: float = Field(1.0, gt=0)
    max_tokens: int = Field(256, ge=1)
