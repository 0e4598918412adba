"""Crops, colours and mixed images are a function of seed and iteration, also after a resume, in and without workers."""

import random
from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

import mmdet_norms.engine  # noqa: F401  (registers RandomStateHook)
from helpers.digits import write_digits


@HOOKS.register_module()
class Seen(Hook):
    def __init__(self):
        self.batches = []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        images = data_batch['inputs']
        names = [Path(sample.img_path).name for sample in data_batch['data_samples']]
        self.batches.append(
            (runner.iter, names, float(torch.stack(images).double().sum()), float(outputs['loss'].detach()))
        )


def run(data, folder, workers, seed=3, epochs=3, resume=None):
    random.seed()  # nothing of the test may help
    np.random.seed(random.randrange(2**31))
    torch.manual_seed(random.randrange(2**31))
    pipeline = [
        dict(type='LoadImageFromFile'),
        dict(type='RandomResizedCrop', scale=16),
        dict(type='RandomFlip', prob=0.5),
        dict(type='ColorJitter', brightness=0.4, contrast=0.4, saturation=0.4),
        dict(type='Lighting'),
        dict(type='PackClsInputs'),
    ]
    backbone = dict(
        type='mmdet.ResNet', depth=18, base_channels=8, num_stages=1, strides=(1,), dilations=(1,), out_indices=(0,)
    )
    head = dict(type='LinearClsHead', num_classes=10, in_channels=8, dropout=0.1, label_smoothing=0.1)
    runner = Runner(
        model=dict(
            type='ImageClassifier',
            backbone=backbone,
            head=head,
            data_preprocessor=dict(type='ClsDataPreprocessor', mixup=0.4, mean=[127.0] * 3, std=[60.0] * 3),
        ),
        work_dir=str(folder),
        train_dataloader=dict(
            dataset=dict(type='ImageFolder', data_root=str(data), pipeline=pipeline),
            batch_size=8,
            sampler=dict(type='DefaultSampler', shuffle=True),
            num_workers=workers,
        ),
        train_cfg=dict(by_epoch=True, max_epochs=epochs),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.05, momentum=0.9)),
        custom_hooks=[dict(type='Seen'), dict(type='RandomStateHook')],
        randomness=dict(seed=seed),
        load_from=resume,
        resume=resume is not None,
        experiment_name=f'run_{random.random()}',
        log_level='WARNING',
        cfg=Config(),
    )
    runner.train()
    return next(hook.batches for hook in runner.hooks if isinstance(hook, Seen))


def test_a_resumed_run_sees_the_same_images(tmp_path):
    data = write_digits(tmp_path / 'digits', train=24, val=1)
    whole = run(data, tmp_path / 'whole', workers=2)
    saved = torch.load(tmp_path / 'whole' / 'epoch_2.pth', map_location='cpu')
    assert saved['meta']['dataset_meta'] == dict(classes=tuple('0123456789'))
    assert len(whole) == 9 and len({total for _, _, total, _ in whole}) == 9
    for workers in (0, 2):
        resume = str(tmp_path / 'whole' / 'epoch_2.pth')
        assert run(data, tmp_path / f'resumed_{workers}', workers, resume=resume) == whole[6:]
    (again, *_), (other, *_) = (run(data, tmp_path / str(seed), 0, seed, epochs=1) for seed in (3, 4))
    assert again == whole[0] and other[2] != again[2] and other[3] != again[3]
