"""The stages of a recipe, and the tables inside them: what each key means and may be.

A stage is one chapter of a model's life. ``pretrain`` reads text, ``sft`` imitates answers, ``rl``
tries and is paid, ``sample`` keeps what a verifier found right, ``dpo`` prefers an answer to
another. ``teach`` writes down what a teacher would say, ``distil`` learns from that,
``distil_on_policy`` from what teachers say to its own answers; ``merge`` averages models. Each
begins with the weights the stage before it ended with, or those of ``start_from``.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from qiusuo.training.sections import (
    BalanceSection,
    DataSection,
    ExtendSection,
    OptimizerSection,
    SamplesSection,
    ScheduleSection,
    Section,
    TaskEntry,
)


class LearningStage(Section):
    """What all stages with an optimizer share. ``start_from``: the stage whose final weights to
    begin with, where that is not the one before. ``minutes`` shortens ``steps`` on a slow machine:
    the plan is made once, from the first steps' pace. ``precision`` is that of matrix products: the
    two kinds of FP8 (model/fp8.py) compute the rest as bfloat16 does. ``recompute``: keep of each
    block its input alone and run it again in the backward pass, for less memory and more time."""

    name: str = ""
    start_from: str | None = None
    steps: int = Field(ge=1)
    minutes: float | None = Field(None, gt=0)
    precision: Literal["bfloat16", "float32", "fp8", "fp8_ue8m0"] = "bfloat16"
    recompute: bool = False
    checkpoint_steps: int = Field(200, ge=1)
    validation_steps: int = Field(0, ge=0)
    optimizer: OptimizerSection = OptimizerSection()
    schedule: ScheduleSection = ScheduleSection()
    balance: BalanceSection = BalanceSection()
    samples: SamplesSection = SamplesSection()

    @model_validator(mode="before")
    @classmethod
    def filled_up(cls, table: Any) -> Any:
        """Named by its kind where it has no name; and a table that is given in part is filled up
        with the stage's own defaults, not with those of other kinds of stages."""
        if not isinstance(table, dict):
            return table
        filled = {**table, "name": table.get("name") or cls.model_fields["kind"].default}
        for key, field in cls.model_fields.items():
            if isinstance(field.default, Section) and isinstance(table.get(key), dict):
                filled[key] = field.default.model_dump() | table[key]
        return filled

    @model_validator(mode="after")
    def end_unknown(self) -> LearningStage:
        if self.minutes is not None and self.schedule.kind != "wsd":
            raise ValueError("minutes needs the wsd schedule: a cosine must know its end at once")
        return self


class SupervisedStage(LearningStage):
    """``batch_size`` sequences make one step, ``micro_batch_size`` of them one pass.
    ``position_gaps``: so many positions are skipped between tokens, at most on average, for what is
    to work on longer texts than these (losses.positions_with_gaps). ``extend``: what the stage
    begins with is given a longer context, which the stages after it keep."""

    sequence_length: int = Field(ge=2)
    batch_size: int = Field(ge=1)
    micro_batch_size: int | None = Field(None, ge=1)
    compile: bool = False
    extend: ExtendSection | None = None
    position_gaps: float = Field(0.0, ge=0)
    mtp_weight: float = Field(0.3, ge=0)

    @model_validator(mode="after")
    def whole_micro_batches(self) -> SupervisedStage:
        if self.batch_size % (self.micro_batch_size or self.batch_size):
            raise ValueError("batch_size must be a multiple of micro_batch_size")
        return self

    @model_validator(mode="after")
    def compiled_as_written(self) -> SupervisedStage:
        if self.compile and self.precision.startswith("fp8"):
            raise ValueError("compile works in bfloat16 and float32, not in FP8: leave one of them")
        if self.compile and self.recompute:
            raise ValueError("compile and recompute do not go together: leave one of them")
        return self


class PretrainStage(SupervisedStage):
    """Predict the next tokens of text."""

    kind: Literal["pretrain"] = "pretrain"
    validation_tokens: int = Field(65536, ge=1)
    data: DataSection


class SftSource(Section):
    """Answers to imitate: a ``file`` of messages (jsonl), the solutions of a ``task``, or what the
    stage ``traces`` kept. Of a task's solutions ``thought_share`` have a worked thought, the others
    an empty one."""

    file: str | None = None
    task: TaskEntry | None = None
    traces: str | None = None
    weight: float = Field(1.0, gt=0)
    thought_share: float = Field(1.0, ge=0, le=1)

    @model_validator(mode="after")
    def one_of_three(self) -> SftSource:
        if sum(x is not None for x in (self.file, self.task, self.traces)) != 1:
            raise ValueError("a source is one of file, task or traces")
        return self


class SftStage(SupervisedStage):
    """Imitate answers: the loss counts what the assistant says, thoughts included."""

    kind: Literal["sft"] = "sft"
    sources: tuple[SftSource, ...] = Field(min_length=1)


class PolicySection(Section):
    """The loss of ``rl`` (rl/policy_loss.py); a key left out has the value of the preset."""

    ratio: Literal["token", "sequence", "cispo"] | None = None
    clip_low: float | None = Field(None, gt=0)
    clip_high: float | None = Field(None, gt=0)
    dual_clip: float | None = Field(None, gt=1)
    aggregation: Literal["token", "sequence", "constant"] | None = None
    kl: float | None = Field(None, ge=0)
    kl_importance: bool | None = None
    importance_cap: float | None = Field(None, gt=0)
    drop_beyond: float | None = Field(None, gt=0)


class CurriculumSection(Section):
    """Difficulties by what the policy can do: begin with those up to ``start``; where the pass rate
    of the hardest in use, averaged over about ``memory`` of its groups, is over ``rise``, the next
    one joins. Only the ``width`` hardest are drawn from, half of all problems of the hardest."""

    start: int
    rise: float = Field(0.7, gt=0, lt=1)
    memory: int = Field(32, ge=1)
    width: int = Field(3, ge=1)


class RlStage(LearningStage):
    """Reinforcement learning with verifiable rewards (GRPO): ``prompts`` problems a step, a group
    of answers to each; the verifier pays, and the advantage is what is above the group's mean.

    The keys from ``loss`` to ``reference_steps`` have the values of ``preset`` where they are left
    out (rl/policy_presets.py): the answers of a ``group``; ``scale`` of advantages; what becomes of
    ``same_groups``, all paid the same, which teach nothing ("refill": others are asked, up to
    ``most_prompts`` a step, for those that are all right or all wrong by the verifier alone,
    whatever else is paid); of answers cut off at ``max_tokens`` ("reward", "mask" them out of the
    loss, or "soft", paid less over the last ``overlong_margin`` tokens); ``updates`` of the weights
    per batch of rollouts; after how many steps the policy becomes the KL's reference.

    ``lag``: 0 samples with the weights that are then updated; 1 samples the next batch meanwhile,
    in another process. ``format_weight`` and ``language_weight`` are paid for a well-formed thought
    and for the language asked in, ``guard_weight`` for what the task's guard finds new in a right
    answer. ``random_reward`` pays by lot: a control, not a way to learn. ``positives_only`` leaves
    out the wrong answers. ``stop_above``: the stage ends when the mean pass rate of the last ten
    steps is over it.
    """

    kind: Literal["rl"] = "rl"
    tasks: tuple[TaskEntry, ...] = Field(min_length=1)
    curriculum: CurriculumSection | None = None
    prompts: int = Field(32, ge=1)
    most_prompts: int | None = Field(None, ge=1)
    max_tokens: int = Field(64, ge=1)
    temperature: float = Field(1.0, gt=0)
    micro_batch_size: int = Field(64, ge=1)
    preset: Literal["ours", "r1", "dr_grpo", "dapo", "cispo", "gspo"] = "ours"
    loss: PolicySection = PolicySection()
    group: int | None = Field(None, ge=2)
    scale: Literal["none", "group", "batch"] | None = None
    same_groups: Literal["keep", "drop", "refill"] | None = None
    overlong: Literal["reward", "mask", "soft"] | None = None
    updates: int | None = Field(None, ge=1)
    reference_steps: int | None = Field(None, ge=1)
    overlong_margin: int | None = Field(None, ge=1)
    lag: Literal[0, 1] = 0
    replay_experts: bool = True
    format_weight: float = Field(0.0, ge=0)
    language_weight: float = Field(0.0, ge=0)
    guard_weight: float = Field(0.0, ge=0)
    random_reward: bool = False
    positives_only: bool = False
    stop_above: float | None = Field(None, gt=0, le=1)
    kept_rollouts: int = Field(8, ge=0)
    optimizer: OptimizerSection = OptimizerSection(
        kind="adamw", adamw_learning_rate=2e-4, weight_decay=0.0
    )
    schedule: ScheduleSection = ScheduleSection(warmup_steps=5, decay_fraction=0.0)
    balance: BalanceSection = BalanceSection(bias_update_speed=0.0)

    @model_validator(mode="after")
    def margin_within_limit(self) -> RlStage:
        if self.overlong_margin is not None and self.overlong_margin > self.max_tokens:
            raise ValueError(f"overlong_margin must be at most max_tokens, {self.max_tokens}")
        return self


class SampleStage(Section):
    """Rejection sampling: ``answers`` to each of ``count`` problems; of those found right
    (``trace_valid``: with a valid trace, where that can be told) at most ``keep`` go into the
    run's ``traces/NAME.jsonl``. ``batch``: problems asked at once. ``model``: who answers, where
    that is not the model in training: a path, a pulled name or "stage:NAME". ``pairs``: keep each
    right answer beside a wrong one, for ``dpo``."""

    kind: Literal["sample"] = "sample"
    name: str = "sample"
    model: str | None = None
    pairs: bool = False
    tasks: tuple[TaskEntry, ...] = Field(min_length=1)
    count: int = Field(1000, ge=1)
    answers: int = Field(8, ge=1)
    keep: int = Field(1, ge=1)
    trace_valid: bool = True
    max_tokens: int = Field(64, ge=1)
    temperature: float = Field(1.0, gt=0)
    batch: int = Field(32, ge=1)
    checkpoint_steps: int = Field(10, ge=1)
    validation_steps: int = 0
    minutes: None = None


class TeachStage(Section):
    """What a teacher would say: the distributions of ``model`` ("stage:NAME", a path or a pulled
    name; where none is named, the model in training) at every counted token of ``count`` examples,
    drawn by weight; a finite source gives each of its examples once. They go to the run's
    ``distributions/NAME``: whole, or with ``top`` the likeliest tokens alone. ``batch`` examples
    make a file."""

    kind: Literal["teach"] = "teach"
    name: str = "teach"
    model: str | None = None
    sources: tuple[SftSource, ...] = Field(min_length=1)
    count: int = Field(ge=1)
    top: int | None = Field(None, ge=1)
    precision: Literal["bfloat16", "float32"] = "bfloat16"
    batch: int = Field(1024, ge=1)
    micro_batch_size: int = Field(64, ge=1)
    checkpoint_steps: int = Field(10, ge=1)
    validation_steps: int = 0
    minutes: None = None


class TaughtSource(Section):
    """Stored distributions: what the stage ``taught`` wrote, or a ``folder`` of another run's."""

    taught: str | None = None
    folder: str | None = None
    weight: float = Field(1.0, gt=0)

    @model_validator(mode="after")
    def one_of_two(self) -> TaughtSource:
        if (self.taught is None) == (self.folder is None):
            raise ValueError("a source is either taught, a stage, or a folder")
        return self


class MatchSection(Section):
    """How far the student is from its teacher: ``forward`` KL(teacher, student), ``reverse``
    KL(student, teacher), or ``jsd`` between them, which gives the teacher the share
    ``teacher_share``."""

    divergence: Literal["forward", "reverse", "jsd"]
    teacher_share: float = Field(0.5, gt=0, lt=1)


class DistilStage(SupervisedStage):
    """Learn stored distributions. ``label_weight``: how much the token that follows counts beside
    what the teacher thought of all of them."""

    kind: Literal["distil"] = "distil"
    sources: tuple[TaughtSource, ...] = Field(min_length=1)
    match: MatchSection = MatchSection(divergence="forward")
    label_weight: float = Field(0.0, ge=0)


class TeacherSection(Section):
    """A teacher and the tasks it is asked about, all where none is named. Its divergence counts
    ``weight`` times."""

    model: str
    tasks: tuple[str, ...] = ()
    weight: float = Field(1.0, gt=0)


class OnPolicyStage(LearningStage):
    """On-policy distillation: the student answers ``prompts`` problems ``answers`` times each, and
    at every token is drawn towards what its teachers would say there."""

    kind: Literal["distil_on_policy"] = "distil_on_policy"
    teachers: tuple[TeacherSection, ...] = Field(min_length=1)
    tasks: tuple[TaskEntry, ...] = Field(min_length=1)
    match: MatchSection = MatchSection(divergence="reverse")
    prompts: int = Field(64, ge=1)
    answers: int = Field(1, ge=1)
    max_tokens: int = Field(64, ge=1)
    temperature: float = Field(1.0, gt=0)
    micro_batch_size: int = Field(64, ge=1)
    kept_rollouts: int = Field(8, ge=0)
    optimizer: OptimizerSection = OptimizerSection(
        kind="adamw", adamw_learning_rate=1e-3, weight_decay=0.0
    )
    schedule: ScheduleSection = ScheduleSection(warmup_steps=5)
    balance: BalanceSection = BalanceSection(bias_update_speed=0.0)

    @model_validator(mode="after")
    def each_task_has_a_teacher(self) -> OnPolicyStage:
        asked = {entry.task for entry in self.tasks}
        for teacher in self.teachers:
            if strange := set(teacher.tasks) - asked:
                raise ValueError(
                    f"teacher {teacher.model}: {', '.join(sorted(strange))} is no task of the stage"
                )
        taught = {task for teacher in self.teachers for task in teacher.tasks or asked}
        if left := asked - taught:
            raise ValueError(f"no teacher for {', '.join(sorted(left))}")
        return self


class PairSource(Section):
    """A ``file`` of preferences (jsonl), or the pairs that the ``sample`` stage ``pairs`` kept."""

    file: str | None = None
    pairs: str | None = None

    @model_validator(mode="after")
    def one_of_two(self) -> PairSource:
        if (self.file is None) == (self.pairs is None):
            raise ValueError("a source is either a file or pairs, a stage")
        return self


class DpoStage(LearningStage):
    """Direct preference optimisation: ``batch_size`` pairs a step. ``label_smoothing``: the share
    of pairs that are taken to be the wrong way round; ``sft_weight``: how much it counts to say the
    preferred answer at all."""

    kind: Literal["dpo"] = "dpo"
    sources: tuple[PairSource, ...] = Field(min_length=1)
    beta: float = Field(0.1, gt=0)
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    sft_weight: float = Field(0.0, ge=0)
    batch_size: int = Field(32, ge=1)
    micro_batch_size: int = Field(32, ge=1)
    optimizer: OptimizerSection = OptimizerSection(
        kind="adamw", adamw_learning_rate=1e-4, weight_decay=0.0
    )
    schedule: ScheduleSection = ScheduleSection(warmup_steps=5)
    balance: BalanceSection = BalanceSection(bias_update_speed=0.0)


class MergedModel(Section):
    """``model``: a path, a pulled name or "stage:NAME"."""

    model: str
    weight: float = Field(1.0, gt=0)


class MergeStage(Section):
    """The average of models of one architecture, by weight, becomes the model in training."""

    kind: Literal["merge"] = "merge"
    name: str = "merge"
    models: tuple[MergedModel, ...] = Field(min_length=2)
    checkpoint_steps: int = 1
    validation_steps: int = 0
    minutes: None = None


def stage_named(model: str | None) -> str | None:
    """The stage in "stage:NAME", None where a model is named otherwise."""
    before, colon, name = (model or "").partition("stage:")
    return name if colon and not before else None


def _kind_of(stage: Any) -> str:
    kind = stage.get("kind", "pretrain") if isinstance(stage, dict) else stage.kind
    return kind if isinstance(kind, str) else "?"


Stage = Annotated[
    Annotated[PretrainStage, Tag("pretrain")]
    | Annotated[SftStage, Tag("sft")]
    | Annotated[RlStage, Tag("rl")]
    | Annotated[SampleStage, Tag("sample")]
    | Annotated[TeachStage, Tag("teach")]
    | Annotated[DistilStage, Tag("distil")]
    | Annotated[OnPolicyStage, Tag("distil_on_policy")]
    | Annotated[DpoStage, Tag("dpo")]
    | Annotated[MergeStage, Tag("merge")],
    Discriminator(_kind_of),
]
STAGES: dict[str, type[Section]] = {
    "pretrain": PretrainStage,
    "sft": SftStage,
    "rl": RlStage,
    "sample": SampleStage,
    "teach": TeachStage,
    "distil": DistilStage,
    "distil_on_policy": OnPolicyStage,
    "dpo": DpoStage,
    "merge": MergeStage,
}
