"""Tasks and difficulties as they are typed, and tasks with options of their own."""

import pytest

from qiusuo.evaluation.plan import read_asked_task
from qiusuo.tasks.registry import find_task
from qiusuo.tasks.task import TaskError

OWN = """
from qiusuo.tasks.chains import Chains

class Mine(Chains):
    name = "mine"

    def __init__(self, limit=5):
        self.limit = limit
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(OWN)
    return path


def test_tasks_as_they_are_typed(file):
    assert list(read_asked_task(f"{file}:4-6").difficulties) == [4, 5, 6]
    assert read_asked_task(str(file)).task.name == "mine"
    assert read_asked_task("chains:7").difficulties == [7]
    assert read_asked_task("chains").difficulties == range(2, 31)


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("chains:", "behind the colon go difficulties, such as 4"),
        ("chains:x", "behind the colon"),
        ("chains:5-4", "the first difficulty is above the last"),
        ("chains:1-4", "difficulties 2 to 30, not 1"),
        ("chains:29-31", "not 31"),
        ("chain:2", "did you mean 'chains'"),
        ("none.py:2", "there is no task file 'none.py'"),
    ],
)
def test_what_is_typed_wrongly_is_refused(typed, said):
    with pytest.raises(TaskError, match=said):
        read_asked_task(typed)


def test_options_reach_the_task(file):
    assert find_task("verse", rhymes=["庚"]).rhymes == ("庚",)
    assert find_task(str(file), limit=7).limit == 7
    for name, options in ((str(file), "limit"), ("verse", "titles, poems, rhymes")):
        with pytest.raises(TaskError, match=f"'size'; its options are: {options}"):
            find_task(name, size=1)
    with pytest.raises(TaskError, match="its options are: none"):
        find_task("chains", size=1)
    with pytest.raises(TaskError, match="no rhyme class"):
        find_task("verse", rhymes=["x"])
