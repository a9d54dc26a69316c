"""A model of random logits can only write what the constraint allows: checked by json, re and a
small validator, none of which knows the library that masks."""

import json
import re
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qiusuo.data.errors import DataError
from qiusuo.data.tokenizer import Tokenizer
from qiusuo.engine.constraint import Constraint, Grammars, Matcher
from qiusuo.engine.sampler import BadLogits, Row, draw
from qiusuo.engine.sampling import Sampling

TEXTS = [
    '{"name": "李白", "age": 61, "poems": ["静夜思", "将进酒"], "alive": false, "x": null} ' * 3,
    "床前明月光，疑是地上霜。举头望明月，低头思故乡。" * 3,
    "the quick brown fox jumps over the lazy dog -12.5e3 [true, false] ( ) / \\ _ 0123456789 " * 3,
]
PADDING = 7  # rows of the embedding that are no token
BPE = Tokenizer.train_bpe(TEXTS, 420)
CHARACTERS = Tokenizer.train_characters([*TEXTS, "abcdefghijklmnopqrstuvwxyz"])
ENDS = frozenset([BPE.token_id("<｜end▁of▁sentence｜>"), BPE.token_id("<｜User｜>")])
OF_BPE = Grammars(BPE, BPE.vocab_size + PADDING, ENDS)
OF_CHARACTERS = Grammars(CHARACTERS, CHARACTERS.vocab_size + PADDING, ENDS)
BOTH = pytest.mark.parametrize(
    ("tokenizer", "grammars"), [(BPE, OF_BPE), (CHARACTERS, OF_CHARACTERS)], ids=["bpe", "char"]
)


def write(grammars: Grammars, constraint: Constraint, seed: int, room: int = 3000) -> list[int]:
    """What a model of random logits answers, without the end token."""
    matcher = grammars.matcher(constraint)
    generator = torch.Generator().manual_seed(seed)
    sampling = Sampling(temperature=1.0, seed=seed)
    answer: list[int] = []
    while len(answer) < room:
        logits = 3 * torch.randn(1, grammars.vocab_size, generator=generator)
        row = Row(sampling, [], answer, len(answer), allowed_W=matcher.allowed())
        (drawn,) = draw(logits, [row])
        assert not isinstance(drawn, BadLogits), drawn
        matcher.advance(drawn.token)
        if drawn.token in ENDS:
            assert matcher.finished
            return answer
        answer.append(drawn.token)
    raise AssertionError(f"no end in {room} tokens")


def spell(matcher: Matcher, tokenizer: Tokenizer, text: str) -> None:
    """Advance by a text, each token of which must be allowed."""
    for token in tokenizer.encode(text):
        assert matcher.allowed()[token], tokenizer.decode([token])
        matcher.advance(token)


def allowed_ids(matcher: Matcher) -> set[int]:
    return set(matcher.allowed().nonzero().flatten().tolist())


# Schemas

plain_schemas = st.one_of(
    st.tuples(st.integers(-20, 20), st.integers(0, 30)).map(
        lambda pair: {"type": "integer", "minimum": pair[0], "maximum": pair[0] + pair[1]}
    ),
    st.integers(0, 6).map(lambda most: {"type": "string", "maxLength": most}),
    st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"enum": ["红", "b\n", 3, None]}]),
)
schemas = st.recursive(
    plain_schemas,
    lambda inner: st.one_of(
        st.tuples(inner, st.integers(0, 3)).map(
            lambda pair: {"type": "array", "items": pair[0], "maxItems": pair[1]}
        ),
        st.tuples(
            st.dictionaries(st.sampled_from('name 年 a"b'.split()), inner), st.booleans()
        ).map(
            lambda pair: {
                "type": "object",
                "properties": pair[0],
                "required": sorted(pair[0]) if pair[1] else [],
                "additionalProperties": False,
            }
        ),
    ),
    max_leaves=5,
)


def is_valid(value: Any, schema: dict) -> bool:
    if "enum" in schema:
        return any(value == one and type(value) is type(one) for one in schema["enum"])
    kinds = {"integer": int, "string": str, "boolean": bool, "null": type(None), "array": list}
    if type(value) is not kinds.get(schema["type"], dict):
        return False
    if isinstance(value, str):
        return len(value) <= schema["maxLength"]
    if isinstance(value, list):
        return len(value) <= schema["maxItems"] and all(
            is_valid(item, schema["items"]) for item in value
        )
    if isinstance(value, dict):
        properties = schema["properties"]
        return set(schema["required"]) <= set(value) <= set(properties) and all(
            is_valid(item, properties[key]) for key, item in value.items()
        )
    return schema["type"] != "integer" or schema["minimum"] <= value <= schema["maximum"]


@given(schemas, st.integers(0, 1000))
@settings(max_examples=60)
def test_random_logits_write_json_of_the_schema(schema, seed):
    text = BPE.decode(write(OF_BPE, Constraint("json_schema", schema), seed))
    assert is_valid(json.loads(text), schema), (text, schema)


def test_the_validator_can_say_no():
    assert not is_valid(True, {"type": "integer", "minimum": 0, "maximum": 1})
    assert not is_valid(2, {"type": "integer", "minimum": 0, "maximum": 1})
    assert not is_valid({}, {"type": "object", "properties": {"a": {}}, "required": ["a"]})
    assert not is_valid("abc", {"type": "string", "maxLength": 2})


def test_a_json_object_is_any_object():
    matcher = OF_BPE.matcher(Constraint("json_object"))
    spell(matcher, BPE, '{"name": "李白 😀", "poems": [1, -2.5e3, {"x": null}]}')
    assert allowed_ids(matcher) == ENDS
    matcher = OF_BPE.matcher(Constraint("json_object"))
    assert not matcher.allowed()[BPE.encode("[")[0]]
    assert not allowed_ids(matcher) & ENDS


def test_white_space_has_an_end():
    """A weak model would else write spaces for ever."""
    matcher = OF_BPE.matcher(Constraint("json_object"))
    spell(matcher, BPE, "{")
    (space,) = BPE.encode(" ")
    written = 0
    while matcher.allowed()[space] and written < 100:
        matcher.advance(space)
        written += 1
    assert 8 <= written <= 40
    spell(matcher, BPE, "}")


# Regexes, choices, grammars


@BOTH
@pytest.mark.parametrize(
    "regex",
    [
        "[a-z]{2,4}",
        "(床前|明月)光?",
        r"-?(0|[1-9][0-9]{0,3})(\.[0-9]{1,2})?",
        r"[^a]{3}",
        r'\{"x": (true|false)\}',
        "(a|ab|abc)(d|bcd)?",
    ],
)
def test_random_logits_match_the_regex(tokenizer, grammars, regex):
    texts = {tokenizer.decode(write(grammars, Constraint("regex", regex), s)) for s in range(12)}
    assert all(re.fullmatch(regex, text) for text in texts), texts
    assert len(texts) > 1


@BOTH
def test_a_choice_is_one_of_the_choices(tokenizer, grammars):
    choices = ["yes", "yes, but", "no", "明月", 'a "b"\n\\c', "/x/", "床"]
    usable = [c for c in choices if tokenizer.decode(tokenizer.encode(c)) == c]
    texts = {tokenizer.decode(write(grammars, Constraint("choice", usable), s)) for s in range(60)}
    assert texts == set(usable)
    assert len(usable) >= 6


def test_a_choice_may_go_on_in_another():
    matcher = OF_BPE.matcher(Constraint("choice", ["no", "nobody"]))
    spell(matcher, BPE, "no")
    assert allowed_ids(matcher) > ENDS
    assert not matcher.finished
    spell(matcher, BPE, "body")
    assert allowed_ids(matcher) == ENDS
    assert matcher.finished


@BOTH
def test_a_grammar_may_nest(tokenizer, grammars):
    matcher = grammars.matcher(Constraint("grammar", 'start: "(" start ")" | "床"'))
    spell(matcher, tokenizer, "(((床))")
    assert allowed_ids(matcher) == set(tokenizer.encode(")"))
    spell(matcher, tokenizer, ")")
    assert allowed_ids(matcher) == ENDS


# Tokens


@pytest.mark.parametrize(
    ("choices", "first"),
    [
        (["明月", "月明"], "明月"),  # E6 98 8E and E6 9C 88
        (["低头", "举头"], "低举"),  # E4 BD 8E and E4 B8 BE
        (["床前明", "床前月"], "床"),
        (["明"], "明"),
        (["éa", "明", "a"], "明a"),  # no é in this vocabulary
    ],
)
def test_characters_that_share_their_first_bytes(choices, first):
    """In a vocabulary of whole characters no token is a single byte."""
    constraint = Constraint("choice", choices)
    allowed = allowed_ids(OF_CHARACTERS.matcher(constraint))
    assert allowed == {CHARACTERS.token_id(character) for character in first}
    able = [choice for choice in choices if "é" not in choice]
    for seed in range(8):
        assert CHARACTERS.decode(write(OF_CHARACTERS, constraint, seed)) in able
    for choice in able:
        matcher = OF_CHARACTERS.matcher(constraint)
        spell(matcher, CHARACTERS, choice)
        assert matcher.finished


def test_characters_may_be_split_over_tokens():
    matcher = OF_BPE.matcher(Constraint("regex", "[锦瑟]"))
    pieces = BPE.encode("瑟")
    assert len(pieces) == 3
    spell(matcher, BPE, "瑟")
    assert matcher.finished
    first = OF_BPE.matcher(Constraint("regex", "[锦瑟]"))
    first.advance(pieces[0])
    assert not allowed_ids(first) & ENDS
    assert all(BPE.decode([token]) == "\ufffd" for token in allowed_ids(first))


@BOTH
def test_no_special_token_and_no_padding_inside_an_answer(tokenizer, grammars):
    matcher = grammars.matcher(Constraint("json_object"))
    spell(matcher, tokenizer, '{"')
    allowed = allowed_ids(matcher)
    assert len(allowed) > 60
    assert not allowed & set(tokenizer.special_tokens.values())
    assert max(allowed) < tokenizer.vocab_size
    assert matcher.allowed().shape == (tokenizer.vocab_size + PADDING,)
    for token in (tokenizer.token_id("<think>"), tokenizer.vocab_size, 10**6, -1, *ENDS):
        with pytest.raises(ValueError, match=f"token {token} does not fit"):
            matcher.advance(token)
    assert allowed_ids(matcher) == allowed  # a refused token changes nothing
    spell(matcher, tokenizer, 'x": 1}')


@BOTH
def test_text_that_spells_a_marker_is_text(tokenizer, grammars):
    """Flagged special or not: as in DeepSeek's own file, most markers are not."""
    for marker in ("<think>", "<fim>", "<｜tool▁sep｜>"):
        if tokenizer.decode(tokenizer.encode(marker)) != marker:
            continue  # not in the characters' vocabulary
        for constraint in (Constraint("choice", [marker, "no"]), Constraint("choice", [marker])):
            matcher = grammars.matcher(constraint)
            assert not allowed_ids(matcher) & set(tokenizer.special_tokens.values())
            spell(matcher, tokenizer, marker)
            assert matcher.finished


def test_without_end_tokens_an_answer_is_still_finished():
    matcher = Grammars(BPE, BPE.vocab_size, frozenset()).matcher(Constraint("choice", ["no"]))
    spell(matcher, BPE, "no")
    assert matcher.finished
    assert allowed_ids(matcher) == set()


def test_logits_may_be_narrower_than_the_vocabulary():
    matcher = Grammars(BPE, 100, ENDS).matcher(Constraint("regex", "[a-z]+"))
    assert matcher.allowed().shape == (100,)
    assert allowed_ids(matcher)


@BOTH
def test_nothing_follows_an_end(tokenizer, grammars):
    matcher = grammars.matcher(Constraint("json_object"))
    for token in [*tokenizer.encode('{"name": ["静", 12]}'), min(ENDS)]:
        assert matcher.allowed()[token]
        matcher.advance(token)
    assert matcher.finished
    assert not matcher.allowed().any()
    assert matcher.fitting(tokenizer.encode(" ")) == 0


def test_matchers_of_one_grammar_are_apart():
    one, two = (OF_BPE.matcher(Constraint("choice", ["ab", "cd"])) for _ in range(2))
    spell(one, BPE, "a")
    spell(two, BPE, "cd")
    spell(one, BPE, "b")
    assert OF_BPE.matcher(Constraint("choice", ["ab", "cd"])).allowed().sum() >= 2


def test_a_dead_end_allows_nothing():
    """This vocabulary has no z; the draw then reports a row without an allowed token."""
    few = Tokenizer.train_characters(["ab"])
    matcher = Grammars(few, few.vocab_size, ENDS).matcher(Constraint("regex", "az|abz"))
    matcher.advance(few.token_id("a"))
    assert allowed_ids(matcher) == {few.token_id("b")}
    matcher.advance(few.token_id("b"))
    assert not matcher.allowed().any()


# Refusals


@pytest.mark.parametrize(
    ("constraint", "words"),
    [
        (Constraint("json_schema", {"type": "wrong"}), "Invalid type: wrong"),
        (Constraint("json_schema", {"type": "integer", "minimum": 5, "maximum": 3}), "minimum"),
        (Constraint("json_schema", {"not": {}}), 'Unimplemented keys: \\["not"\\]'),
        (Constraint("json_schema", {"enum": []}), "Unsatisfiable"),
        (Constraint("json_schema", False), "must be an object, not bool"),
        (Constraint("json_schema", '{"type": "object"}'), "must be an object, not str"),
        (Constraint("json_schema", {"enum": [{1, 2}]}), "cannot be read"),
        (Constraint("json_schema", {"$ref": "#/nowhere"}), "nowhere"),
        (Constraint("json_object", {}), "takes no value"),
        (Constraint("regex", "(ab"), "unclosed group"),
        (Constraint("regex", "(?=a)b"), "look-ahead"),
        (Constraint("regex", r"[^\s\S]"), "no answer in this vocabulary"),
        (Constraint("regex", ""), "text of at least one character"),
        (Constraint("grammar", "start: foo"), 'unknown name: "foo"'),
        (Constraint("grammar", 'start: <think> "a"'), '"<think>" \\(an answer holds none\\)'),
        (Constraint("grammar", None), "text of at least one character"),
        (Constraint("choice", []), "list of at least one text"),
        (Constraint("choice", "yes"), "list of at least one text"),
        (Constraint("choice", ["yes", ""]), "a choice must be a text"),
        (Constraint("xml", "a"), "unknown constraint 'xml'"),  # type: ignore[arg-type]
    ],
    ids=str,
)
def test_faulty_constraints_are_refused_with_the_reason(constraint, words):
    with pytest.raises(DataError, match=words) as caught:
        OF_BPE.matcher(constraint)
    assert "<state>" not in str(caught.value)


def test_a_missing_library_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(DataError, match=re.escape("pip install 'qiusuo[constrain]'")):
        Grammars(BPE, BPE.vocab_size, ENDS)
