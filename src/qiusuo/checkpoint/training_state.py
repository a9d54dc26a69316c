"""A training state on disk: weights, optimizers, the loader's place and counters.

``state.pt`` holds all of it. Where several processes train together the tensors of which each has
a part lie beside it, in ``shards``: files of PyTorch's distributed checkpoint, one a process, each
part with its place in the whole; ``state.pt`` then says in their stead which they are. So a state
is read in one way whoever wrote it, by one process or by any number.
"""

from __future__ import annotations

import io
import pickle
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor import empty as empty_shards

from qiusuo.checkpoint.files import CheckpointError

STATE_FILE = "state.pt"
SHARDS = "shards"  # the folder beside it
IN_SHARDS = "in shards"  # a table with this key stands for a tensor of that name


def save_state(folder: Path, content: dict[str, Any]) -> None:
    """Write tensors, numbers, strings and containers of them into a checkpoint folder."""
    path = folder / STATE_FILE
    try:
        torch.save(content, path)
    except RuntimeError as error:  # torch's word for what the disk refuses
        raise CheckpointError(f"{path} could not be written: {error}") from error


def save_shards(
    folder: Path, content: dict[str, Any], group: dist.ProcessGroup, leads: bool
) -> Future[Any]:
    """Begin to write what every process of ``group`` has its part of: to be called by all. Tensors
    are copied before this returns; the future is done when all files of all processes are on the
    disk. The one that ``leads`` writes the rest at once. No other collective may use the group
    until then."""
    shards: dict[str, Tensor] = {}

    def put_aside(path: str, value: Any) -> Any:
        if not isinstance(value, DTensor):
            return value
        shards[path] = value
        return {IN_SHARDS: path, "shape": list(value.shape), "dtype": value.dtype}

    rest = _mapped(content, put_aside)
    if leads:
        save_state(folder, rest)
    writer = dcp.FileSystemWriter(folder / SHARDS, sync_files=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it tells at every save that it is experimental
        written = dcp.async_save(shards, storage_writer=writer, process_group=group)
    return cast(Future[Any], written)


def wait_for(writing: Future[Any]) -> None:
    """Until ``save_shards`` has ended on all processes; the error of the first that failed."""
    try:
        writing.result()
    except dcp.CheckpointException as error:
        failure, _ = next(iter(error.failures.values()))
        raise failure from None


def load_state(folder: Path, mesh: DeviceMesh | None = None) -> dict[str, Any]:
    """Read what ``save_state`` or ``save_shards`` wrote; nothing in the files is executed. Sharded
    tensors come whole, or, with a mesh, as this process's part of them."""
    path = folder / STATE_FILE
    try:
        # One of several reads of a whole state the pages of its part; alone it wants all of them.
        mapped = mesh is not None
        content: dict[str, Any] = torch.load(
            path, map_location="cpu", weights_only=True, mmap=mapped
        )
        shards: dict[str, Tensor] = {}

        def make_room(_: str, value: Any) -> Any:
            if not (isinstance(value, dict) and IN_SHARDS in value):
                return value
            shape, dtype = value["shape"], value["dtype"]
            if mesh is None:
                room = torch.empty(shape, dtype=dtype)
            else:
                room = empty_shards(shape, dtype=dtype, device_mesh=mesh, placements=[Shard(0)])
            shards[value[IN_SHARDS]] = room
            return room

        content = _mapped(content, make_room)
        if shards:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that no process group is used
                dcp.load(shards, storage_reader=_Reader(folder / SHARDS), no_dist=True)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError, dcp.CheckpointException) as e:
        raise CheckpointError(f"{path} cannot be read as a training state: {e}") from e
    return content


def _mapped(value: Any, change: Callable[[str, Any], Any], path: str = "") -> Any:
    """The tree of dicts and lists with every value, containers first, changed."""
    changed = change(path, value)
    if changed is not value:
        return changed
    if isinstance(value, dict):
        return {key: _mapped(each, change, f"{path}/{key}") for key, each in value.items()}
    if isinstance(value, list):
        return [_mapped(each, change, f"{path}/{place}") for place, each in enumerate(value)]
    return value


class _Reader(dcp.FileSystemReader):
    """PyTorch's, but for the index, which is a pickle: only what an index is made of may be in
    it."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = Path(self.path) / ".metadata"
        metadata: Metadata = _IndexUnpickler(io.BytesIO(path.read_bytes())).load()
        if getattr(metadata, "storage_meta", None) is None:
            metadata.storage_meta = dcp.metadata.StorageMeta()
        metadata.storage_meta.load_id = self.load_id  # type: ignore[union-attr]
        return metadata


class _IndexUnpickler(pickle.Unpickler):
    MODULES = (
        "torch.distributed.checkpoint.metadata",
        "torch.distributed.checkpoint.filesystem",
        "torch.distributed.checkpoint.planner",
        "torch.serialization",
    )

    def find_class(self, module: str, name: str) -> Any:
        plain = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        known = {("torch", "Size"), ("collections", "OrderedDict"), ("pathlib", "PosixPath")}
        if module in self.MODULES or plain or (module, name) in known:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"its index names {module}.{name}, which no index needs")
