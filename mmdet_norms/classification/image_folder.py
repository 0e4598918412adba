"""Images in folders that are named after their classes: the layout of ImageNet and Imagenette."""

import os
from collections.abc import Sequence
from pathlib import Path

from mmengine.dataset import BaseDataset
from mmengine.registry import DATASETS

EXTENSIONS = ('.jpg', '.jpeg', '.png', '.ppm', '.bmp', '.pgm', '.tif', '.tiff', '.webp')


@DATASETS.register_module()
class ImageFolder(BaseDataset):
    """``data_root/split/CLASS/*.JPEG``; labels are the places of the classes in their sorted names.

    Every split has the classes of ``train`` where there is that folder, so that a class without images in ``val`` moves
    no label.

    Args:
        data_root: the folder that holds ``train`` and ``val``.
        split: which of its folders to read.
        classes_from: of which folder the names of the classes are. Default 'train'.
        extensions: of files that count as images, in lower case.
        kwargs: as for :class:`mmengine.dataset.BaseDataset`. ``metainfo=dict(classes=[...])`` gives an order of one's
            own.
    """

    def __init__(
        self,
        data_root: str,
        split: str = 'train',
        classes_from: str = 'train',
        extensions: Sequence[str] = EXTENSIONS,
        metainfo: dict | None = None,
        **kwargs,
    ) -> None:
        self.split, self.extensions = split, tuple(extensions)
        metainfo = dict(metainfo or {})
        if 'classes' not in metainfo:
            metainfo['classes'] = classes_of_folder(data_root, classes_from, split)
        super().__init__(data_root=data_root, metainfo=metainfo, **kwargs)

    def load_data_list(self) -> list[dict]:
        folder, label = Path(self.data_root, self.split), {}
        label = {name: i for i, name in enumerate(self.metainfo['classes'])}
        return [
            dict(img_path=str(path), gt_label=label[name])
            for name in label
            for path in sorted((folder / name).iterdir() if (folder / name).is_dir() else ())
            if path.suffix.lower() in self.extensions
        ]


def classes_of_folder(data_root: str | os.PathLike, *splits: str) -> tuple[str, ...]:
    """The sorted names of the folders in the first of ``splits`` that is there."""
    for split in splits:
        folder = Path(data_root, split)
        if folder.is_dir():
            return tuple(sorted(path.name for path in folder.iterdir() if path.is_dir()))
    return ()
