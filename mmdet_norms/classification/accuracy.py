"""Top-k accuracy."""

from collections.abc import Sequence

import torch
from mmengine.evaluator import BaseMetric
from mmengine.registry import METRICS


@METRICS.register_module()
class Accuracy(BaseMetric):
    """``accuracy/top1``, ``accuracy/top5``: the part of the images whose label is among the k best scores, in 0 to 1.

    Args:
        topk: which k; those above the number of classes are left out.
        kwargs: as for :class:`mmengine.evaluator.BaseMetric`.
    """

    default_prefix = 'accuracy'

    def __init__(self, topk: Sequence[int] = (1, 5), **kwargs) -> None:
        super().__init__(**kwargs)
        self.topk = (topk,) if isinstance(topk, int) else tuple(topk)

    def process(self, data_batch: object, data_samples: Sequence[dict]) -> None:
        """Keep of every image its label and the place of that among the sorted scores."""
        for sample in data_samples:
            score, label = sample['pred_score'].cpu(), int(sample['gt_label'])
            place = int((score > score[label]).sum())
            self.results.append((label, place, len(score)))

    def compute_metrics(self, results: list) -> dict[str, float]:
        """Over all images of all processes."""
        places = torch.tensor([place for _, place, _ in results])
        classes = results[0][2] if results else 0
        return {f'top{k}': float((places < k).float().mean()) for k in self.topk if k <= classes}
