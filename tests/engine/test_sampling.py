"""What a request may ask for, and how the impossible is refused."""

import math

import pytest

from qiusuo.engine.sampling import Sampling


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"max_tokens": 0}, "max_tokens must be at least 1, not 0"),
        ({"temperature": -0.1}, "temperature .* not -0.1"),
        ({"temperature": math.nan}, "temperature .* not nan"),
        ({"temperature": math.inf}, "temperature .* not inf"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], not 0.0"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_p": math.nan}, "top_p"),
        ({"top_k": 0}, "top_k must be at least 1, not 0"),
        ({"seed": -1}, "seed"),
        ({"seed": 1 << 64}, "seed"),
        ({"max_tokens": 1.5}, "max_tokens must be a whole number, not 1.5"),
        ({"max_tokens": True}, "max_tokens must be a whole number, not True"),
        ({"min_tokens": -1}, "min_tokens must be at least 0, not -1"),
        ({"max_tokens": 3, "min_tokens": 4}, r"min_tokens must be at most max_tokens \(3\), not 4"),
        ({"temperature": "1"}, "temperature must be a number, not '1'"),
        ({"min_p": -0.1}, r"min_p must be in 0..1, not -0.1"),
        ({"min_p": math.nan}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be in 0.01..100, not 0.0"),
        ({"presence_penalty": 2.1}, "presence_penalty must be in -2..2, not 2.1"),
        ({"frequency_penalty": -math.inf}, "frequency_penalty must be in -2..2, not -inf"),
        ({"logprobs": 21}, "logprobs must be in 0..20, not 21"),
        ({"prompt_logprobs": -1}, "prompt_logprobs must be in 0..20, not -1"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias: a token id must be at least 0, not -1"),
        ({"logit_bias": {"5": 1.0}}, "logit_bias: a token id must be a whole number, not '5'"),
        ({"logit_bias": {5: math.nan}}, "logit_bias of token 5 must be in -100..100, not nan"),
        ({"logit_bias": {5: 101}}, "logit_bias of token 5 must be in -100..100, not 101"),
        ({"logit_bias": [5]}, "logit_bias must map"),
        ({"stop": "end"}, "stop must be a list of texts, not 'end'"),
        ({"stop": ["a", ""]}, "stop must hold texts of at least one character, not ''"),
        ({"stop": [3]}, "stop must hold texts"),
        ({"stop": ["x"] * 17}, "stop must hold at most 16 texts, not 17"),
        ({"stop_ids": [-2]}, "stop_ids: a token id must be at least 0, not -2"),
        ({"stop_ids": 3}, "stop_ids must be a set of token ids, not 3"),
        ({"ignore_eos": 1}, "ignore_eos must be true or false, not 1"),
    ],
)
def test_refused_settings(wrong, words):
    with pytest.raises(ValueError, match=words):
        Sampling(**wrong)


def test_what_was_checked_is_kept():
    biases, stops = {3: 1.0}, ["a", "b"]
    sampling = Sampling(logit_bias=biases, stop=stops, stop_ids={4, 5})
    biases[3] = math.nan
    stops.append("")
    assert sampling.logit_bias == {3: 1.0}
    assert sampling.stop == ("a", "b")
    assert sampling.stop_ids == frozenset([4, 5])
    assert sampling == Sampling(logit_bias={3: 1.0}, stop=("a", "b"), stop_ids=frozenset([4, 5]))
    assert sampling != Sampling(logit_bias={3: 2.0}, stop=("a", "b"), stop_ids=frozenset([4, 5]))
    assert hash(sampling) == hash(Sampling(stop=("a", "b"), stop_ids=frozenset([4, 5])))
