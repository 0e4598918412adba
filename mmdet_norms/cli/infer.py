"""``tools/infer.py``: detect objects in images and videos that belong to no data set."""

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.registry import HOOKS
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from mmdet_norms.checkpoints.read import Checkpoint, read_checkpoint
from mmdet_norms.commands import typed
from mmdet_norms.compat import mmcv_ops
from mmdet_norms.console import as_text, plain_column, plain_console
from mmdet_norms.datasets.images import decode
from mmdet_norms.datasets.inputs import VIDEOS, find_inputs
from mmdet_norms.datasets.locate import set_num_classes
from mmdet_norms.datasets.sources import datasets, metainfo_of
from mmdet_norms.deploy import is_fused
from mmdet_norms.engine.inference import (
    KEPT_SUFFIXES,
    Image,
    Inference,
    displayable,
    draw,
    instances_to_draw,
    records,
    save_picture,
)
from mmdet_norms.engine.picture import Colours, class_colours
from mmdet_norms.engine.pictures import MARK, note_pictures, picture_places, refuse_to_draw_over
from mmdet_norms.engine.video import Video, writing_video
from mmdet_norms.entries import is_a
from mmdet_norms.files import remove_unfinished, replacing, require_writable
from mmdet_norms.version import __version__

from .common import UserError, command, require_detector, run_with_checkpoint, use_threads
from .detector import add_detector_arguments, detector_config, load_detector
from .weights import classes_of

DETECTIONS = 'detections.json'
_MADE_BY = 'mmdet_norms'


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Detect as the command line says; the status is 1 if some of the files could not be read."""
    args = parse_args(argv)
    images, videos = find_inputs(args.inputs, skip=MARK)
    places = _places(images, videos, Path(args.out))
    _check_out(args, places)
    device = _device(args.device)
    threads = use_threads(args, device=device)
    if threads is not None:
        print(threads)
    cfg = detector_config(args)
    require_detector(cfg, args.config, 'infer')
    found: list[Run] = []
    run_with_checkpoint(lambda: found.append(Run(cfg, args, device, places)), args)
    run = found[0]
    _claim(args, places)
    run.detect(images, videos)
    run.report()


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog=typed('infer'),
        description='Detect objects in images and videos: pictures with the detections, and detections.json.',
    )
    add_detector_arguments(
        parser, (), 'the data that the model was trained on; of use only where a checkpoint does not name its classes'
    )
    parser.add_argument(
        'inputs',
        nargs='+',
        metavar='IMAGE|DIR|VIDEO',
        help='images, folders (with their sub-folders; of these the images), patterns, videos '
        f'({", ".join(VIDEOS[:4])}, ...)',
    )
    parser.add_argument('--out', required=True, metavar='DIR', help=f'where pictures and {DETECTIONS} go')
    parser.add_argument(
        '--score-thr', type=float, default=0.3, metavar='P', help='least score of a detection (default: 0.3)'
    )
    parser.add_argument('--fuse', action='store_true', help='fold the norms into the convolutions first: faster')
    parser.add_argument('--device', help='cpu, cuda, cuda:1, ... (default: a GPU if there is one)')
    parser.add_argument(
        '--batch-size',
        type=int,
        default=1,
        metavar='N',
        help='images at a time (default: 1; images of different sizes are padded to one, which changes digits)',
    )
    parser.add_argument('--no-pictures', action='store_true', help=f'write {DETECTIONS} only')
    parser.add_argument('--no-json', action='store_true', help='write pictures only')
    args = parser.parse_args(argv)
    if args.no_pictures and args.no_json:
        parser.error('--no-pictures and --no-json together leave nothing to write')
    if not 0 <= args.score_thr <= 1:
        raise UserError(f'--score-thr {args.score_thr}: must be between 0 and 1')
    if args.batch_size < 1:
        parser.error(f'argument --batch-size: {args.batch_size} must be at least 1')
    return args


class Run:
    """A detector, and what it has found so far.

    Args:
        cfg: the config, with a model that the checkpoint fits.
        args: the command line.
        device: where the model runs.
        places: where the picture or video of each input goes.
    """

    def __init__(self, cfg: Config, args: argparse.Namespace, device: torch.device, places: dict[str, Path]):
        self.args, self.places = args, places
        checkpoint = read_checkpoint(args.checkpoint)
        self.fused = args.fuse or is_fused(checkpoint.content)
        self.classes, palette = _names(cfg, args, checkpoint)
        self.colours: Colours = class_colours(self.classes or ['class 0'], palette)
        model = load_detector(cfg, args, checkpoint, args.fuse).to(device)
        if any(is_a(hook, 'ChannelsLastHook', HOOKS) for hook in cfg.get('custom_hooks') or []):
            model = model.to(memory_format=torch.channels_last)  # as in training and test: the same digits
        mmcv_ops.announce()
        self.inference = Inference(model, cfg)
        self.images: list[dict] = []
        self.videos: list[dict] = []
        self.failed: list[dict] = []

    def detect(self, images: list[str], videos: list[str]) -> None:
        """Go through all inputs, writing pictures and videos on the way."""
        columns = (plain_column('{task.description}'), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=plain_console(stderr=True)) as self.bar:
            if images:
                task = self.bar.add_task('images', total=len(images))
                for group in _batches(self._read(images, task), self.args.batch_size):
                    self._detect_in_images(group)
                    self.bar.advance(task, len(group))
            for path in videos:
                try:
                    self._detect_in_video(Video(path))
                except UserError as error:
                    self._fail(path, str(error).removeprefix(f'{path}: '))

    def _read(self, paths: list[str], task: int) -> Iterator[tuple[str, Image]]:
        for path in paths:
            try:
                header = decode(path)  # it knows what is wrong; OpenCV gives None, or fills what is missing with grey
                if isinstance(header, str):
                    raise OSError(header)
                image = self.inference.read(path)
            except Exception as error:  # decoders raise anything
                self._fail(path, str(error) or type(error).__name__)
                self.bar.advance(task)
            else:
                yield path, image

    def _detect_in_images(self, group: Sequence[tuple[str, Image]]) -> None:
        for (path, image), sample in zip(group, self.inference.detect([image for _, image in group])):
            height, width = image.pixels.shape[:2]
            entry = dict(file=path, width=width, height=height)
            if not self.args.no_pictures:
                place = self.places[path]
                save_picture(self._drawn(image, sample), place)
                entry['picture'] = place.relative_to(self.args.out).as_posix()
            entry['detections'] = records(sample, self.classes, self.args.score_thr)
            self.images.append(entry)

    def _detect_in_video(self, video: Video) -> None:
        place = self.places[video.path]
        entry = dict(file=video.path, width=video.width, height=video.height, fps=round(video.fps, 3))
        opened = nullcontext(None)
        if not self.args.no_pictures:
            opened = writing_video(place, video.width, video.height, video.fps)
            entry['video'] = place.relative_to(self.args.out).as_posix()
        frames: list[dict] = []
        task = self.bar.add_task(as_text(os.path.basename(video.path)), total=video.announced or None)
        with opened as write:
            for group in _batches(map(self.inference.take, video), self.args.batch_size):
                for image, sample in zip(group, self.inference.detect(group)):
                    found = records(sample, self.classes, self.args.score_thr)
                    frames.append(dict(frame=len(frames), detections=found))
                    if write is not None:
                        write(np.ascontiguousarray(self._drawn(image, sample)[..., ::-1]))
                self.bar.advance(task, len(group))
        self.bar.update(task, total=len(frames))
        if len(frames) < video.announced:
            self._warn(f'{video.path}: ends after {len(frames)} of the {video.announced} frames that it should have')
        self.videos.append(dict(entry, frames=frames))

    def _drawn(self, image: Image, sample: object) -> np.ndarray:
        return draw(displayable(image.pixels), instances_to_draw(sample, self.colours, self.args.score_thr))

    def _fail(self, path: str, reason: str) -> None:
        self._warn(f'{path}: {reason}')
        self.failed.append(dict(file=path, reason=reason))

    def _warn(self, text: str) -> None:
        self.bar.console.print(f'warning: {as_text(text)}', soft_wrap=True)

    def report(self) -> None:
        """Write the detections and say what there is.

        Raises:
            UserError: not one of the inputs could be read.
            SystemExit: some could not: the status is 1.
        """
        count = len(self.images) + len(self.videos) + len(self.failed)
        if not self.images and not self.videos:
            raise UserError(f'none of the {count} files could be read' if count > 1 else 'the file could not be read')
        if not self.args.no_json:
            write_detections(Path(self.args.out) / DETECTIONS, self._content())
        found = Counter(detection['class'] for detection in self._all_detections())
        frames = sum(len(video['frames']) for video in self.videos)
        what = [f'{len(self.images)} images'] if self.images else []
        what += [f'{len(self.videos)} videos of {frames} frames'] if self.videos else []
        by_class = ', '.join(f'{as_text(name)} {number}' for name, number in found.most_common())
        print(
            f'{" and ".join(what)}: {sum(found.values())} detections with a score of at least {self.args.score_thr:g}'
            + (f' ({by_class})' if by_class else '')
        )
        written = [] if self.args.no_json else [f'detections: {os.path.join(self.args.out, DETECTIONS)}']
        written += [] if self.args.no_pictures else [f'pictures: {self.args.out}']
        print(as_text('   '.join(written)))
        if self.failed:
            print(f'error: {len(self.failed)} of {count} files could not be read, see above', file=sys.stderr)
            sys.exit(1)

    def _all_detections(self) -> Iterator[dict]:
        for image in self.images:
            yield from image['detections']
        for video in self.videos:
            for frame in video['frames']:
                yield from frame['detections']

    def _content(self) -> dict:
        args = self.args
        return dict(
            made_by=f'{_MADE_BY} {__version__}',
            config=args.config,
            norm=args.norm,
            geometry=args.geometry,
            checkpoint=args.checkpoint,
            fused=self.fused,
            score_thr=args.score_thr,
            classes=list(self.classes),
            images=self.images,
            videos=self.videos,
            failed=self.failed,
        )


def _batches(items: Iterable, size: int) -> Iterator[tuple]:
    items = iter(items)
    while group := tuple(islice(items, size)):
        yield group


def write_detections(path: Path, content: dict) -> None:
    """Write them in one step."""
    with replacing(path) as part, open(part, 'w', encoding='utf-8', errors='backslashreplace') as file:
        json.dump(content, file, allow_nan=False)
        file.write('\n')


def _names(cfg: Config, args: argparse.Namespace, checkpoint: Checkpoint) -> tuple[tuple[str, ...], object]:
    """Names and colours of the classes: the checkpoint's, else the config's. The heads get as many classes.

    A model that was trained with ``--data-root`` has its data's classes, of which the config knows nothing.
    """
    theirs, ours = checkpoint.classes(), classes_of(cfg)
    if theirs and ours and len(theirs) != len(ours) and args.data_root is None:
        set_num_classes(cfg.model, len(ours), len(theirs))
    dataset = next(datasets((cfg.get('test_dataloader') or {}).get('dataset')), None) or {}
    known = metainfo_of(dataset)
    said = checkpoint.meta.get('dataset_meta')
    said = said if isinstance(said, dict) else {}
    return theirs or ours or (), said.get('palette', said.get('PALETTE')) or known.get('palette')


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device(get_device())
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        why = str(error).splitlines()[0]
        raise UserError(f'--device {name}: not to be had here ({why}); leave it out, or write --device cpu') from error
    return device


# ------------------------------------------------------------------------------------------------------ the out folder


def _places(images: list[str], videos: list[str], folder: Path) -> dict[str, Path]:
    """Where in ``folder`` the picture of each input goes: as the inputs lie to each other, under their names.

    What cannot be written in the format of its input gets a suffix more.
    """
    kept = dict.fromkeys(images, KEPT_SUFFIXES) | dict.fromkeys(videos, ('.mp4',))
    places = {}
    for path, place in picture_places([*images, *videos], folder).items():
        suffixes = kept[path]
        known = place.suffix.lower() in suffixes
        places[path] = place if known else place.with_name(place.name + ('.mp4' if '.mp4' in suffixes else '.png'))
    seen: dict[Path, str] = {}
    for path, place in places.items():
        if place in seen:
            raise UserError(f'{seen[place]} and {path} would both be drawn as {place}; rename one, or do one at a time')
        seen[place] = path
    return places


def _check_out(args: argparse.Namespace, places: dict[str, Path]) -> None:
    """Raise, before anything heavy, where something that is not of this command would be lost."""
    out = Path(args.out)
    if not args.out.strip():
        raise UserError("--out '' names no folder")
    if out.exists() and not out.is_dir():
        raise UserError(f'--out {out}: is a file; name a folder')
    if not args.no_pictures:
        refuse_to_draw_over(places, out, '--out', 'an input')
    file = out / DETECTIONS
    if not args.no_json and file.exists() and not _is_ours(file):
        raise UserError(f'--out {out}: holds a {DETECTIONS} that this command did not write; name another folder')


def _is_ours(file: Path) -> bool:
    return file.is_file() and file.read_bytes()[:64].startswith(f'{{"made_by": "{_MADE_BY} '.encode())


def _claim(args: argparse.Namespace, places: dict[str, Path]) -> None:
    """Make the folder and its note, and take away what a killed run left half-written."""
    out = Path(args.out)
    require_writable(out / DETECTIONS, '--out')
    folders = {out}
    if not args.no_pictures:
        note_pictures(places, out)
        folders |= {place.parent for place in places.values()}
    for folder in folders:
        remove_unfinished(folder)


if __name__ == '__main__':
    main()
