"""Images and objects of a data set, of a detector's and of a classifier's."""

from mmdet_norms.datasets.counts import count


def info(path, *labels, ignored=()):
    instances = [dict(bbox_label=label, ignore_flag=0) for label in labels]
    return dict(img_path=path, instances=instances + [dict(bbox_label=label, ignore_flag=1) for label in ignored])


def test_objects_empty_images_crowds_and_repeated_files():
    counts = count([info('a', 1, 1, 0), info('b', ignored=[1]), info('a', 1), info('c')], ['disc', 'box\n', 'star'])
    assert (counts.images, counts.different, counts.empty, counts.ignored) == (4, 3, 2, 1)
    assert counts.objects == {'disc': 1, 'box\\n': 3, 'star': 0}
    assert counts.line('train') == (
        'train: 4 images (3 different ones), 2 without objects; 4 objects: box\\n 3, disc 1; 1 ignored (crowds); '
        'none of star'
    )


def test_labels_without_a_name_and_many_classes():
    assert count([info('a', 5)], ['disc']).objects == {'disc': 0, 'class 5': 1}
    line = count([info('a', *range(30))], [f'c{i}' for i in range(30)]).line('val')
    assert 'c19 1, 10 more classes' in line and 'c20' not in line


def test_the_images_of_a_classifier():
    counts = count([dict(img_path=str(i), gt_label=i % 2) for i in range(5)], ['cat', 'dog'])
    assert counts.empty is None and counts.objects == {'cat': 3, 'dog': 2}
    assert counts.line('val') == 'val: 5 images: cat 3, dog 2'
