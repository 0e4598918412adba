"""The classifier's parts against literal formulas: mixed labels, smoothing, losses, predictions."""

import numpy as np
import pytest
import torch
from mmengine.registry import MODELS
from mmengine.structures import BaseDataElement

import mmdet_norms.classification.classifier as module
from mmdet_norms.classification import ClsDataPreprocessor, LinearClsHead
from mmdet_norms.errors import UserError
from mmdet_norms.layers._args import ConfigError


def batch(labels=(0, 2, 1, 2), size=(5, 6), dtype=torch.uint8):
    torch.manual_seed(0)
    images = [torch.randint(0, 256, (3, *size)).to(dtype) for _ in labels]
    samples = [BaseDataElement(metainfo=dict(img_path=f'{i}.png')) for i in range(len(labels))]
    for sample, label in zip(samples, labels):
        sample.gt_label = torch.tensor(label)
    return dict(inputs=images, data_samples=samples)


def classifier(num_classes=3, **options):
    torch.manual_seed(0)
    backbone = dict(
        type='mmdet.ResNet', depth=18, base_channels=8, num_stages=2, strides=(1, 2), dilations=(1, 1), out_indices=(1,)
    )
    head = dict(type='LinearClsHead', num_classes=num_classes, in_channels=16)
    cfg = dict(type='ImageClassifier', backbone=backbone, head=head)
    cfg.update(options)
    return MODELS.build(cfg)


def test_images_are_stacked_and_normalized_and_labels_kept():
    mean, std = [1.0, 2.0, 3.0], [4.0, 5.0, 6.0]
    data = batch()
    out = ClsDataPreprocessor(mean=mean, std=std, bgr_to_rgb=True)(data, training=True)
    expected = torch.stack(data['inputs']).flip(1).float()
    expected = (expected - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    assert torch.equal(out['inputs'], expected)
    assert [int(sample.gt_label) for sample in out['data_samples']] == [0, 2, 1, 2]
    assert out['data_samples'][1].img_path == '1.png' and 'gt_score' not in out['data_samples'][0]


@pytest.mark.parametrize('collated', [False, True], ids=['list', 'tensor'])
@pytest.mark.parametrize('dtype', [torch.uint8, torch.float32, torch.float64])
def test_mixed_images_and_labels_are_the_formula(collated, dtype):
    data = batch(dtype=dtype)
    images = torch.stack(data['inputs']).float()
    if collated:
        data['inputs'] = torch.stack(data['inputs'])
    preprocessor = ClsDataPreprocessor(num_classes=3, mixup=0.2)
    np.random.seed(1)
    torch.manual_seed(1)
    weight, order = np.random.beta(0.2, 0.2), torch.randperm(4)
    assert order.tolist() != [0, 1, 2, 3] and 0.01 < weight < 0.99
    np.random.seed(1)
    torch.manual_seed(1)
    out = preprocessor(data, training=True)
    assert out['inputs'].dtype == torch.float32
    assert torch.allclose(out['inputs'], weight * images + (1 - weight) * images[order], atol=1e-3)
    labels = torch.eye(3)[[0, 2, 1, 2]]
    scores = torch.stack([sample.gt_score for sample in out['data_samples']])
    assert torch.allclose(scores, weight * labels + (1 - weight) * labels[order], atol=1e-6)
    assert torch.allclose(scores.sum(1), torch.ones(4))
    # the batch itself is as before, so that it can be used again
    assert 'gt_score' not in data['data_samples'][0]
    assert torch.equal(preprocessor(data, training=False)['inputs'], images)


def test_weights_follow_beta():
    preprocessor, data = ClsDataPreprocessor(num_classes=3, mixup=0.5), batch(labels=(0, 1), size=(1, 1))
    data['inputs'] = [torch.zeros(3, 1, 1), torch.ones(3, 1, 1)]
    np.random.seed(0)
    torch.manual_seed(0)
    weights = []
    while len(weights) < 1500:
        first = float(preprocessor(data, training=True)['inputs'][0, 0, 0, 0])
        weights += [first] if first else []  # where it is not mixed with itself
    weights = np.array(weights)  # of the other image: the arcsine distribution
    assert abs(weights.mean() - 0.5) < 0.04 and abs((weights < 0.25).mean() - 1 / 3) < 0.05


def test_one_image_is_mixed_with_itself():
    data = batch(labels=(2,))
    out = ClsDataPreprocessor(num_classes=3, mixup=1.0)(data, training=True)
    assert torch.allclose(out['inputs'][0], data['inputs'][0].float())
    assert torch.allclose(out['data_samples'][0].gt_score, torch.tensor([0.0, 0, 1]))


def test_channels_last_is_kept():
    data = batch()
    data['inputs'] = torch.stack(data['inputs']).contiguous(memory_format=torch.channels_last)
    for mixup in (0.0, 0.3):
        out = ClsDataPreprocessor(num_classes=3, mixup=mixup)(data, training=True)['inputs']
        assert out.is_contiguous(memory_format=torch.channels_last)


def test_nothing_but_whole_batches_goes_to_the_device():
    """On the meta device every look at a value is an error, as a wait for it would be on a GPU."""
    model = classifier(data_preprocessor=dict(type='ClsDataPreprocessor', mixup=0.3, mean=[1, 2, 3], std=[4, 5, 6]))
    model.to('meta')
    data = model.data_preprocessor(batch(), training=True)
    assert {data['inputs'].device.type, *(s.gt_label.device.type for s in data['data_samples'])} == {'meta'}
    loss = model(**data, mode='loss')['loss']
    assert loss.device.type == 'meta' and loss.shape == ()
    moved = batch()
    moved['data_samples'] = [sample.to('meta') for sample in moved['data_samples']]
    assert len(model.data_preprocessor(moved, training=True)['data_samples']) == 4


@pytest.mark.parametrize('smoothing', [0.0, 0.1])
@pytest.mark.parametrize('mixed', [False, True])
def test_the_loss_is_the_formula(smoothing, mixed):
    head = LinearClsHead(3, 4, label_smoothing=smoothing)
    data = ClsDataPreprocessor(num_classes=3, mixup=0.4 if mixed else 0.0)(batch(), training=True)
    samples = data['data_samples']
    scores = torch.randn(4, 3)
    target = torch.stack([s.gt_score for s in samples]) if mixed else torch.eye(3)[[0, 2, 1, 2]]
    target = (1 - smoothing) * target + smoothing / 3
    assert torch.allclose(target.sum(1), torch.ones(4))
    expected = -(target * scores.log_softmax(1)).sum(1).mean()
    assert torch.allclose(head.loss(scores, samples)['loss'], expected)
    half = head.loss(scores.bfloat16(), samples)['loss']
    assert half.dtype == torch.float32 and abs(half - expected) < 0.02


@pytest.mark.parametrize('mixup', [0.0, 0.3])
def test_a_step_under_amp(mixup):
    model = classifier(data_preprocessor=dict(type='ClsDataPreprocessor', mixup=mixup))
    data = model.data_preprocessor(batch(size=(32, 32)), training=True)
    with torch.autocast('cpu', torch.bfloat16):
        loss = model(**data, mode='loss')['loss']
    loss.backward()
    assert loss.dtype == torch.float32 and model.head.fc.weight.grad.abs().sum() > 0


def test_predictions():
    model = classifier().eval()
    with torch.no_grad():
        samples = model.test_step(batch(size=(32, 32)))
        raw = model(torch.stack(batch(size=(32, 32))['inputs']).float())
    for sample, score in zip(samples, raw):
        assert torch.allclose(sample.pred_score, score.softmax(0)) and sample.pred_label == score.argmax()
    without = model.test_step(dict(inputs=batch(size=(32, 32))['inputs']))
    assert torch.equal(without[0].pred_score, samples[0].pred_score)


def test_images_of_different_sizes_are_one_error():
    data = batch()
    data['inputs'][2] = data['inputs'][2][:, :4]
    with pytest.raises(UserError) as error:
        ClsDataPreprocessor()(data)
    assert str(error.value).startswith('images of different sizes in one batch: 6 x 5 (3.png), 6 x 4 (2.png); end the')


@pytest.mark.parametrize('mixup', [0.0, 0.3])
def test_a_label_that_no_class_has_is_one_error(mixup):
    model = classifier(data_preprocessor=dict(type='ClsDataPreprocessor', mixup=mixup))
    with pytest.raises(UserError, match=r'2.png has gt_label=3, and model.head.num_classes=3: write'):
        model.data_preprocessor(batch(labels=(0, 1, 3)), training=True)


def test_the_number_of_classes_is_the_heads():
    assert classifier(5).data_preprocessor.num_classes == 5
    assert classifier(5, data_preprocessor=dict(type='ClsDataPreprocessor', num_classes=5)).head.num_classes == 5
    with pytest.raises(ConfigError, match=r'data_preprocessor.num_classes=4 must be head.num_classes=5, or left out'):
        classifier(5, data_preprocessor=dict(type='ClsDataPreprocessor', num_classes=4))


@pytest.mark.parametrize('mixup', [-1, 'x', True, float('inf')])
def test_a_wrong_weight_of_mixing_is_named(mixup):
    with pytest.raises(ConfigError, match=r'data_preprocessor.mixup=.* such as 0.2'):
        ClsDataPreprocessor(mixup=mixup)


def test_a_head_of_another_width_is_named():
    head = dict(type='LinearClsHead', num_classes=3, in_channels=2048)
    with pytest.raises(ConfigError, match=r'head.in_channels=2048 must be 16'):
        classifier(head=head)(torch.zeros(1, 3, 32, 32))


def test_a_classifier_of_its_own_name():
    assert module.ImageClassifier is MODELS.get('ImageClassifier')
