"""Top-k accuracy."""

from collections.abc import Sequence

import torch
from mmengine.evaluator import BaseMetric
from mmengine.registry import METRICS

from ..errors import UserError


@METRICS.register_module()
class Accuracy(BaseMetric):
    """``accuracy/top1``, ``accuracy/top5``: the part of the images whose label is among the k best scores, in 0 to 1.

    Of equal scores the first class is the better one, as for ``argmax``; an image with a NaN among its scores is wrong.

    Args:
        topk: which k; those above the number of classes are left out.
        per_class: also ``accuracy/top1_CLASS`` of every class that has images. Default False.
        kwargs: as for :class:`mmengine.evaluator.BaseMetric`.
    """

    default_prefix = 'accuracy'

    def __init__(self, topk: Sequence[int] = (1, 5), per_class: bool = False, **kwargs) -> None:
        super().__init__(**kwargs)
        self.topk, self.per_class = (topk,) if isinstance(topk, int) else tuple(topk), per_class
        if not self.topk or not all(isinstance(k, int) and k > 0 for k in self.topk):
            raise UserError(f'Accuracy: topk={topk!r} must be whole numbers of at least 1, such as (1, 5)')

    def process(self, data_batch: object, data_samples: Sequence[dict]) -> None:
        """Keep of every image its label, the place of that among the sorted scores, and how many classes there are."""
        scores = torch.stack([sample['pred_score'] for sample in data_samples]).cpu()
        labels = torch.tensor([int(sample['gt_label']) for sample in data_samples])
        own = scores.gather(1, labels[:, None])
        before = torch.arange(scores.shape[1]) < labels[:, None]
        places = ((scores > own) | (scores == own) & before).sum(1)
        places[scores.isnan().any(1)] = scores.shape[1]
        self.results += [(label, place, scores.shape[1]) for label, place in zip(labels.tolist(), places.tolist())]

    def compute_metrics(self, results: list) -> dict[str, float]:
        """Over all images of all processes."""
        if not results:
            return {}
        labels, places, classes = torch.tensor(results).unbind(1)
        metrics = {f'top{k}': (places < k).double().mean().item() for k in self.topk if k <= classes[0]}
        if self.per_class:
            names = (self.dataset_meta or {}).get('classes', range(int(classes[0])))
            right = {name: places[labels == label] == 0 for label, name in enumerate(names)}
            metrics |= {f'top1_{name}': own.double().mean().item() for name, own in right.items() if len(own)}
        return metrics
