"""Which native library a test of kernels runs with."""

from collections.abc import Iterator

import pytest

from qiusuo.kernels.native import CHOICES, VARIABLE, KernelError, built_library, native


@pytest.fixture(params=["reference", *CHOICES])
def instructions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Every instruction set of this processor in turn, and PyTorch's operations alone."""
    if request.param != "reference" and built_library() is None:
        pytest.skip("the native library is not in use")
    monkeypatch.setenv(VARIABLE, request.param)
    native.cache_clear()
    try:
        native()
    except KernelError:
        pytest.skip(f"this processor has no {request.param}")
    yield request.param
    monkeypatch.undo()
    native.cache_clear()
