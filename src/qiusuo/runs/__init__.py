"""The run folder: everything that a training result needs, and what one publishes.

`RunFolder` (folder), `RunLog` and `read_log` (log), `RolloutLog` and `read_rollouts` (rollouts) and
`write_summary` (summary) are for training; `LiveView` is in `console`, `write_report` in `report`,
`write_model_card` in `card`.
"""

from qiusuo.runs.durable import RunError
from qiusuo.runs.folder import RunFolder, default_run_path, read_recipe, read_status
from qiusuo.runs.log import RunLog, read_log
from qiusuo.runs.rollouts import RolloutLog, RolloutPage, read_rollouts
from qiusuo.runs.summary import read_summary, write_summary

__all__ = [
    "RolloutLog",
    "RolloutPage",
    "RunError",
    "RunFolder",
    "RunLog",
    "default_run_path",
    "read_log",
    "read_recipe",
    "read_rollouts",
    "read_status",
    "read_summary",
    "write_summary",
]
