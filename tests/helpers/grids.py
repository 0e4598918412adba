"""Grids whose trainings are a few lines in place of ``train``."""

import sys
from pathlib import Path

from mmdet_norms.experiments import Cell, grid


def grid_of(tmp_path: Path, monkeypatch, train: str) -> Path:
    """The folder of a grid, beside its config; ``train`` is the code that each training runs."""
    (tmp_path / 'train.py').write_text(train)
    (tmp_path / 'config.py').write_text('lr = 1')
    monkeypatch.setattr(grid, 'TRAIN', (sys.executable, str(tmp_path / 'train.py')))
    return tmp_path / 'grid'


def cells(folder: Path, *seeds: int, more: tuple = ()) -> list[Cell]:
    """A cell for each seed, in such a folder."""
    return [Cell(f'seed{s}', str(folder.parent / 'config.py'), ('--seed', str(s), *more)) for s in seeds]
