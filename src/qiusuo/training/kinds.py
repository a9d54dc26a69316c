"""From a stage of a recipe to the work it is."""

from __future__ import annotations

from typing import Any

from qiusuo.training.distil import Distilling
from qiusuo.training.distil_on_policy import OnPolicy
from qiusuo.training.dpo import Preferring
from qiusuo.training.merge import Merging
from qiusuo.training.pretrain import Pretraining
from qiusuo.training.rl.reinforce import Reinforcement
from qiusuo.training.sample import Sampling
from qiusuo.training.scene import Scene, StageWork
from qiusuo.training.sft import Finetuning
from qiusuo.training.teach import Teaching

WORKS: dict[str, Any] = {
    "pretrain": Pretraining,
    "sft": Finetuning,
    "rl": Reinforcement,
    "sample": Sampling,
    "teach": Teaching,
    "distil": Distilling,
    "distil_on_policy": OnPolicy,
    "dpo": Preferring,
    "merge": Merging,
}


def work_of(scene: Scene[Any]) -> StageWork:
    """The work of the stage's kind, ready for its first or its next step."""
    work: StageWork = WORKS[scene.stage.kind](scene)
    return work
