"""How much of what a computation made is still held, by whomever."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Alive(TorchDispatchMode):
    """While entered, notes every storage that operations make; ``bytes`` counts those that someone
    holds, autograd's graph as well."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        before = {one.untyped_storage()._cdata for one in _tensors((args, kwargs))}
        out = func(*args, **kwargs)
        for one in _tensors(out):
            storage = one.untyped_storage()
            if storage._cdata not in before:
                self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return out

    @property
    def bytes(self) -> int:
        return sum(size for storage, size in self.storages.values() if not storage.expired())


def _tensors(tree: Any) -> list[Tensor]:
    return [one for one in tree_leaves(tree) if isinstance(one, Tensor)]
