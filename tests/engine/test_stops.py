"""Stop strings against a plain search of the whole text."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qiusuo.engine.stops import StopStrings


def streamed(text: str, stops: Sequence[str], cuts: Sequence[int] = ()) -> tuple[str, str | None]:
    """(what is given, the stop string) of a text in pieces of these lengths, then the rest."""
    search = StopStrings(stops)
    given, found = "", None
    for length in [*cuts, len(text)]:
        piece, stop = search.push(text[:length])
        text, given, found = text[length:], given + piece, found or stop
    given += search.finish()
    assert search.stopped == found
    return given, found


def plainly(text: str, stops: Sequence[str]) -> tuple[str, str | None]:
    """The first to end, the longest of those."""
    ends = [(text.find(stop) + len(stop), -len(stop), stop) for stop in stops if stop in text]
    if not ends:
        return text, None
    end, _, stop = min(ends)
    return text[: end - len(stop)], stop


def surely(text: str, stops: Sequence[str]) -> str:
    """The text without its longest end that a stop string begins with."""
    for start in range(len(text) + 1):
        if any(stop.startswith(text[start:]) for stop in stops):
            return text[:start]
    return text


FEW = st.text("ab", max_size=30)
STOPS = st.lists(st.text("ab", min_size=1, max_size=6), max_size=5)
CUTS = st.lists(st.integers(0, 4), max_size=20)


@given(FEW, STOPS, CUTS)
def test_however_the_text_is_cut(text: str, stops: list[str], cuts: list[int]) -> None:
    assert streamed(text, stops, cuts) == plainly(text, stops)


@given(st.text(), st.lists(st.text(min_size=1), max_size=3), CUTS)
def test_of_any_text(text: str, stops: list[str], cuts: list[int]) -> None:
    assert streamed(text, stops, cuts) == plainly(text, stops)


@given(FEW, STOPS)
def test_no_more_is_held_back_than_may_become_a_stop_string(text: str, stops: list[str]) -> None:
    search, given = StopStrings(stops), ""
    for place, character in enumerate(text, 1):
        piece, stop = search.push(character)
        given += piece
        if stop is not None:
            break
        assert given == surely(text[:place], stops)


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("", ["a"], ("", None)),
        ("none of them", [], ("none of them", None)),
        ("a\n\nb", ["\n\n"], ("a", "\n\n")),
        ("Q: 1\nQ: 2", ["\nQ:", "\nA:"], ("Q: 1", "\nQ:")),
        ("aab", ["ab"], ("a", "ab")),
        ("ababac", ["abac"], ("ab", "abac")),
        ("xabcdx", ["abcd", "b"], ("xa", "b")),  # complete first, though the other began first
        ("xabx", ["b", "ab"], ("x", "ab")),  # complete together: no part of the longer is given
        ("xabx", ["ab", "b"], ("x", "ab")),
        ("路漫漫其修远兮", ["修远"], ("路漫漫其", "修远")),
        ("👩‍🔬", ["\u200d"], ("👩", "\u200d")),
        ("abab", ["abc"], ("abab", None)),
    ],
)
def test_stops(text: str, stops: list[str], expected: tuple[str, str | None]) -> None:
    assert streamed(text, stops) == expected == streamed(text, stops, [1] * len(text))


def test_nothing_comes_after_a_stop() -> None:
    search = StopStrings(["."])
    assert search.push("a. b") == ("a", ".")
    assert (search.push("c."), search.finish(), search.stopped) == (("", None), "", ".")


def test_words_come_at_once() -> None:
    search = StopStrings(["\nHuman:"])
    assert [search.push(piece)[0] for piece in ("So", " \n", "H", "e", "\n")] == [
        *("So", " ", "", "\nHe", ""),
    ]
    assert search.finish() == "\n"


def test_a_long_stop_string_in_a_long_text() -> None:
    """Every end of this text may begin the stop string, and every character moves that on."""
    stop = "a" * 100_000 + "b"
    search = StopStrings([stop])
    pieces = [search.push("a")[0] for _ in range(150_000)]
    assert pieces == [""] * 100_000 + ["a"] * 50_000
    assert search.push("b") == ("", stop)


@pytest.mark.parametrize("stops", [[""], ["a", ""], "abc"])
def test_what_is_no_list_of_strings_is_refused(stops: Sequence[str]) -> None:
    with pytest.raises(ValueError, match="stops must be a list of strings that are not empty"):
        StopStrings(stops)


@given(
    st.text("ab", max_size=20),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    st.integers(0, 12),
    st.lists(st.integers(0, 4), max_size=6),
)
def test_strings_that_are_complete_too_early_are_let_pass(text, stops, early, cuts):
    """What ends behind the first ``early`` characters is found, wherever it began."""
    search = StopStrings(stops)
    search.watching = False
    head, tail = text[:early], text[early:]
    given = ""
    for length in cuts:
        given, head = given + search.push(head[:length])[0], head[length:]
    given += search.push(head)[0]
    search.watching = True
    given += search.push(tail)[0] + search.finish()
    ends = [
        (end, -len(stop), stop)
        for stop in stops
        for end in range(max(len(stop), early + 1), len(text) + 1)
        if text[end - len(stop) : end] == stop
    ]
    if not ends:
        assert (given, search.stopped) == (text, None)
    else:
        end, _, stop = min(ends)
        assert (given, search.stopped) == (text[: end - len(stop)], stop)
