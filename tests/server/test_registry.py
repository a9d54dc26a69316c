"""Models on their way: what happens where one cannot be loaded, for a reason nobody foresaw."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from qiusuo.server.api.errors import ApiError
from qiusuo.server.registry import Registry
from qiusuo.server.settings import Settings
from tests.server.api.talkers import talker


def test_a_failed_loading_is_told_and_its_name_is_free(tmp_path) -> None:
    """PyTorch says with a RuntimeError that there is no memory left."""
    failing = True

    def load(source: str, **options: Any) -> Any:
        if failing:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return talker()

    async def main() -> None:
        nonlocal failing
        registry = Registry(Settings(database=tmp_path / "db"), load)
        with pytest.raises(ApiError, match="allocate memory"):
            await registry.add("somewhere/talker")
        assert "allocate memory" in str(registry.loading["talker"].error)
        with pytest.raises(ApiError, match="Model Not Exist"):
            registry.get("talker")
        failing = False
        assert (await registry.add("somewhere/talker")).name == "talker"
        assert registry.loading == {}
        await registry.stop()

    asyncio.run(main())
