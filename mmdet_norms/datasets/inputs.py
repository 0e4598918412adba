"""The images and videos that a command line names: by file, folder or pattern."""

import glob
import os
from collections.abc import Sequence

from ..errors import UserError

IMAGES = ('.jpg', '.jpeg', '.png', '.bmp', '.webp', '.tif', '.tiff', '.ppm', '.pgm', '.jp2', '.jfif')
"""Suffixes of the files that are taken from a folder."""
VIDEOS = ('.mp4', '.m4v', '.avi', '.mov', '.mkv', '.webm', '.mpg', '.mpeg', '.wmv', '.flv')


def find_inputs(names: Sequence[str], skip: str) -> tuple[list[str], list[str]]:
    """Images and videos, each once, in the order in which they are named; those of a folder by their paths.

    A folder gives its images and those of its sub-folders (hidden ones and links to folders left out), no videos. A
    pattern that the shell has not replaced is replaced here. A file that is named is an image unless its suffix is
    that of a video.

    Args:
        names: of the command line.
        skip: sub-folders with a file of this name in them are passed over.

    Raises:
        UserError: a name of nothing, a folder without images, a camera, an address.
    """
    images: dict[str, str] = {}
    videos: dict[str, str] = {}
    for name in names:
        for path in _paths(name, skip):
            found = videos if path.lower().endswith(VIDEOS) else images
            found.setdefault(os.path.abspath(path), path)
    return list(images.values()), list(videos.values())


def _paths(name: str, skip: str) -> list[str]:
    path = os.path.expanduser(name)
    if os.path.isdir(path):
        return _of_folder(path, skip)
    if os.path.exists(path):
        return [path]
    if '://' in name:
        raise UserError(f'{name}: addresses and streams are not read; fetch the file, and name it')
    if name.isdigit():
        raise UserError(f'{name}: there is no such file, and cameras are not read; record a video, and name its file')
    if glob.has_magic(path):
        found = sorted(found for found in glob.glob(path, recursive=True) if os.path.isfile(found))
        if found:
            return found
        raise UserError(f'{name}: no file has a name of this pattern')
    raise UserError(f'there is no image, video or folder {name}')


def _of_folder(folder: str, skip: str) -> list[str]:
    found, others = [], []
    for parent, folders, files in os.walk(folder):
        if skip in files and parent != folder:
            folders.clear()
            continue
        folders[:] = sorted(name for name in folders if not name.startswith('.'))
        for name in sorted(files):
            if name.lower().endswith(IMAGES) and not name.startswith('.'):
                found.append(os.path.join(parent, name))
            elif name.lower().endswith(VIDEOS):
                others.append(os.path.join(parent, name))
    if found:
        return found
    hint = f'; videos of a folder are to be named, e.g. {others[0]}' if others else f' ({", ".join(IMAGES)})'
    raise UserError(f'{folder}: there is no image in this folder{hint}')
