"""What a model's makers recommend for drawing comes along, and never stands in the way."""

import json

import pytest

from qiusuo.checkpoint.huggingface import open_huggingface, save_huggingface, write_huggingface
from qiusuo.checkpoint.load import checkpoint_of
from qiusuo.engine.loading import load
from tests.model.shapes import tiny_model


@pytest.fixture
def folder(tmp_path):
    return save_huggingface(tiny_model(), tmp_path / "m", sampling={"temperature": 0.6})


def test_it_is_written_read_and_written_again(folder, tmp_path):
    assert open_huggingface(folder).sampling == {"temperature": 0.6}
    copy = write_huggingface(open_huggingface(folder), tmp_path / "copy")
    assert dict(load(copy).sampling) == {"temperature": 0.6}
    assert checkpoint_of(tiny_model(), None).sampling == {}


@pytest.mark.parametrize(
    ("said", "read"),
    [
        ({"temperature": 0.6, "top_p": 0.95, "top_k": 20}, {"temperature", "top_p", "top_k"}),
        ({"temperature": 0, "top_p": 0, "top_k": 0}, set()),
        ({"temperature": "hot", "top_p": 1.5, "top_k": 20.0}, set()),
        ({"temperature": True, "top_p": None, "do_sample": True}, set()),
        ({"temperature": float("nan")}, set()),
    ],
)
def test_what_makes_no_sense_is_left_out(folder, said, read):
    (folder / "generation_config.json").write_text(json.dumps(said))
    assert set(open_huggingface(folder).sampling) == read
