"""What holds for every config that mmdet ships; each is read once."""

import pytest
from mmengine.config import Config

from helpers.python_style import CONFIGS, assert_alike
from mmdet_norms.cli.config_checks import config_problems

PARTS = 6
FOLDERS = sorted(folder for folder in CONFIGS.iterdir() if folder.is_dir() and folder.name != '_base_')


def test_all_parts_together_are_all_configs():
    assert sum(len(list(folder.glob('*.py'))) for folder in FOLDERS) > 700
    assert {len(FOLDERS[part::PARTS]) for part in range(PARTS)} <= {len(FOLDERS) // PARTS, len(FOLDERS) // PARTS + 1}


@pytest.mark.slow
@pytest.mark.parametrize('part', range(PARTS))
def test_nothing_is_wrong_with_it_and_its_classes_may_be_spelled_as_classes(part):
    """Models that are alike to the last value lie in one folder, and are looked at once."""
    models, read, paths = {}, 0, [path for folder in FOLDERS[part::PARTS] for path in sorted(folder.glob('*.py'))]
    for path in paths:
        try:
            cfg = Config.fromfile(path)
        except (ImportError, FileNotFoundError, KeyError):  # of packages that are not installed
            continue
        read += 1
        assert not config_problems(cfg), path
        if 'model' in cfg:
            models[repr(cfg.model.to_dict())] = cfg.model
    assert read > 0.9 * len(paths) and len(models) > 50
    for model in models.values():
        assert_alike(model, names=('bnet5', 'gn', 'mabn', 'an-gn-head'), spellings=(None,))
