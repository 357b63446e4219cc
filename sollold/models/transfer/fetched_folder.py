"""Removes the folder of a model that was fetched or named here, but no file that a user has put there.

Blocks: call it in a thread.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from sollold.models.stores.folders import CARD, read_card

NOTES = "parts.json"
OWN_FILES = {CARD, NOTES, f"{NOTES}.new"}
"""Files in the folder of a download besides the model's."""


def remove_fetched(folder: Path) -> None:
    """Remove a folder's files that were fetched or linked here, and the folder if nothing else is in it.

    If it is a link to a folder elsewhere, only the link is removed.

    Raises:
        OSError: one can't be removed.
    """
    if folder.is_symlink():
        folder.unlink()
        return
    card = read_card(folder)
    names = card.files if card is not None else ()

    def fetched(path: Path) -> bool:
        if path.name in OWN_FILES or path.name in names:
            return True
        # A card of an earlier release does not name the files; without any card there are only links.
        unnamed = not names and path.suffix == ".gguf"
        return path.is_symlink() if card is None else unnamed and (path.is_symlink() or path.is_file())

    # The card last: until then it can be tried again.
    for path in sorted(filter(fetched, folder.iterdir()), key=lambda path: path.name in OWN_FILES):
        path.unlink()
    if not any(folder.iterdir()):
        folder.rmdir()


def merge_foreign(old: Path, heir: Path) -> None:
    """Remove an older folder as far as possible; a user's files in it are moved to ``heir``."""
    with contextlib.suppress(OSError):
        remove_fetched(old)
        for path in list(old.iterdir()):
            if not (heir / path.name).exists():
                path.rename(heir / path.name)
        old.rmdir()
