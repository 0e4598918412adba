"""``--show-dir``: every test image with its detections, in the folders that the images lie in."""

import os
from pathlib import Path

import mmcv
from mmdet.engine.hooks import DetVisualizationHook
from mmengine.fileio import get
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from ..errors import UserError
from ..files import write_bytes

MARK = '.pictures-of-detections'
"""Name of the file that lists what was drawn into its folder, a path a line: these pictures may be drawn again."""


@HOOKS.register_module()
class PicturesHook(DetVisualizationHook):
    """mmdet's visualization hook that loses no picture and draws over none of the user's.

    The stock hook writes ``test_out_dir/NAME`` for every image: of ``camera1/frame.png`` and ``camera2/frame.png`` one
    remains, and a ``test_out_dir`` that holds the images is drawn over. Here sub-folders are kept, and a test does not
    start if a picture would replace a file that this hook did not make.

    Args:
        kwargs: as for :class:`mmdet.engine.hooks.DetVisualizationHook`; ``test_out_dir`` is a path of its own, not
            one below the dated folder of the run.

    Raises:
        UserError: a picture would be written over a test image or over a file that is not of this hook.
    """

    def before_test(self, runner: Runner) -> None:
        """Decide where each picture goes; refuse before anything is drawn."""
        self._places = {}
        if not self.draw or self.test_out_dir is None:
            return
        folder = Path(self.test_out_dir)
        images = image_paths(runner.test_dataloader.dataset)
        self._places = picture_places(images, folder)
        refuse_to_draw_over(self._places, folder)
        if runner.rank == 0:
            note_pictures(self._places, folder)

    def after_test_iter(self, runner: Runner, batch_idx: int, data_batch: dict, outputs: list) -> None:
        """Draw as the stock hook does, each picture at its place."""
        if not self._places:
            super().after_test_iter(runner, batch_idx, data_batch, outputs)
            return
        for sample in outputs:
            self._test_index += 1
            image = mmcv.imfrombytes(get(sample.img_path, backend_args=self.backend_args), channel_order='rgb')
            self._visualizer.add_datasample(
                'test_img',
                image,
                data_sample=sample,
                pred_score_thr=self.score_thr,
                out_file=str(self._places[sample.img_path]),
                step=self._test_index,
            )


def image_paths(dataset: object) -> list[str]:
    """The image files of a data set, those within wrappers included, in its order."""
    return [dataset.get_data_info(i)['img_path'] for i in range(len(dataset))]


def picture_places(images: list[str], folder: Path) -> dict[str, Path]:
    """Where in ``folder`` the picture of each image goes: as the images lie to each other."""
    parents = [os.path.dirname(os.path.abspath(path)) for path in images]
    common = os.path.commonpath(parents) if parents else ''
    return {path: folder / os.path.relpath(os.path.abspath(path), common) for path in images}


def refuse_to_draw_over(
    places: dict[str, Path], folder: Path, option: str = '--show-dir', image: str = 'a test image'
) -> None:
    """Raise if one of the pictures is there already and was not drawn by this package.

    Args:
        places: image -> its picture.
        folder: where the pictures go.
        option: that names the folder.
        image: what messages call one of the images.
    """
    there = [place for place in places.values() if place.exists()]
    if not there:
        return
    images = {os.path.realpath(path) for path in places}
    over = next((place for place in there if os.path.realpath(place) in images), None)
    if over is not None:
        raise UserError(f'{option} {folder}: {over} is {image}, and would be drawn over; name another folder')
    drawn = _noted(folder)
    other = next((place for place in there if _line(place, folder) not in drawn), None)
    if other is not None:
        raise UserError(
            f'{option} {folder}: holds {other.relative_to(folder)} and would lose it, which no run has drawn; '
            'name another folder, or move its files away'
        )


def note_pictures(places: dict[str, Path], folder: Path) -> None:
    """Make ``folder``, and note in it which pictures are to be drawn there, beside those of earlier runs."""
    names = _noted(folder) | {_line(place, folder) for place in places.values()}
    write_bytes(folder / MARK, os.fsencode(''.join(f'{name}\n' for name in sorted(names))))


def _line(place: Path, folder: Path) -> str:
    return place.relative_to(folder).as_posix().replace('\n', '\\n')


def _noted(folder: Path) -> set[str]:
    try:
        return set(os.fsdecode((folder / MARK).read_bytes()).split('\n')) - {''}
    except OSError:
        return set()
