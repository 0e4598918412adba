"""What the package adds to mmengine's runner: results, progress, CPU processes, memory format."""

from .dist import CPUAmpOptimWrapper, end_processes, start_cpu_processes
from .memory_format import ChannelsLastHook
from .norms import NormHook
from .optim import NormOptimWrapperConstructor
from .progress import TimedLoggerHook
from .results import PerClassCocoMetric, ResultsHook

__all__ = [
    'CPUAmpOptimWrapper',
    'ChannelsLastHook',
    'NormHook',
    'NormOptimWrapperConstructor',
    'PerClassCocoMetric',
    'ResultsHook',
    'TimedLoggerHook',
    'end_processes',
    'start_cpu_processes',
]
