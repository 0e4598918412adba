# AN's and AOGNet's recipe: 120 epochs, the first 5 of them a warm-up, then half a cosine.
_base_ = './imagenet_100e.py'
train_cfg = dict(max_epochs=120)

param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=True, begin=0, end=5, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min=0, by_epoch=True, begin=5, end=120, T_max=115, convert_to_iter_based=True)
]
