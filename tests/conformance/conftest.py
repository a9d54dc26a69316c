"""Real tokenizers by name, each put together once."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from qiusuo.data.tokenizer import Tokenizer
from tests.conformance.real_tokenizers import PackageMissingError, light_folder


@pytest.fixture(scope="session")
def light(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tokenizer]:
    """A function from a name to its tokenizer, made of the small test packages."""
    made: dict[str, Tokenizer] = {}

    def load(name: str) -> Tokenizer:
        if name not in made:
            try:
                made[name] = Tokenizer.load(light_folder(name, tmp_path_factory.mktemp(name)))
            except PackageMissingError as error:
                pytest.skip(str(error))
        return made[name]

    return load
