"""What the package adds to mmengine's runner: results, progress, CPU processes, memory format, tune mode."""

from .coco_detections import DumpCocoDetections
from .cost import CostHook
from .dist import CPUAmpOptimWrapper, end_processes, start_cpu_processes
from .freeze_bnet import FreezeBNETHook
from .fuse import FuseHook
from .memory_format import ChannelsLastHook
from .nonfinite import NonFiniteError, NonFiniteHook
from .norm_stats import NormStatsHook
from .norms import NormHook
from .optim import NormOptimWrapperConstructor
from .optimizers import AdaHessian, Ralamb, Ranger, RangerLars
from .pictures import PicturesHook
from .precise_bn import PreciseBNHook
from .predictions import DumpPredictions
from .progress import TimedLoggerHook
from .results import ClassResultsHook, PerClassCocoMetric, ResultsHook
from .rng import RandomStateHook
from .safe_checkpoints import PendingValidationHook
from .schedule import ScheduleHook
from .second_order import SecondOrderOptimWrapper
from .start import StartHook
from .statistics import recompute_statistics
from .together import SyncBuffersHook
from .trackers import MLflowTracker, TensorboardTracker, TrackersHook, WandbTracker
from .tune import TuneModeHook, TuneReport, tune_mode
from .tuned_modules import undo_tune_mode

__all__ = [
    'AdaHessian',
    'CPUAmpOptimWrapper',
    'ChannelsLastHook',
    'ClassResultsHook',
    'CostHook',
    'DumpCocoDetections',
    'DumpPredictions',
    'FreezeBNETHook',
    'FuseHook',
    'MLflowTracker',
    'NonFiniteError',
    'NonFiniteHook',
    'NormHook',
    'NormOptimWrapperConstructor',
    'NormStatsHook',
    'PendingValidationHook',
    'PerClassCocoMetric',
    'PicturesHook',
    'PreciseBNHook',
    'Ralamb',
    'RandomStateHook',
    'Ranger',
    'RangerLars',
    'ResultsHook',
    'ScheduleHook',
    'SecondOrderOptimWrapper',
    'StartHook',
    'SyncBuffersHook',
    'TensorboardTracker',
    'TimedLoggerHook',
    'TrackersHook',
    'TuneModeHook',
    'TuneReport',
    'WandbTracker',
    'end_processes',
    'recompute_statistics',
    'start_cpu_processes',
    'tune_mode',
    'undo_tune_mode',
]
