"""Files in a folder, or in an uncompressed tar, by their names below it."""

import os
import tarfile
from pathlib import Path, PurePosixPath
from typing import Protocol


class Files(Protocol):
    def below(self, folder: str) -> list[str]:
        """The names of files in a folder, "" for all, and its subfolders, sorted."""

    def read(self, name: str) -> bytes: ...

    def label(self, name: str) -> str:
        """The file, as the user can find it."""


class _Folder:
    def __init__(self, root: str) -> None:
        self.root = Path(root)

    def below(self, folder: str) -> list[str]:
        return sorted(
            Path(path, name).relative_to(self.root).as_posix()
            for path, _, names in os.walk(self.root / folder, followlinks=True)
            for name in names
        )

    def read(self, name: str) -> bytes:
        return (self.root / name).read_bytes()

    def label(self, name: str) -> str:
        return str(self.root / name)


class _Tar:
    """Read by offset, the archive opened anew each time: workers must not share a place in it."""

    def __init__(self, root: str) -> None:
        self.root = root
        try:
            with tarfile.open(root, "r:") as archive:
                self.members = {
                    str(PurePosixPath(member.name)): (member.offset_data, member.size)
                    for member in archive
                    if member.isfile()
                }
        except tarfile.TarError as error:
            raise ValueError(f"dataset.root={root!r} is no uncompressed .tar: {error}") from error

    def below(self, folder: str) -> list[str]:
        prefix = f"{folder}/" if folder else ""
        return sorted(name for name in self.members if name.startswith(prefix))

    def read(self, name: str) -> bytes:
        if name not in self.members:
            raise FileNotFoundError("there is no such file in the archive")
        offset, size = self.members[name]
        with open(self.root, "rb") as file:
            file.seek(offset)
            data = file.read(size)
        if len(data) < size:
            raise ValueError(f"the archive ends after {len(data)} of {size} bytes")
        return data

    def label(self, name: str) -> str:
        return f"{self.root}:{name}"


def open_files(root: str) -> Files:
    """Return the files below `root`, a folder or an uncompressed tar.

    Raises:
        ValueError: a file that is no uncompressed tar.
    """
    return _Tar(root) if os.path.isfile(root) else _Folder(root)
