"""Stock configs that run in a test."""

from mmdet_norms.entries import mappings

SIZES = dict(fc_out_channels=32, nms_pre=50, max_per_img=20, nms_post=20, max_num=20)


def shrink(model, **sizes) -> None:
    """Fewer proposals and narrower fc layers, wherever a model has them; and ``sizes``, in the same way. In place."""
    for _, part in mappings(model):
        part.update({key: size for key, size in (SIZES | sizes).items() if key in part})
        if part.get('type') == 'RandomSampler':
            part['num'] = 16
