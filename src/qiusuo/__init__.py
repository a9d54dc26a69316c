"""Qiusuo (求索): the whole DeepSeek recipe in one package.

>>> import qiusuo
>>> lm = qiusuo.load("runs/quickstart")
>>> lm.generate(["春眠不觉晓"], max_tokens=32)[0].text
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qiusuo.version import __version__

if TYPE_CHECKING:
    from qiusuo.engine.language_model import Completion, LanguageModel, Message
    from qiusuo.engine.loading import load

__all__ = ["Completion", "LanguageModel", "Message", "__version__", "load"]


def __getattr__(name: str) -> Any:
    """Import torch only when a model is asked for: ``qiusuo --help`` stays quick."""
    if name == "load":
        from qiusuo.engine import loading

        return loading.load
    if name in __all__:
        from qiusuo.engine import language_model

        return getattr(language_model, name)
    raise AttributeError(f"module 'qiusuo' has no attribute {name!r}")
