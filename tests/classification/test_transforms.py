"""Random crops against their distribution, colours against Pillow's, resizing and cropping through mmcv."""

import math
import random

import cv2
import mmcv
import numpy as np
import pytest
from mmdet.registry import TRANSFORMS as MMDETS
from mmengine.dataset import Compose
from mmengine.registry import TRANSFORMS
from PIL import Image, ImageEnhance

from mmdet_norms.classification import ColorJitter, Lighting, PackClsInputs, RandomResizedCrop
from mmdet_norms.errors import UserError


def picture(height=40, width=56, seed=0):
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


def drawn(crop, height, width, times):
    np.random.seed(0)
    return np.array([crop._part(height, width) for _ in range(times)], float).T  # top, left, height, width


@pytest.mark.parametrize('height, width', [(1000, 1000), (600, 1000)])
def test_parts_are_distributed_as_published(height, width):
    """Areas and logarithms of ratios are uniform, given that the part fits; places are uniform in the rest."""
    low, high, small = math.log(3 / 4), math.log(4 / 3), 0.08
    areas = np.linspace(small, 1, 1001)[:, None]
    ratios = np.exp(np.linspace(low, high, 1001))[None]
    w, h = np.sqrt(areas * ratios * height * width), np.sqrt(areas / ratios * height * width)
    fits = (w <= width) & (h <= height)
    top, left, tall, wide = drawn(RandomResizedCrop(224), height, width, 6000)
    ratio = wide / tall
    for got, expected in (
        (tall * wide / (height * width), (areas * fits).sum() / fits.sum()),
        (np.log(ratio), (np.log(ratios) * fits).sum() / fits.sum()),
        (np.log(ratio) ** 2, (np.log(ratios) ** 2 * fits).sum() / fits.sum()),
        (top[tall < height] / (height - tall[tall < height]), 0.5),
        (left[wide < width] / (width - wide[wide < width]), 0.5),
    ):
        assert abs(got.mean() - expected) < 4.5 * got.std() / math.sqrt(len(got)) + 1e-3
    assert ratio.min() >= 0.745 and ratio.max() <= 1.34 and (tall * wide).min() >= 0.0795 * height * width
    assert ((top >= 0) & (left >= 0) & (top + tall <= height) & (left + wide <= width)).all()


def test_square_parts():
    _, _, tall, wide = drawn(RandomResizedCrop(224, aspect_ratio_range=(1, 1)), 500, 500, 4000)
    assert (tall == wide).all()
    side = tall / 500
    assert abs(side.mean() - (1 - 0.08**1.5) / (1 - 0.08) * 2 / 3) < 0.015  # of the square root of a uniform area


@pytest.mark.parametrize(
    'height, width, part',
    [(10, 100, (0, 43, 10, 13)), (100, 10, (43, 0, 13, 10)), (1, 1, (0, 0, 1, 1)), (1, 9, (0, 4, 1, 1))],
)
def test_where_nothing_fits_the_largest_part_in_the_middle(height, width, part):
    crop = RandomResizedCrop(32, crop_ratio_range=(1, 1))
    assert crop._part(height, width) == part
    image = RandomResizedCrop(32)(dict(img=picture(height, width)))['img']
    assert image.shape == (32, 32, 3)


@pytest.mark.parametrize('ratios', [(3, 4), (1 / 4, 1 / 3)])
def test_a_part_has_pixels(ratios):
    assert RandomResizedCrop(32, aspect_ratio_range=ratios)._part(1, 1) == (0, 0, 1, 1)


@pytest.mark.parametrize('backend, resample', [('cv2', None), ('pillow', Image.BILINEAR)])
def test_a_part_is_resized(backend, resample):
    image, crop = picture(), RandomResizedCrop((12, 9), backend=backend)
    np.random.seed(3)
    top, left, height, width = crop._part(40, 56)
    np.random.seed(3)
    results = crop(dict(img=image))
    part = image[top : top + height, left : left + width]
    if resample is None:
        expected = cv2.resize(part, (12, 9), interpolation=cv2.INTER_LINEAR)
    else:
        expected = np.asarray(Image.fromarray(part).resize((12, 9), resample))
    assert np.array_equal(results['img'], expected) and results['img_shape'] == (9, 12)


@pytest.mark.parametrize('what', ['brightness', 'contrast', 'saturation'])
@pytest.mark.parametrize('factor', [0.0, 0.4, 1.3, 2.0])
def test_colours_are_pillows(what, factor):
    image = picture()
    enhance = dict(brightness=ImageEnhance.Brightness, contrast=ImageEnhance.Contrast, saturation=ImageEnhance.Color)
    expected = np.asarray(enhance[what](Image.fromarray(image[..., ::-1])).enhance(factor))[..., ::-1]
    got = ColorJitter(**{what: (factor, factor)})(dict(img=image.copy()))['img']
    assert got.dtype == np.uint8
    assert np.abs(got.astype(int) - expected).max() <= (2 if what == 'contrast' else 1)  # the mean grey is rounded


def test_factors_are_uniform_and_the_order_random(monkeypatch):
    calls = []
    for name in ('adjust_brightness', 'adjust_contrast', 'adjust_color'):
        monkeypatch.setattr(mmcv, name, lambda image, f, backend, name=name: calls.append((name, f)) or image)
    jitter = ColorJitter(brightness=0.4, contrast=1.5, saturation=(0.5, 0.7))
    for _ in range(2000):
        jitter(dict(img=None))
    factors = {name: np.array([f for n, f in calls if n == name]) for name, _ in calls}
    ranges = dict(adjust_brightness=(0.6, 1.4), adjust_contrast=(0, 2.5), adjust_color=(0.5, 0.7))
    for name, (low, high) in ranges.items():
        assert len(factors[name]) == 2000
        spread = high - low
        assert low <= factors[name].min() < low + 0.01 * spread and high - 0.01 * spread < factors[name].max() <= high
        assert abs(factors[name].mean() - (low + high) / 2) < 0.03 * spread
    orders = [tuple(name for name, _ in calls[i : i + 3]) for i in range(0, len(calls), 3)]
    assert min(orders.count(order) for order in set(orders)) > 250 and len(set(orders)) == 6
    calls.clear()
    ColorJitter()(dict(img=None))
    assert calls == []


def test_lighting_is_mmcvs_in_the_order_of_the_channels():
    image = picture()
    np.random.seed(5)
    got = Lighting(0.1)(dict(img=image))['img']
    deviations = np.array([55.4625, 4.7940, 1.1475])
    directions = np.array([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])
    np.random.seed(5)
    expected = mmcv.adjust_lighting(image, deviations, directions, 0.1)[..., ::-1]  # it gives R, G, B
    assert got.dtype == np.float32 and np.abs(got - expected).max() < 1e-4
    assert np.array_equal(Lighting(0)(dict(img=image))['img'], image)


@pytest.mark.parametrize('scope', ['mmdet', 'mmengine'])
@pytest.mark.parametrize('height, width', [(40, 56), (56, 40), (20, 90)])
def test_short_side_and_centre_are_mmcvs(scope, height, width):
    registry = MMDETS if scope == 'mmdet' else TRANSFORMS
    resize = registry.build(dict(type='Resize', scale=(10**6, 32), keep_ratio=True))
    crop = registry.build(dict(type='CenterCrop', crop_size=28))
    results = resize(dict(img=picture(height, width)))
    assert min(results['img'].shape[:2]) == 32
    assert abs(max(results['img'].shape[:2]) - 32 * max(height, width) / min(height, width)) <= 0.5
    whole = results['img']
    results = crop(results)
    top, left = (whole.shape[0] - 28) // 2, (whole.shape[1] - 28) // 2
    assert np.array_equal(results['img'], whole[top : top + 28, left : left + 28])


def test_the_centre_of_a_smaller_image_is_padded():
    results = TRANSFORMS.build(dict(type='CenterCrop', crop_size=48, auto_pad=True))(dict(img=picture(40, 56)))
    assert results['img'].shape == (48, 48, 3)


def test_draws_are_numpys_alone():
    """Whose generator engine/rng.py seeds for every image."""
    pipeline = Compose([RandomResizedCrop(16), ColorJitter(0.4, 0.4, 0.4), Lighting(), PackClsInputs()])
    images = []
    for seed in (7, 7, 8):
        np.random.seed(seed)
        random.seed(len(images))
        images.append(pipeline(dict(img=picture(), gt_label=3))['inputs'])
    assert images[0].equal(images[1]) and not images[0].equal(images[2])


@pytest.mark.parametrize(
    'kind, options, says',
    [
        (RandomResizedCrop, dict(scale=0), 'scale=0 must be a side in px'),
        (RandomResizedCrop, dict(scale=(3, 4, 5)), r'scale=\(3, 4, 5\) must be a side in px'),
        (RandomResizedCrop, dict(scale=8, crop_ratio_range=(0.5, 1.5)), r'crop_ratio_range=\(0.5, 1.5\) must be'),
        (RandomResizedCrop, dict(scale=8, aspect_ratio_range=(2, 1)), r'aspect_ratio_range=\(2, 1\) must be'),
        (RandomResizedCrop, dict(scale=8, interpolation='cubic'), "interpolation='cubic', .* has 'bilinear'"),
        (RandomResizedCrop, dict(scale=8, backend='PIL'), ".*backend='PIL': .* 'cv2' and 'pillow'"),
        (ColorJitter, dict(contrast=-1), 'contrast=-1 must be at least 0'),
        (ColorJitter, dict(saturation=(2, 1)), r'saturation=\(2, 1\) must be'),
        (Lighting, dict(alphastd=-0.1), 'alphastd=-0.1 must be'),
    ],
)
def test_a_wrong_argument_is_named(kind, options, says):
    with pytest.raises(UserError, match=f'{kind.__name__}: {says}'):
        kind(**options)


@pytest.mark.parametrize('shape', [(4, 5), (4, 5, 1), (4, 5, 4)])
def test_an_image_of_other_channels_is_named(shape):
    with pytest.raises(UserError, match=r"image x.png is of shape .* color_type='color'"):
        PackClsInputs()(dict(img=np.zeros(shape), img_path='x.png'))
