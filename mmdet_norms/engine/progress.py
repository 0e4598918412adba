"""Progress lines by the clock, so that slow or short loops do not run in silence."""

import time

from mmengine.hooks import LoggerHook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class TimedLoggerHook(LoggerHook):
    """mmengine's LoggerHook that also logs (with its ETA) after ``max_quiet_s`` seconds without a line.

    The stock hook counts iterations only: with the default of 50 a short validation prints nothing,
    and a CPU run prints once in minutes.

    Args:
        max_quiet_s: the longest time between two lines, as far as iterations end in it.
        kwargs: as for :class:`mmengine.hooks.LoggerHook`.
    """

    def __init__(self, max_quiet_s: float = 10.0, **kwargs) -> None:
        super().__init__(**kwargs)
        self.max_quiet_s = max_quiet_s
        self._last_line = time.monotonic()

    def every_n_inner_iters(self, batch_idx: int, n: int) -> bool:
        """Whether a line is due now: by count as in the stock hook, or by the clock."""
        now = time.monotonic()
        due = super().every_n_inner_iters(batch_idx, n) or now - self._last_line >= self.max_quiet_s
        if due:
            self._last_line = now
        return due

    def before_train_epoch(self, runner) -> None:
        """Start the clock."""
        self._last_line = time.monotonic()

    before_val_epoch = before_test_epoch = before_train_epoch
