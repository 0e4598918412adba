"""Pictures of what is in images: sheets of ground truth next to detections or alone, and single images."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from pycocotools import mask as rle_codec

from ..console import as_text
from ..errors import UserError
from ..files import replacing

Colour = tuple[int, int, int]
Colours = Sequence[tuple[str, Colour]]
FORMATS = ('.png', '.jpg', '.jpeg')

PANEL = 288  # pixels, the longer side of a panel
_MARK = 'mmdet_norms picture sheet'
_GAP = 8
_HEADER = 24
_PAIRS_PER_ROW = 3
_PICTURES_PER_ROW = 4
_PLAIN_SIZE = 800  # pixels of the longer side up to which lines and letters have the size that they have in panels
_BACKGROUND = (255, 255, 255)
_TEXT = (30, 30, 30)
_IGNORED = (150, 150, 150)
# for data sets without a palette: apart from each other in hue and lightness
_COLOURS = (
    (230, 57, 70), (29, 123, 210), (42, 157, 75), (244, 162, 40), (131, 56, 236),
    (0, 175, 185), (255, 92, 168), (140, 98, 57), (106, 124, 20), (60, 60, 160),
)  # fmt: skip


@dataclass
class Instance:
    """One object to draw.

    Args:
        box: x1, y1, x2, y2 in pixels of the image.
        name: the class name.
        colour: RGB.
        mask: boolean, of the image's size, or None.
        score: of a detection; None for ground truth.
        ignored: a crowd or otherwise ignored region.
    """

    box: Sequence[float]
    name: str
    colour: Colour
    mask: np.ndarray | None = None
    score: float | None = None
    ignored: bool = False


@dataclass
class Pair:
    """One image (RGB, uint8) with its ground truth and its detections."""

    image: np.ndarray
    truth: list[Instance] = field(default_factory=list)
    detections: list[Instance] = field(default_factory=list)


@dataclass
class _Panel:
    image: np.ndarray
    instances: Sequence[Instance]
    if_empty: str
    caption: str = ''


def draw_sheet(pairs: Sequence[Pair], title: str, score_thr: float, legend: Colours) -> Image.Image:
    """The sheet as a picture: a title, then rows of (ground truth | detections), then the colours."""
    rows = [
        [
            panel
            for pair in row
            for panel in (
                _Panel(pair.image, pair.truth, 'no objects'),
                _Panel(pair.image, pair.detections, 'no detections'),
            )
        ]
        for row in _in_rows(pairs, _PAIRS_PER_ROW)
    ]
    columns = max(map(len, rows), default=2)
    lefts = [2 * _GAP + column * (PANEL + _GAP) + column // 2 * _GAP for column in range(columns)]
    headers = ['ground truth', f'detections, score ≥ {score_thr:.2f}'] * (columns // 2)
    return _draw_panels(title, lefts, rows, legend, headers, row_gap=2 * _GAP)


def draw_gallery(
    pictures: Sequence[tuple[str, np.ndarray, Sequence[Instance]]],
    title: str,
    legend: Colours,
    if_empty: str = 'no objects',
) -> Image.Image:
    """A sheet of (caption, image, what is in it): a title, then rows of panels under their captions, then colours."""
    panels = [_Panel(image, instances, if_empty, caption) for caption, image, instances in pictures]
    rows = _in_rows(panels, _PICTURES_PER_ROW)
    columns = max(map(len, rows), default=1)
    return _draw_panels(title, [2 * _GAP + column * (PANEL + 2 * _GAP) for column in range(columns)], rows, legend)


def draw_columns(
    headers: Sequence[str],
    rows: Sequence[Sequence[tuple[np.ndarray, Sequence[Instance]]]],
    title: str,
    legend: Colours,
) -> Image.Image:
    """A sheet of the same images in several ways: a title, a row of panels for each image, then colours.

    Args:
        headers: what is above the columns.
        rows: of each image, for every column the image and what is in it.
    """
    lefts = [2 * _GAP + column * (PANEL + _GAP) for column in range(len(headers))]
    panels = [[_Panel(image, instances, 'nothing') for image, instances in row] for row in rows]
    return _draw_panels(title, lefts, panels, legend, headers)


def _in_rows(things: Sequence, number: int) -> list[Sequence]:
    return [things[i : i + number] for i in range(0, len(things), number)]


def _draw_panels(
    title: str,
    lefts: Sequence[int],
    rows: Sequence[Sequence[_Panel]],
    legend: Colours,
    headers: Sequence[str] = (),
    row_gap: int = _GAP,
) -> Image.Image:
    """A sheet: a title, then rows of panels under the headers of their columns or captions of their own, then colours.

    Args:
        lefts: where the columns begin.
    """
    title = _shortened(title, 16, max(len(lefts), 2) * PANEL, bold=True)
    width = max(lefts[-1] + PANEL + 2 * _GAP, round(_font(16, bold=True).getlength(title)) + 4 * _GAP)
    of_caption = 0 if headers else _HEADER
    heights = [of_caption + max(_panel_size(panel.image)[1] for panel in row) + row_gap for row in rows]
    of_headers = _HEADER if headers else 0
    legend_lines = _wrap_legend(legend, width - 4 * _GAP)
    height = _HEADER + 3 * _GAP + of_headers + sum(heights) + len(legend_lines) * _HEADER
    sheet = Image.new('RGB', (width, height), _BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    draw.text((2 * _GAP, _GAP), title, _TEXT, font=_font(16, bold=True))
    top = _HEADER + _GAP
    for left, header in zip(lefts, headers):
        draw.text((left, top), _shortened(header, 13, PANEL), _TEXT, font=_font(13))
    top += of_headers or _GAP
    for row, row_height in zip(rows, heights):
        for left, panel in zip(lefts, row):
            if panel.caption:
                draw.text((left, top), _shortened(panel.caption, 13, PANEL), _TEXT, font=_font(13))
            sheet.paste(draw_panel(panel.image, panel.instances, panel.if_empty), (left, top + of_caption))
        top += row_height
    _draw_legend(draw, legend_lines, top)
    return sheet


def objects_of(info: Mapping, colours: Colours, shape: Sequence[int]) -> list[Instance]:
    """The ground truth of an image, as mmdet's data sets have it, to be drawn.

    Args:
        info: what ``get_data_info`` of the data set says.
        colours: name and colour of each label.
        shape: height and width of the image.
    """
    return [
        Instance(
            box=item['bbox'],
            name=colours[item['bbox_label']][0],
            colour=colours[item['bbox_label']][1],
            mask=to_mask(item.get('mask'), *shape[:2]),
            ignored=bool(item.get('ignore_flag', 0)),
        )
        for item in info.get('instances', [])
    ]


def draw_panel(
    image: np.ndarray, instances: Sequence[Instance], if_empty: str, longest: int | None = PANEL
) -> Image.Image:
    """One image with masks, boxes and labels.

    Args:
        image: RGB, uint8.
        instances: what to draw.
        if_empty: a text for an image with nothing to draw; none if empty.
        longest: the longer side, to which the image is enlarged or reduced. None leaves it as it is, and draws thicker
            lines and larger letters on a large image.
    """
    width, height = _panel_size(image, longest)
    scale = width / image.shape[1]
    zoom = 1.0 if longest else max(1.0, max(width, height) / _PLAIN_SIZE)
    canvas = np.array(image, order='C')
    if (height, width) != image.shape[:2]:
        smooth = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
        canvas = cv2.resize(canvas, (width, height), interpolation=smooth)
    for instance in instances:
        if instance.mask is not None:
            _paint_mask(canvas, instance, round(zoom))
    panel = Image.fromarray(canvas)
    draw = ImageDraw.Draw(panel)
    # labels after all boxes, the surest last, so that nothing runs through a text
    ordered = sorted(instances, key=lambda instance: instance.score or 0)
    for instance in ordered:
        box = _scaled_box(instance, scale, width, height)
        draw.rectangle(box, outline=_colour(instance), width=round(2 * zoom))
    taken: list[tuple[float, float, float, float]] = []
    for instance in reversed(ordered):
        _draw_label(draw, instance, _scaled_box(instance, scale, width, height), (width, height), taken, zoom)
    if not instances and if_empty:
        _caption(draw, if_empty, height)
    return panel


def to_mask(segmentation: object, height: int, width: int) -> np.ndarray | None:
    """A boolean mask from polygons, run lengths (compressed or not) or a bitmap; None without any."""
    if segmentation is None or (isinstance(segmentation, (list, tuple)) and not segmentation):
        return None
    if isinstance(segmentation, np.ndarray):
        return segmentation.astype(bool)
    if isinstance(segmentation, (list, tuple)):
        segmentation = rle_codec.merge(rle_codec.frPyObjects(list(segmentation), height, width))
    elif isinstance(segmentation['counts'], (list, tuple)):
        segmentation = rle_codec.frPyObjects(dict(segmentation), height, width)
    return rle_codec.decode(segmentation).astype(bool)


def class_colours(classes: Sequence[object], palette: object = None) -> list[tuple[str, Colour]]:
    """Name and colour of each label. Names become one line.

    Args:
        palette: what a data set or a checkpoint calls so. It counts if it is a colour for each of these classes: mmdet
            also knows ``'random'``, and a choice of classes leaves the palette as long as it was.
    """
    is_theirs = isinstance(palette, (list, tuple)) and len(palette) == len(classes)
    is_theirs = is_theirs and all(isinstance(colour, (list, tuple)) and len(colour) == 3 for colour in palette)
    colours = palette if is_theirs and palette else _COLOURS
    return [(as_text(name), tuple(colours[i % len(colours)])) for i, name in enumerate(classes)]


def read_image(path: str) -> np.ndarray:
    """RGB, uint8.

    Raises:
        UserError: there is no such image, or it cannot be read.
    """
    image = cv2.imread(str(path), cv2.IMREAD_COLOR)
    if image is None:
        raise UserError(f'cannot read the image {path}')
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def _panel_size(image: np.ndarray, longest: int | None = PANEL) -> tuple[int, int]:
    scale = 1 if longest is None else longest / max(image.shape[:2])
    return max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale))


def _colour(instance: Instance) -> Colour:
    return _IGNORED if instance.ignored else instance.colour


def _paint_mask(canvas: np.ndarray, instance: Instance, line: int) -> None:
    """Tint the mask and outline it; an ignored region is hatched instead."""
    height, width = canvas.shape[:2]
    mask = cv2.resize(instance.mask.astype(np.float32), (width, height), interpolation=cv2.INTER_LINEAR)
    mask = mask >= 0.5
    tint = mask
    if instance.ignored:
        rows, columns = np.indices(mask.shape)
        tint = mask & ((rows + columns) % 8 < 3)
    colour = np.array(_colour(instance), np.float32)
    canvas[tint] = (0.55 * canvas[tint] + 0.45 * colour).astype(np.uint8)
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(canvas, contours, -1, _colour(instance), line, cv2.LINE_AA)


def _scaled_box(instance: Instance, scale: float, width: int, height: int) -> tuple[float, ...]:
    x1, y1, x2, y2 = (float(value) * scale for value in instance.box)
    x1, x2 = np.clip([x1, max(x1, x2)], 0, width - 1)
    y1, y2 = np.clip([y1, max(y1, y2)], 0, height - 1)
    return float(x1), float(y1), float(x2), float(y2)


def _draw_label(
    draw: ImageDraw.ImageDraw, instance: Instance, box: tuple, size: tuple, taken: list, zoom: float
) -> None:
    """The name (and score) above the box, or below or inside it where that is taken or outside."""
    text = f'{instance.name} (ignored)' if instance.ignored else instance.name
    if instance.score is not None:
        text = f'{text} {instance.score:.2f}'
    font = _font(round(11 * zoom))
    text_width, text_height = draw.textlength(text, font=font) + 4, round(14 * zoom)
    left = min(max(0, box[0]), max(0, size[0] - text_width))
    tops = [box[1] - text_height, box[3] + 1, box[1] + 2, box[3] - text_height - 1]
    spots = [(left, top, left + text_width, top + text_height) for top in tops]
    inside = [spot for spot in spots if spot[1] >= 0 and spot[3] <= size[1]] or [spots[2]]
    spot = next((spot for spot in inside if not any(_overlap(spot, other) for other in taken)), inside[0])
    taken.append(spot)
    colour = _colour(instance)
    draw.rectangle(spot, fill=colour)
    draw.text((spot[0] + 2, spot[1]), text, _readable_on(colour), font=font)


def _overlap(a: tuple, b: tuple) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _caption(draw: ImageDraw.ImageDraw, text: str, height: int) -> None:
    font = _font(12)
    top = height - 20
    draw.rectangle((0, top, draw.textlength(text, font=font) + 12, height), fill=(0, 0, 0))
    draw.text((6, top + 2), text, (255, 255, 255), font=font)


def _readable_on(colour: Colour) -> Colour:
    luminance = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]
    return (0, 0, 0) if luminance > 140 else (255, 255, 255)


def _shortened(text: str, size: int, width: int, bold: bool = False) -> str:
    """The end of a text that is too wide: of a path, what tells it from its neighbours."""
    font = _font(size, bold)
    if font.getlength(text) <= width:
        return text
    while text and font.getlength('…' + text) > width:
        text = text[1:]
    return '…' + text


def _wrap_legend(legend: Colours, width: int) -> list[list[tuple[float, str, Colour]]]:
    """Lines of (x, name, colour); none for more classes than one can tell apart."""
    if len(legend) > 20:
        return []
    lines, x = [[]], 0.0
    for name, colour in legend:
        needed = _font(13).getlength(name) + 40
        if x + needed > width and lines[-1]:
            lines.append([])
            x = 0.0
        lines[-1].append((x, name, colour))
        x += needed
    return lines


def _draw_legend(draw: ImageDraw.ImageDraw, lines: list[list[tuple]], top: float) -> None:
    for number, line in enumerate(lines):
        y = top + number * _HEADER
        for x, name, colour in line:
            x += 2 * _GAP
            draw.rectangle((x, y + 2, x + 13, y + 15), fill=colour)
            draw.text((x + 19, y), name, _TEXT, font=_font(13))


@functools.cache
def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib and so is there on every machine."""
    properties = font_manager.FontProperties(family='DejaVu Sans', weight='bold' if bold else 'normal')
    return ImageFont.truetype(font_manager.findfont(properties), size)


def save_sheet(sheet: Image.Image, path: Path) -> None:
    """Write the sheet as one of :data:`FORMATS`, creating its folder."""
    mark = PngImagePlugin.PngInfo()
    mark.add_text('Software', _MARK)
    with replacing(path) as part:
        sheet.save(part, **(dict(pnginfo=mark) if path.suffix.lower() == '.png' else dict(comment=_MARK)))


def is_sheet(path: Path) -> bool:
    """Is the file a sheet that :func:`save_sheet` wrote?"""
    try:
        with Image.open(path) as image:
            said = image.info.get('Software') or image.info.get('comment')
    except (OSError, ValueError, SyntaxError):  # what Pillow makes of files that are no images
        return False
    return said in (_MARK, _MARK.encode())
