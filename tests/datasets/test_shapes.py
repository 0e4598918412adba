"""The generated ``shapes`` dataset: annotations, determinism, folder handling."""

import contextlib
import dataclasses
import hashlib
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from mmdet_norms.cli.shapes import main
from mmdet_norms.datasets import shapes
from mmdet_norms.datasets.shapes import (
    CLASSES,
    METAINFO,
    ShapesConfig,
    ShapesError,
    annotate,
    make_shapes,
    render_scene,
)

# Small, with enough crowds and empty images to test them.
CONFIG = ShapesConfig(size=96, crowd_fraction=0.2, empty_fraction=0.1, occlusion=0.6)
TRAIN, VAL = 40, 12


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    return make_shapes(tmp_path_factory.mktemp('data') / 'shapes', TRAIN, VAL, seed=3, config=CONFIG)


@pytest.fixture(scope='module')
def content(root):
    return json.loads((root / 'annotations' / 'train.json').read_text())


def digest(folder):
    """Hash of every file's name and bytes."""
    total = hashlib.sha256()
    for path in sorted(folder.rglob('*')):
        if path.is_file():
            total.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return total.hexdigest()


def decode(segmentation, height, width):
    rle = coco_mask.frPyObjects(segmentation, height, width)
    if isinstance(rle, list):
        rle = coco_mask.merge(rle)
    return coco_mask.decode(rle).astype(bool)


def iou(a, b):
    return (a & b).sum() / (a | b).sum()


def flat_object(fine):
    size = fine.shape[0] // 4
    cover = cv2.resize(fine.astype(np.float32), (size, size), interpolation=cv2.INTER_AREA)
    return shapes.SceneObject(0, fine, cover > 0.5, False, 1.0)


def quiet():
    return contextlib.redirect_stdout(io.StringIO())


# ---------------------------------------------------------------------------- annotations
def test_annotation_files_have_the_fields_and_ids_of_coco(root):
    for split, count in (('train', TRAIN), ('val', VAL)):
        data = json.loads((root / 'annotations' / f'{split}.json').read_text())
        assert set(data) == {'info', 'licenses', 'images', 'annotations', 'categories'}
        assert [(c['id'], c['name']) for c in data['categories']] == list(enumerate(METAINFO['classes'], 1))
        assert len(METAINFO['palette']) == len(CLASSES)
        assert len(data['images']) == count
        image_ids = {image['id'] for image in data['images']}
        assert len(image_ids) == count
        ids = [a['id'] for a in data['annotations']]
        assert len(set(ids)) == len(ids) > count
        assert min(ids) >= 1  # COCOeval takes a match with id 0 for no match
        for a in data['annotations']:
            assert set(a) == {'id', 'image_id', 'category_id', 'segmentation', 'area', 'bbox', 'iscrowd'}
            assert a['image_id'] in image_ids and 1 <= a['category_id'] <= len(CLASSES)
        for image in data['images']:
            pixels = cv2.imread(str(root / split / image['file_name']))
            assert pixels.shape == (image['height'], image['width'], 3) == (96, 96, 3)


def test_area_and_box_are_those_of_the_decoded_segmentation(content):
    for a in content['annotations']:
        mask = decode(a['segmentation'], 96, 96)
        ys, xs = np.nonzero(mask)
        assert a['area'] == mask.sum() > 0
        assert a['bbox'] == [xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1]


def test_segmentations_match_the_visible_masks_of_the_scene(content):
    ious = {}
    per_image = {}
    for a in content['annotations']:
        per_image.setdefault(a['image_id'], []).append(a)
    for index in range(TRAIN):
        annotations = per_image.get(index + 1, [])
        scene = render_scene(CONFIG, 3, 'train', index)
        assert len(scene.objects) == len(annotations)
        for a, obj in zip(annotations, scene.objects):
            assert a['category_id'] == obj.label + 1
            kind = 'polygon' if isinstance(a['segmentation'], list) else 'rle'
            ious.setdefault(kind, []).append(iou(decode(a['segmentation'], 96, 96), obj.mask))
    assert min(ious['polygon']) > 0.9 and np.mean(ious['polygon']) > 0.95
    assert min(ious['rle']) == 1.0
    assert len(ious['polygon']) > len(ious['rle'])


def test_visible_masks_of_a_scene_do_not_overlap():
    for index in range(20):
        masks = [obj.mask for obj in render_scene(CONFIG, 0, 'train', index).objects]
        assert not masks or np.sum(masks, 0).max() == 1


def test_a_mask_lies_where_the_pixels_change():
    """Masks are checked against pixels: paint scenes without texture, clutter and light."""
    plain = ShapesConfig(
        occlusion=0, clutter=0, texture=0, lighting=0, noise=0, blur=0, crowd_fraction=0, empty_fraction=0
    )
    for index in range(10):
        scene = render_scene(plain, 0, 'train', index)
        image = scene.image.astype(int)
        background = np.median(image.reshape(-1, 3), 0)  # objects cover less than half
        union = np.any([obj.mask for obj in scene.objects], 0)
        if union.mean() > 0.45:
            continue
        changed = np.abs(image - background).max(-1) > 3
        edge = cv2.dilate(union.astype(np.uint8), np.ones((3, 3))) - cv2.erode(union.astype(np.uint8), np.ones((3, 3)))
        wrong = (changed != union) & (edge == 0)
        assert wrong.sum() <= 4 * len(scene.objects)  # needle tips, less than half covered
        assert union.sum() > 100


def test_a_ring_is_run_lengths_with_its_hole_open():
    ring = CLASSES.index('ring')
    seen = 0
    for index in range(40):
        scene = render_scene(dataclasses.replace(CONFIG, occlusion=0), 1, 'train', index)
        for obj in scene.objects:
            if obj.label == ring and not obj.is_crowd and obj.visible > 0.99:
                a = annotate(obj)
                assert isinstance(a['segmentation']['counts'], list)
                x, y, w, h = a['bbox']
                assert not decode(a['segmentation'], 96, 96)[y + h // 2, x + w // 2]
                seen += 1
    assert seen >= 3


def test_an_object_cut_in_two_has_two_polygons():
    fine = np.zeros((384, 384), bool)
    fine[40:120, 40:200] = fine[160:240, 40:200] = True
    obj = flat_object(fine)
    a = annotate(obj)
    assert len(a['segmentation']) == 2
    assert iou(decode(a['segmentation'], 96, 96), obj.mask) > 0.95


def test_run_lengths_replace_polygons_that_would_lose_a_small_hole_or_specks():
    holed = np.zeros((384, 384), bool)
    holed[40:200, 40:200] = True
    holed[100:120, 100:120] = False
    specks = np.zeros((96, 96), bool)
    specks[10:16, 10:16] = specks[30:60:2, 30:60:2] = True
    specks = specks.repeat(4, 0).repeat(4, 1)
    for fine in (holed, specks):
        obj = flat_object(fine)
        a = annotate(obj)
        assert isinstance(a['segmentation'], dict)
        assert np.array_equal(decode(a['segmentation'], 96, 96), obj.mask)


def test_run_lengths_agree_with_pycocotools_also_at_the_image_corners():
    rng = np.random.default_rng(0)
    for mask in (np.ones((5, 7), bool), np.zeros((5, 7), bool), rng.random((5, 7)) < 0.5, np.eye(6, dtype=bool)):
        rle = shapes._rle(mask)
        assert np.array_equal(decode(rle, *mask.shape), mask)
        assert sum(rle['counts']) == mask.size and 0 not in rle['counts'][1:]


def test_crowds_are_single_uncompressed_run_lengths_of_many_parts(content):
    crowds = [a for a in content['annotations'] if a['iscrowd']]
    assert 0.1 * TRAIN <= len(crowds) <= 0.3 * TRAIN
    assert len({a['image_id'] for a in crowds}) == len(crowds)
    for a in crowds:
        assert isinstance(a['segmentation']['counts'], list)
        assert sum(a['segmentation']['counts']) == 96 * 96
        parts, _ = cv2.connectedComponents(decode(a['segmentation'], 96, 96).astype(np.uint8))
        assert parts > 4


@pytest.mark.parametrize('field', ['empty_fraction', 'crowd_fraction'])
def test_rare_kinds_of_image_have_their_share_in_small_splits_too(field):
    config = ShapesConfig()
    kinds = [shapes._kind(config, i) for i in range(200)]
    assert 3 <= kinds.count(field.split('_')[0]) <= 7
    always = dataclasses.replace(config, **{'empty_fraction': 0, 'crowd_fraction': 0, field: 1})
    assert {shapes._kind(always, i) for i in range(50)} == {field.split('_')[0]}


def test_empty_images_have_no_annotation(content):
    without = TRAIN - len({a['image_id'] for a in content['annotations']})
    assert 2 <= without <= 6  # 10 %


def test_objects_occlude_each_other_but_stay_visible_enough():
    config = dataclasses.replace(CONFIG, occlusion=1.0, min_visible=0.6)
    scenes = [render_scene(config, 0, 'train', i) for i in range(40)]
    visible = [o.visible for s in scenes for o in s.objects if not o.is_crowd]
    assert min(visible) >= 0.6
    assert np.mean(np.array(visible) < 0.95) > 0.2
    clear = [
        o.visible
        for i in range(40)
        for o in render_scene(dataclasses.replace(config, occlusion=0), 0, 'train', i).objects
    ]
    assert np.mean(np.array(clear) < 0.95) < np.mean(np.array(visible) < 0.95) / 2


def test_small_and_medium_objects_of_coco_are_both_common_by_default():
    areas = np.array(
        [
            annotate(o)['area']
            for i in range(60)
            for o in render_scene(ShapesConfig(), 0, 'val', i).objects
            if not o.is_crowd
        ]
    )
    small = (areas < 32**2).mean()
    assert 0.3 < small < 0.9


# ------------------------------------------------------------------------ no other clues
def test_classes_differ_neither_in_colour_nor_in_contrast_nor_in_position():
    """Per-class means differ by no more than chance (largest of many z scores)."""
    config = ShapesConfig(size=64, crowd_fraction=0, empty_fraction=0)
    rows, labels = [], []
    for index in range(250):
        scene = render_scene(config, 0, 'train', index)
        for obj in scene.objects:
            ys, xs = np.nonzero(obj.mask)
            pixels = scene.image[obj.mask]
            others = scene.image[~obj.mask].mean(0)
            rows.append(
                [*pixels.mean(0), np.linalg.norm(pixels.mean(0) - others), xs.mean(), ys.mean(), len(scene.objects)]
            )
            labels.append(obj.label)
    rows, labels = np.array(rows, float), np.array(labels)
    rows = (rows - rows.mean(0)) / rows.std(0)
    z = [np.abs(rows[labels == c].mean(0)) * np.sqrt((labels == c).sum()) for c in range(len(CLASSES))]
    assert min((labels == c).sum() for c in range(len(CLASSES))) > 50
    assert np.max(z) < 4  # 42 comparisons; 4 sigma by chance: about 0.3 %


def test_the_circles_around_outlines_are_as_large_for_every_class():
    rng = np.random.default_rng(0)
    for label in range(len(CLASSES)):
        reach = [np.linalg.norm(shapes._shape(label, 10, rng)[0], axis=1).max() for _ in range(200)]
        assert max(reach) <= 10 + 1e-9 and np.mean(reach) > 8.4


# -------------------------------------------------------------------------- readers
@pytest.mark.parametrize('kind', ['bbox', 'segm'])
@pytest.mark.parametrize('with_crowds', [False, True])
def test_ground_truth_as_detections_has_average_precision_one(root, kind, with_crowds):
    with quiet():
        truth = COCO(str(root / 'annotations' / 'train.json'))
        detections = []
        for a in truth.loadAnns(truth.getAnnIds()):
            if with_crowds or not a['iscrowd']:
                detections.append(
                    dict(
                        image_id=a['image_id'],
                        category_id=a['category_id'],
                        score=0.9,
                        **{'bbox': dict(bbox=a['bbox']), 'segm': dict(segmentation=truth.annToRLE(a))}[kind],
                    )
                )
        evaluation = COCOeval(truth, truth.loadRes(detections), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    assert evaluation.stats[0] == pytest.approx(1.0)
    assert evaluation.stats[8] == pytest.approx(1.0)


@pytest.mark.parametrize('split,count', [('train', TRAIN), ('val', VAL)])
def test_the_coco_dataset_of_mmdet_loads_every_image_and_annotation(root, split, count):
    from mmdet.registry import DATASETS
    from mmdet.utils import register_all_modules

    import mmdet_norms  # noqa: F401  (makes mmdet importable with mmcv-lite)

    register_all_modules(init_default_scope=True)
    with quiet():
        dataset = DATASETS.build(
            dict(
                type='CocoDataset',
                data_root=str(root),
                ann_file=f'annotations/{split}.json',
                data_prefix=dict(img=f'{split}/'),
                metainfo=METAINFO,
                pipeline=[dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True, with_mask=True)],
            )
        )
        truth = COCO(str(root / 'annotations' / f'{split}.json'))
    assert len(dataset) == count and dataset.metainfo['classes'] == CLASSES
    total = 0
    for item in (dataset[i] for i in range(count)):
        annotations = truth.loadAnns(truth.getAnnIds(item['img_id']))
        assert item['gt_masks'].masks.shape == (len(annotations), 96, 96)
        assert item['gt_ignore_flags'].tolist() == [bool(a['iscrowd']) for a in annotations]
        assert item['gt_bboxes_labels'].tolist() == [a['category_id'] - 1 for a in annotations]
        assert item['gt_masks'].masks.sum((1, 2)).tolist() == [a['area'] for a in annotations]
        total += len(annotations)
    assert total == len(truth.anns)


# ---------------------------------------------------------------------- determinism
def test_the_same_arguments_give_the_same_bytes(root, tmp_path):
    again = make_shapes(tmp_path / 'other', TRAIN, VAL, seed=3, config=CONFIG)
    assert digest(again) == digest(root)


def test_another_seed_or_split_gives_other_images():
    images = [render_scene(CONFIG, seed, split, 0).image.tobytes() for seed in (0, 1) for split in ('train', 'val')]
    assert len(set(images)) == 4


def test_an_image_does_not_depend_on_the_number_of_images(root, tmp_path):
    few = make_shapes(tmp_path / 'few', 5, 2, seed=3, config=CONFIG)
    for path in few.rglob('*.png'):
        assert path.read_bytes() == (root / path.relative_to(few)).read_bytes()


def test_files_carry_no_path_and_no_date(root, content):
    assert content['info']['date_created'] == ''
    assert str(root.parent) not in (root / 'meta.json').read_text()


# -------------------------------------------------------------------- the target folder
def tiny(root, **kwargs):
    return make_shapes(root, 2, 1, size=64, **kwargs)


def test_a_finished_dataset_is_left_alone(tmp_path, monkeypatch):
    root = tiny(tmp_path / 'shapes')
    before = digest(root)
    monkeypatch.setattr(shapes, 'render_scene', lambda *_: pytest.fail('drawn again'))
    assert tiny(root) == root
    assert tiny(root, overwrite=True) == root
    assert digest(root) == before


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / 'shapes').mkdir()
    assert (tiny(tmp_path / 'shapes') / 'annotations' / 'val.json').is_file()


@pytest.mark.parametrize(
    'change', [dict(seed=1), dict(config=ShapesConfig(noise=0)), 'version', 'lost image', 'edited json']
)
def test_a_dataset_that_differs_is_replaced_only_with_overwrite(tmp_path, monkeypatch, change):
    root = tiny(tmp_path / 'shapes')
    kwargs = change if isinstance(change, dict) else {}
    if change == 'version':
        monkeypatch.setattr(shapes, 'VERSION', shapes.VERSION + 1)
    elif change == 'lost image':
        (root / 'train' / '000001.png').unlink()
    elif change == 'edited json':
        (root / 'annotations' / 'val.json').write_text('{}')
    before = digest(root)
    with pytest.raises(ShapesError, match='--overwrite'):
        tiny(root, **kwargs)
    assert digest(root) == before
    tiny(root, overwrite=True, **kwargs)
    fresh = tiny(tmp_path / 'fresh', **kwargs)
    assert digest(root) == digest(fresh)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['fresh', 'shapes']


@pytest.mark.parametrize('overwrite', [False, True])
@pytest.mark.parametrize('meta', [None, '{"generator": "something else"}', '[', '[]'])
def test_a_foreign_folder_is_never_touched(tmp_path, overwrite, meta):
    folder = tmp_path / 'photos'
    folder.mkdir()
    (folder / 'holiday.jpg').write_bytes(b'precious')
    if meta:
        (folder / 'meta.json').write_text(meta)
    with pytest.raises(ShapesError, match='not a shapes dataset'):
        tiny(folder, overwrite=overwrite)
    assert (folder / 'holiday.jpg').read_bytes() == b'precious'
    assert [p.name for p in tmp_path.iterdir()] == ['photos']


@pytest.mark.parametrize(
    'name', ['train/mine.png', 'annotations/mine.json', 'val/000099.png', 'val/a/b.txt', '.hidden']
)
def test_files_put_anywhere_into_a_dataset_are_not_deleted_by_overwrite(tmp_path, name):
    root = tiny(tmp_path / 'shapes')
    (root / name).parent.mkdir(exist_ok=True)
    (root / name).write_text('mine')
    with pytest.raises(ShapesError, match=re.escape(name)):
        tiny(root, seed=1, overwrite=True)
    assert (root / name).read_text() == 'mine'


def test_files_put_into_a_dataset_are_not_deleted_by_overwrite(tmp_path):
    root = tiny(tmp_path / 'shapes')
    (root / 'best.pth').write_bytes(b'weights')
    assert tiny(root) == root
    with pytest.raises(ShapesError, match=r'best\.pth'):
        tiny(root, seed=1, overwrite=True)
    assert (root / 'best.pth').exists()


def test_a_file_in_the_place_of_the_folder_is_an_error(tmp_path):
    (tmp_path / 'shapes').write_text('x')
    with pytest.raises(ShapesError, match='not a shapes dataset'):
        tiny(tmp_path / 'shapes', overwrite=True)


@pytest.mark.parametrize('existing', [False, True])
def test_an_interrupted_run_leaves_nothing_behind(tmp_path, monkeypatch, existing):
    root = tmp_path / 'shapes'
    if existing:
        tiny(root)
        before = digest(root)
    original = shapes.render_scene

    def interrupt(cfg, seed, split, index):
        if split == 'val':
            raise KeyboardInterrupt
        return original(cfg, seed, split, index)

    monkeypatch.setattr(shapes, 'render_scene', interrupt)
    with pytest.raises(KeyboardInterrupt):
        tiny(root, seed=1, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == (['shapes'] if existing else [])
    if existing:
        assert digest(root) == before


def test_the_old_dataset_survives_if_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    root = tiny(tmp_path / 'shapes')
    before = digest(root)
    original = Path.rename

    def rename(self, target):
        if '.new-' in self.name:
            raise OSError('no')
        return original(self, target)

    monkeypatch.setattr(Path, 'rename', rename)
    with pytest.raises(OSError, match='no'):
        tiny(root, seed=1, overwrite=True)
    assert digest(root) == before
    assert [p.name for p in tmp_path.iterdir()] == ['shapes']


def test_a_link_to_a_folder_stays_a_link(tmp_path):
    (tmp_path / 'disk').mkdir()
    (tmp_path / 'shapes').symlink_to(tmp_path / 'disk', target_is_directory=True)
    tiny(tmp_path / 'shapes')
    assert (tmp_path / 'shapes').is_symlink()
    assert (tmp_path / 'disk' / 'meta.json').is_file()


# --------------------------------------------------------------------- arguments and CLI
@pytest.mark.parametrize(
    'kwargs,message',
    [
        (dict(size=16), 'size'),
        (dict(min_object=0.7), 'min_object'),
        (dict(size=64, min_object=0.1), '10 px'),
        (dict(max_objects=0), 'max_objects'),
        (dict(min_visible=0), 'min_visible'),
        (dict(noise=-0.1), 'noise'),
        (dict(clutter=-1), 'clutter'),
        (dict(blur=9), 'blur'),
        (dict(min_contrast=1), 'contrast'),
        (dict(crowd_fraction=0.6, empty_fraction=0.6), 'crowd_fraction'),
    ],
)
def test_values_out_of_range_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        ShapesConfig(**kwargs)


@pytest.mark.parametrize('kwargs', [dict(num_train=0), dict(num_val=0), dict(seed=-1)])
def test_counts_and_seed_out_of_range_are_named(tmp_path, kwargs):
    with pytest.raises(ValueError, match=next(iter(kwargs))):
        make_shapes(tmp_path / 'shapes', **kwargs)
    assert not list(tmp_path.iterdir())


def test_the_command_says_what_it_wrote_and_fails_with_one_line(tmp_path, capsys):
    command = ['--out', str(tmp_path / 'shapes'), '--train', '3', '--val', '2', '--size', '64']
    assert main(command) == 0
    out, err = capsys.readouterr()
    assert str(tmp_path / 'shapes') in out and '3 images' in out and '2 images' in out
    assert main([*command, '--seed', '1']) == 2
    out, err = capsys.readouterr()
    assert out == '' and err.count('\n') == 1 and '--overwrite' in err
    assert main([*command, '--seed', '1', '--overwrite']) == 0
    capsys.readouterr()
    assert main([*command, '--size', '7']) == 2
    assert 'size must be' in capsys.readouterr().err


def test_the_script_runs_from_a_checkout(tmp_path):
    script = Path(__file__).resolve().parents[2] / 'tools' / 'make_shapes.py'
    done = subprocess.run(
        [sys.executable, str(script), '--out', 'shapes', '--train', '2', '--val', '1', '--size', '64'],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / 'shapes' / 'meta.json').is_file()
