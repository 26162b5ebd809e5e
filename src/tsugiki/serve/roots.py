"""The one way from a path in a request to a folder: below an allowed root, through no link."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from tsugiki.errors import UserError


def resolve(path: str, roots: Sequence[Path]) -> Path:
    """The adapter folder that `path` names below one of `roots` (absolute paths without links; relative: below any of them).

    Raises UserError, always the same one, for what is outside, holds "..", NUL or a link, or is not there: an answer tells
    nothing of the file system elsewhere.
    """
    refused = UserError("path: names no adapter folder below an allowed root")
    if not roots:
        raise UserError("path: no folder is allowed; start the server with --admin-root DIR")
    given = PurePosixPath(path)
    if "\0" in path or "\\" in path or ".." in given.parts or not path.strip():
        raise refused
    for root in roots:
        if given.is_absolute() and not given.is_relative_to(root):
            continue
        folder = root / given                         # of an absolute path, the path itself
        try:
            if _plain(folder, root):
                return folder
        except (OSError, ValueError):                 # too long a name, no right to look
            continue
    raise refused


def _plain(folder: Path, root: Path) -> bool:
    """Whether it is an adapter's folder, and no step to it below the root and nothing in it is a link."""
    steps = [folder, *folder.parents]
    below = steps[:steps.index(root)]
    if any(step.is_symlink() for step in below) or not folder.is_dir():
        return False
    return (folder / "adapter_config.json").is_file() and not any(entry.is_symlink() for entry in folder.iterdir())


def allowed_roots(given: Sequence[str]) -> tuple[Path, ...]:
    """--admin-root's folders, absolute and without links. Raises UserError."""
    for text in given:
        if not Path(text).is_dir():
            raise UserError(f"--admin-root {text}: no such folder")
    return tuple(Path(text).resolve() for text in given)
