"""Pretraining: any backbone as an image classifier on mmengine's runner, and data in folders of classes."""

from .accuracy import Accuracy
from .classifier import ClsDataPreprocessor, ImageClassifier, LinearClsHead
from .image_folder import ImageFolder, classes_of_entry, image_folders, problems_of
from .mini import mininest_ba, mininest_bn, mininet, resnest50, xmininet, xsemininet
from .transforms import ColorJitter, Lighting, PackClsInputs, RandomResizedCrop

__all__ = [
    'Accuracy',
    'ClsDataPreprocessor',
    'ColorJitter',
    'ImageClassifier',
    'ImageFolder',
    'Lighting',
    'LinearClsHead',
    'PackClsInputs',
    'RandomResizedCrop',
    'classes_of_entry',
    'image_folders',
    'mininest_ba',
    'mininest_bn',
    'mininet',
    'problems_of',
    'resnest50',
    'xmininet',
    'xsemininet',
]
