"""Fetch a model from a hub: into a draft folder, which gets its name when every file is there.

The draft outlives an interruption, so the next call goes on where this one stood. It holds the
list of what it is made of (`.pulled.json`): a file under its own name was checked against that
list; one that grows is `FILE.part`; and what a newer list no longer has is dropped. The list stays
in the finished folder, and a folder whose list is still right is not fetched again.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qiusuo.data.atomic import disk_errors, sync, write_file
from qiusuo.data.cache import cache_folder, only_one, require_space
from qiusuo.data.download import (
    BrokenLineError,
    Progress,
    RefusedError,
    RemoteFile,
    UnreachableError,
    download,
    open_url,
    part_of,
    show_url,
)
from qiusuo.data.errors import DataError
from qiusuo.data.hub_listing import Listing, explain_refusal, list_repository
from qiusuo.data.hub_reference import Reference, endpoint, parse_reference

LIST = ".pulled.json"


def pull_repository(
    reference: str, *, cache: Path | None = None, progress: Progress | None = None
) -> Path:
    """Fetch a model by name or address (see hub_reference.py); its folder, in the cache's models/.

    From a hub: config, tokenizer, safetensors, licence and README, or the one .gguf file; each is
    checked by the sha256 or git's SHA-1 that the hub states. Of a .gguf file at any other address
    only the size can be checked, unless the address ends in `#sha256=` and the checksum. `progress`
    counts the bytes of all files, those fetched earlier too.

    Asks with `HF_TOKEN` if that is set, and asks `HF_ENDPOINT` instead of huggingface.co. Raises
    `DataError` for a name that is not there or not open, a broken line, a wrong file, a full disk,
    and while another process pulls the same.
    """
    wanted = parse_reference(reference)
    folder = (cache or cache_folder()) / "models" / wanted.folder_name
    with only_one(f"model-{wanted.folder_name}", cache), disk_errors(folder):
        with _remedies(wanted):
            listing = _list_address(wanted) if wanted.url else list_repository(wanted)
            if _is_whole(folder, listing):
                return folder
            draft = folder.with_name(f".{folder.name}.draft")
            _open_draft(draft, wanted, listing)
            _fetch_all(listing.files, draft, _again(wanted, reference), progress)
        _finish(draft, folder)
    return folder


def _list_address(wanted: Reference) -> Listing:
    """The one file at an address; its size and version are what the server says of it."""
    with open_url(wanted.url, {}) as answer:
        size = answer.headers.get("Content-Length", "")
        version = answer.headers.get("ETag") or answer.headers.get("Last-Modified") or ""
    if not size.isdecimal():
        raise DataError(
            f"{show_url(wanted.url)} does not say how large it is, so nothing could tell when it "
            f"has arrived whole: download it by hand and convert the file"
        )
    digest = f"sha256:{wanted.sha256}" if wanted.sha256 else f"etag:{version}"
    return Listing("", (RemoteFile(wanted.file, wanted.url, int(size), digest),))


def _is_whole(folder: Path, listing: Listing) -> bool:
    files = _read_list(folder)
    return files == _list_of(listing) and all(
        _has_size(folder / file.name, file.size) for file in listing.files
    )


def _open_draft(draft: Path, wanted: Reference, listing: Listing) -> None:
    """Keep of an earlier draft what still belongs to it."""
    draft.mkdir(parents=True, exist_ok=True)
    new, old = _list_of(listing), _read_list(draft)
    same = {name for name in new if old.get(name) == new[name]}
    for path in draft.iterdir():
        if path.name != LIST and path.name.removesuffix(".part") not in same:
            path.unlink()
    _write_list(draft, wanted, listing)


def _fetch_all(
    files: tuple[RemoteFile, ...], draft: Path, again: str, progress: Progress | None
) -> None:
    """Every file that the draft does not hold yet, after a look at the disk."""
    total = sum(file.size for file in files)
    there = {file.name: _bytes_there(draft / file.name) for file in files}
    require_space(draft, total - sum(there.values()))
    done = sum(there.values())
    for file in files:
        if not _has_size(draft / file.name, file.size):
            before = done - there[file.name]
            download(
                file,
                draft / file.name,
                again=again,
                rejected=draft.with_suffix(".rejected") / file.name,
                progress=_shifted(progress, before, total),
            )
            done = before + file.size
    if progress is not None:
        progress(total, total)


def _again(wanted: Reference, reference: str) -> str:
    """What to do after a broken line; an address may hold a password and is not repeated."""
    return "pull that address again" if wanted.url else f"run `qiusuo pull {reference}` again"


def _shifted(progress: Progress | None, before: int, total: int) -> Progress | None:
    """The progress of one file as that of all."""
    if progress is None:
        return None
    return lambda done, _: progress(before + done, total)


def _finish(draft: Path, folder: Path) -> None:
    """Give the draft its name; what stood there goes only now that the new one is whole."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    sync(draft)
    draft.rename(folder)
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _bytes_there(target: Path) -> int:
    for path in (target, part_of(target)):
        if path.is_file():
            return path.stat().st_size
    return 0


def _list_of(listing: Listing) -> dict[str, Any]:
    return {file.name: {"size": file.size, "digest": file.digest} for file in listing.files}


def _read_list(folder: Path) -> dict[str, Any]:
    """The files a folder was made of; none if it says nothing readable."""
    try:
        return dict(json.loads((folder / LIST).read_text(encoding="utf-8"))["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _write_list(folder: Path, wanted: Reference, listing: Listing) -> None:
    source = show_url(wanted.url) if wanted.url else f"{endpoint()}/{wanted.repository}"
    content = {
        "source": source,
        "revision": "" if wanted.url else wanted.revision,
        "commit": listing.commit,
        "files": _list_of(listing),
    }
    write_file(folder / LIST, (json.dumps(content, indent=2) + "\n").encode())


@contextlib.contextmanager
def _remedies(wanted: Reference) -> Iterator[None]:
    """Turn what the line and the servers say into what to do."""
    try:
        yield
    except RefusedError as error:
        if wanted.url:
            raise DataError(f"{error}: check the address") from error
        raise explain_refusal(error, wanted) from error
    except UnreachableError as error:
        remedy = "check the address" if wanted.url else "check HF_ENDPOINT (a mirror of the hub)"
        raise DataError(f"{error}: {remedy} and the network; what has arrived is kept") from error
    except BrokenLineError as error:
        raise DataError(f"{error}: try again") from error
