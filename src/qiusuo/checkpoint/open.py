"""What a person names, opened: a model folder, a run, a .gguf file, or a name that was pulled."""

from __future__ import annotations

import difflib
from dataclasses import replace
from pathlib import Path

from qiusuo.checkpoint.files import CheckpointError, restore_folder
from qiusuo.checkpoint.gguf.file import open_gguf
from qiusuo.checkpoint.huggingface import open_huggingface, write_huggingface
from qiusuo.checkpoint.stored import Checkpoint, Progress
from qiusuo.data.cache import only_one
from qiusuo.data.catalogue import catalogue
from qiusuo.data.hub_reference import find_model_folder, model_folder
from qiusuo.data.pull import pull_anything, pull_member


def open_checkpoint(reference: str | Path) -> Checkpoint:
    """The checkpoint that ``reference`` names; see ``find_model``."""
    place = find_model(reference)
    return open_gguf(place) if place.is_file() else open_huggingface(place)


def find_model(reference: str | Path) -> Path:
    """A folder in Hugging Face layout, or a .gguf file: at that path, as the finished model of the
    run at that path, or pulled under that name. CheckpointError says what is there instead."""
    path = Path(reference)
    for folder in (path, path / "model"):
        restore_folder(folder)
    if path.is_file():
        return _checked_file(path)
    if not path.is_dir():
        pulled = find_model_folder(str(reference))
        if pulled is None:
            raise CheckpointError(_not_there(str(reference)))
        path = pulled
    is_run = (path / "recipe.toml").is_file()  # else a model that holds another stays itself
    for folder in (path / "model", path) if is_run else (path, path / "model"):
        if (folder / "config.json").is_file():
            return folder
    ggufs = sorted(path.glob("*.gguf"))
    if len(ggufs) == 1:
        return ggufs[0]
    if ggufs:
        names = ", ".join(file.name for file in ggufs[:5])
        raise CheckpointError(f"{path} holds {len(ggufs)} .gguf files ({names}); name one of them")
    if is_run:
        raise CheckpointError(
            f"{path} is a run without a finished model: `qiusuo train --resume --run {path}`"
        )
    raise CheckpointError(f"{path} holds no config.json, so it is not a model folder")


def pull_model(name: str, progress: Progress | None = None) -> Path:
    """Fetch what ``name`` is, once. A catalogue's model arrives as GGUF and is converted to a
    folder, so that it loads as any other; the folder is all that stays. In float32: bfloat16 cannot
    hold what four bits and a scale mean, and a small model's near-ties fall otherwise."""
    entry = catalogue().get(name)
    if entry is None or entry.kind != "model":
        return pull_anything(name, progress=progress)
    folder = model_folder(name)
    if (folder / "config.json").is_file():
        return folder
    with only_one(f"model-{name}"):
        if not (folder / "config.json").is_file():  # nobody has made it meanwhile
            source = pull_member(name, progress=progress)
            checkpoint = replace(open_gguf(source), sampling=entry.sampling)
            write_huggingface(checkpoint, folder, "F32", progress=progress)
            source.unlink(missing_ok=True)
    return folder


def _checked_file(path: Path) -> Path:
    if path.suffix == ".gguf":
        return path
    if path.name == "config.json" or path.suffix == ".safetensors":
        return path.parent
    raise CheckpointError(f"{path} is no model: give its folder, or a .gguf file")


def _not_there(reference: str) -> str:
    models = [entry.name for entry in catalogue().values() if entry.kind == "model"]
    if reference in models:
        return f"{reference} is not here yet: run `qiusuo pull {reference}`"
    if reference in catalogue():
        return f"{reference} is a corpus, no model: models by name are {', '.join(models)}"
    near = difflib.get_close_matches(reference, models, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    if reference.count("/") == 1 and not hint:
        hint = f", nor pulled: `qiusuo pull {reference}` fetches it from Hugging Face"
    return (
        f"{reference} is not there: expected a model folder, a run, a .gguf file or one of "
        f"{', '.join(models)}{hint}"
    )
