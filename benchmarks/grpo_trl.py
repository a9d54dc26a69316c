"""TRL's side of `grpo.py`: GRPO steps on addition chains, timed, told as one JSON object on stdout.

    PYTHONPATH=src OTHER/python benchmarks/grpo_trl.py MODEL [--steps 5] [--arithmetic bfloat16]

OTHER is an environment of its own with trl in it, so that nothing here depends on trl. MODEL is a
folder in Hugging Face layout. The problems are those that `tasks.problems` gives for the seed, in
its order, and the reward is the task's verifier; every step is one rollout and one AdamW update.
Without `--free-length` the end is forbidden, so that every answer has all its tokens and both
sides do equal work. A step counts from the end of the one before; rollout is what passes
until the first answer is judged, update what passes after the last.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from qiusuo.tasks.registry import find_task
from qiusuo.tasks.task import Problem, problems

PACKAGES = ("trl", "transformers", "torch", "accelerate")


@dataclass
class Clock(transformers.TrainerCallback):
    """When steps end and answers are judged; the verifier itself is called from here too."""

    task: str
    problems: Sequence[Problem]
    ends: list[float] = field(default_factory=list)
    judged: list[tuple[float, float]] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.ends.append(time.perf_counter())

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(time.perf_counter())

    def reward(
        self,
        completions: list[list[dict[str, str]]],
        completion_ids: list[list[int]],
        index: list[int],
        **_: Any,
    ) -> list[float]:
        began = time.perf_counter()
        task = find_task(self.task)
        rewards = [
            task.verify(self.problems[i], completion[0]["content"]).reward
            for i, completion in zip(index, completions, strict=True)
        ]
        self.tokens.append(sum(map(len, completion_ids)))
        self.rewards.append(statistics.fmean(rewards))
        self.judged.append((began, time.perf_counter()))
        return rewards


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    # Whatever the libraries print goes to stderr: stdout is the result.
    with contextlib.redirect_stdout(sys.stderr), tempfile.TemporaryDirectory() as place:
        clock = train(options, place)
    json.dump(result(options, clock), sys.stdout, indent=1)
    print()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--task", default="chains")
    parser.add_argument("--difficulty", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--prompts", type=int, default=32, help="a step")
    parser.add_argument("--group", type=int, default=8, help="answers to a prompt")
    parser.add_argument("--tokens", type=int, default=48, help="an answer, at most")
    parser.add_argument("--free-length", action="store_true", help="answers may end early")
    parser.add_argument("--steps", type=int, default=5, help="timed")
    parser.add_argument("--warmup", type=int, default=2, help="steps before those")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--arithmetic",
        choices=("float32", "mixed", "bfloat16"),
        default="float32",
        help="mixed: float32 weights under autocast to bfloat16; bfloat16: weights as well",
    )
    parser.add_argument("--micro-batch", type=int, default=128, help="answers a backward pass")
    parser.add_argument("--continuous", action="store_true", help="continuous batching")
    parser.add_argument("--compile", action="store_true", help="torch.compile for the update")
    return parser.parse_args()


def train(options: argparse.Namespace, place: str) -> Clock:
    steps = options.warmup + options.steps
    task = find_task(options.task)
    count = steps * options.prompts
    asked = list(problems(task, "train", options.seed, [options.difficulty], count))
    clock = Clock(options.task, asked)
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    trainer = GRPOTrainer(
        model=options.model,
        reward_funcs=clock.reward,
        args=settings(options, place, steps, tokenizer.eos_token_id),
        train_dataset=Dataset.from_list(
            [
                {"prompt": [{"role": "user", "content": problem.prompt}], "index": i}
                for i, problem in enumerate(asked)
            ]
        ),
        processing_class=tokenizer,
        callbacks=[clock],
    )
    trainer.train()
    return clock


def settings(options: argparse.Namespace, place: str, steps: int, end: int) -> GRPOConfig:
    """What is TRL's default and costs time without being part of the comparison is off:
    gradient checkpointing, saving, reporting to services."""
    answers = options.prompts * options.group
    micro_batch = min(options.micro_batch, answers)
    return GRPOConfig(
        output_dir=place,
        use_cpu=True,
        bf16=options.arithmetic == "mixed",
        model_init_kwargs={
            "dtype": "bfloat16" if options.arithmetic == "bfloat16" else "float32",
        },
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=answers // micro_batch,
        num_generations=options.group,
        max_completion_length=options.tokens,
        generation_kwargs=None if options.free_length else {"suppress_tokens": [end]},
        chat_template_kwargs={"thinking": True},
        temperature=1.0,
        beta=0.0,
        num_iterations=1,
        learning_rate=options.learning_rate,
        lr_scheduler_type="constant",
        max_steps=steps,
        shuffle_dataset=False,
        seed=options.seed,
        gradient_checkpointing=False,
        use_transformers_continuous_batching=options.continuous,
        torch_compile=options.compile,
        dataloader_num_workers=0,
        dataloader_pin_memory=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def result(options: argparse.Namespace, clock: Clock) -> dict[str, Any]:
    """Seconds of every timed step and their medians."""
    timed = range(options.warmup, options.warmup + options.steps)
    seconds = [clock.ends[i + 1] - clock.ends[i] for i in timed]
    rollout = [clock.judged[i][0] - clock.ends[i] for i in timed]
    update = [clock.ends[i + 1] - clock.judged[i][1] for i in timed]
    tokens = statistics.fmean(clock.tokens[i] for i in timed)
    return {
        "seconds": seconds,
        "seconds_per_step": statistics.median(seconds),
        "rollout_seconds": statistics.median(rollout),
        "update_seconds": statistics.median(update),
        "tokens_per_step": tokens,
        "tokens_per_second": tokens / statistics.median(seconds),
        "rollout_tokens_per_second": tokens / statistics.median(rollout),
        "reward": statistics.fmean(clock.rewards),
        "options": vars(options),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


if __name__ == "__main__":
    main()
