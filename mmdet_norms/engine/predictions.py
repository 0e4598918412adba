"""``--out FILE.json`` of a classifier: the predicted class of every image."""

import json
from collections.abc import Sequence
from pathlib import Path

from mmengine.evaluator import BaseMetric
from mmengine.logging import MMLogger
from mmengine.registry import METRICS

from ..files import replacing


@METRICS.register_module()
class DumpPredictions(BaseMetric):
    """Write a list of ``{img_path, pred_label, pred_class, pred_score[, gt_label]}``, one entry per image.

    ``pred_class`` is the name of ``pred_label`` where the data set names its classes; ``pred_score`` is the probability
    of that, null where it is NaN. Nothing is computed, so no metric is added.

    Args:
        out: the file.
        collect_device: as for :class:`mmengine.evaluator.BaseMetric`.
    """

    default_prefix = 'predictions'  # of nothing; without one mmengine warns

    def __init__(self, out: str | Path, collect_device: str = 'cpu'):
        super().__init__(collect_device=collect_device)
        self.out = Path(out)

    def process(self, data_batch: dict, data_samples: Sequence[dict]) -> None:
        """Keep what is predicted for a batch."""
        names = (self.dataset_meta or {}).get('classes') or ()
        for sample in data_samples:
            label = int(sample['pred_label'])
            score = float(sample['pred_score'][label])
            entry = dict(img_path=sample.get('img_path'), pred_label=label)
            if label < len(names):
                entry['pred_class'] = names[label]
            entry['pred_score'] = round(score, 6) if score == score else None
            if 'gt_label' in sample:
                entry['gt_label'] = int(sample['gt_label'])
            self.results.append(entry)

    def compute_metrics(self, results: list[dict]) -> dict:
        """Write the file in one step."""
        text = '[' + ',\n '.join(map(json.dumps, results)) + ']\n'
        with replacing(self.out) as part:
            part.write_text(text, encoding='utf-8')
        MMLogger.get_current_instance().info(f'The predicted classes of {len(results)} images written to {self.out}')
        return {}


def is_predictions(path: Path) -> bool:
    """Does a JSON file begin as one that :class:`DumpPredictions` writes? It is not read further."""
    with path.open('rb') as file:
        text = b''.join(file.read(4096).split())
    return text in (b'', b'[]') or (text.startswith(b'[{') and b'"pred_label"' in text)
