"""Fill in the middle: teaching a left-to-right model to write between two given ends.

A share of the documents (DeepSeek-V3: 0.1) is cut in three at random characters and told in the
order prefix, suffix, middle, with markers between, so that predicting the next token becomes
predicting the middle from both sides:

    <｜fim▁begin｜>prefix<｜fim▁hole｜>suffix<｜fim▁end｜>middle

The cut is made in the text, not between tokens, because an editor's cursor stands anywhere.
"""

from __future__ import annotations

from qiusuo.data.errors import DataError
from qiusuo.data.randomness import check_seed, fractions
from qiusuo.data.tokenizer import Tokenizer
from qiusuo.data.vocabularies import FIM_BEGIN, FIM_END, FIM_HOLE

SHORTEST = 32
"""Documents of fewer characters have no middle worth asking for."""


class FillInTheMiddle:
    """Cuts documents at a rate; which ones and where depends on the seed and on their number."""

    def __init__(self, tokenizer: Tokenizer, *, rate: float, seed: int) -> None:
        if not 0 <= rate <= 1:
            raise DataError(f"fim_rate must be in [0, 1], not {rate}")
        self._rate = rate
        self._seed = check_seed(seed)
        self._markers: tuple[int, int, int] | None = None
        if rate > 0:
            begin, hole, end = map(tokenizer.token_id, (FIM_BEGIN, FIM_HOLE, FIM_END))
            self._markers = (begin, hole, end)

    def parts(self, text: str, number: int) -> list[int | str]:
        """Document `number` as marker ids and texts still to be encoded, in their order."""
        if self._markers is None or len(text) < SHORTEST:
            return [text]
        chance, *places = fractions((self._seed, number), 3)
        if chance >= self._rate:
            return [text]
        first, second = sorted(int(place * (len(text) + 1)) for place in places)
        begin, hole, end = self._markers
        return [begin, text[:first], hole, text[second:], end, text[first:second]]
