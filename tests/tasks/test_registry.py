"""Tasks by name, from a user's file and from an installed package."""

import sys

import pytest

from qiusuo.tasks.chains import Chains
from qiusuo.tasks.registry import OURS, find_task, known_tasks
from qiusuo.tasks.task import TaskError
from tests.tasks.families import TASKS, some

OWN = """
from qiusuo.tasks.task import Problem, Task, response_of, take_apart, verdict_on

class Doubles(Task):
    name = "doubles"
    description = "Twice a number."
    difficulties = range(1, 4)

    def problem(self, difficulty, chance):
        number = chance.randrange(10**difficulty)
        key = f"doubles:{number}"
        return Problem(self.name, f"{number}*2=", f"2*{number}?", difficulty, key, {"n": number})

    def solution(self, problem, chance, *, thought):
        return response_of("", str(2 * problem.data["n"]))

    def verify(self, problem, response):
        return verdict_on(take_apart(response), str(2 * problem.data["n"]))
"""


def test_ours_are_found_by_name():
    assert isinstance(find_task("chains"), Chains)
    for task in TASKS:
        assert type(find_task(task.name)) is type(task)
        assert task.description
    assert len({task.name for task in OURS}) == len(OURS)


def test_an_unknown_name_gets_the_nearest():
    with pytest.raises(TaskError, match="unknown task 'chain': did you mean 'chains'"):
        find_task("chain")
    with pytest.raises(TaskError, match="unknown task 'xyz': known are parity, chains"):
        find_task("xyz")


def test_a_file_is_a_task(tmp_path):
    file = tmp_path / "doubles.py"
    file.write_text(OWN)
    task = find_task(str(file))
    problems = some(task, 10)
    verdicts = [task.verify(one, task.solution(one, None, thought=True)) for one in problems]
    assert all(verdict.reward == 1 for verdict in verdicts)
    assert "doubles" not in known_tasks()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "there is no task file"),
        ("1/0", "ZeroDivisionError"),
        ("from qiusuo.tasks.chains import Chains", "one class that derives from Task, found none"),
        (OWN + OWN.replace("class Doubles", "class Twice"), "found Doubles, Twice"),
        (OWN.replace("str(2 * problem", "str(3 * problem", 1), "does not accept its own solution"),
        (OWN.replace('["n"]', '["m"]'), "fails: KeyError"),
        (OWN.replace("take_apart(response)", "take_apart('</think>' + str(2*problem.data['n']))"),
         "pays for an empty response"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_task_is_refused(tmp_path, text, said):
    file = tmp_path / "doubles.py"
    if text is not None:
        file.write_text(text)
    with pytest.raises(TaskError, match=said):
        find_task(str(file))


def test_a_package_brings_tasks(tmp_path, monkeypatch):
    """As pip leaves it: the module beside its metadata."""
    (tmp_path / "qs_clock.py").write_text(OWN)
    metadata = tmp_path / "qs_clock-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: qs-clock\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(
        "[qiusuo.tasks]\ndoubles = qs_clock:Doubles\nlost = qs_clock:Gone\n"
        "chains = qs_clock:Doubles\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    known = known_tasks()
    assert "qs_clock" not in sys.modules
    assert set(known) >= {"doubles", "lost"}
    assert find_task("doubles").name == "doubles"
    assert isinstance(find_task("chains"), Chains)
    with pytest.raises(TaskError, match="'lost' could not be loaded from qs_clock:Gone"):
        find_task("lost")
