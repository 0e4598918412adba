"""What the package adds to mmengine's runner: results, progress, CPU processes."""

from .dist import CPUAmpOptimWrapper, end_processes, start_cpu_processes
from .progress import TimedLoggerHook
from .results import PerClassCocoMetric, ResultsHook

__all__ = [
    'CPUAmpOptimWrapper',
    'PerClassCocoMetric',
    'ResultsHook',
    'TimedLoggerHook',
    'end_processes',
    'start_cpu_processes',
]
