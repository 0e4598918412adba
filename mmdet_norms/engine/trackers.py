"""Where a training is followed beside its log: mmengine's backends, so that a resumed run goes on as the same one."""

import functools
import logging
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from mmengine.config import Config
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.logging import MMLogger
from mmengine.registry import HOOKS, VISBACKENDS
from mmengine.runner import Runner
from mmengine.visualization import MLflowVisBackend, TensorboardVisBackend, WandbVisBackend

from ..errors import UserError

# what mmengine calls to record something
_RECORDS = ('add_graph', 'add_image', 'add_scalar', 'add_scalars')
_WANDB_RUN = re.compile(r'(?:offline-)?run-(\d{8}_\d{6})-(\w+)')


class _Tracker:
    """A backend that records nothing until a training starts it.

    The config that a run leaves in its work dir names it, too: a test with that config is not followed, nor is anything
    that only builds a runner.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._config: Config | None = None
        self._started = False

    def __init_subclass__(cls) -> None:
        for name in _RECORDS:
            setattr(cls, name, _if_started(getattr(cls, name)))

    def add_config(self, config: Config, **kwargs) -> None:
        """Keep the config until the training starts."""
        self._config = config

    def start(self) -> None:
        """Start to record, with the config."""
        if not self._started:
            self._started = True
            self._init_env()
            self._env_initialized = True
            if self._config is not None:
                self._record_config(self._config)

    def begin(self, iteration: int) -> None:
        """Training begins after this iteration."""

    def _record_config(self, config: Config) -> None:
        super().add_config(config)


def _if_started(record: Callable) -> Callable:
    @functools.wraps(record)
    def recorded(self, *args, **kwargs):
        return record(self, *args, **kwargs) if self._started else None

    return recorded


@VISBACKENDS.register_module()
class TensorboardTracker(_Tracker, TensorboardVisBackend):
    """TensorBoard's event files of a work dir in one folder, which is one run however often it was resumed.

    mmengine's backend writes into the dated folder of each start.
    """

    def begin(self, iteration: int) -> None:
        """Have TensorBoard drop what was written after the iteration that training goes on from."""
        from torch.utils.tensorboard import SummaryWriter

        self.experiment.close()
        self._tensorboard = SummaryWriter(self._save_dir, purge_step=iteration + 1)


@VISBACKENDS.register_module()
class WandbTracker(_Tracker, WandbVisBackend):
    """Weights & Biases with its curves over iterations.

    mmengine's backend counts the lines of the log instead, and uploads every Python file below the current folder.

    Args:
        save_dir: where wandb's own folder is.
        resume: go on with the newest run in there. Default False.
        kwargs: as for mmengine's WandbVisBackend.
    """

    def __init__(self, save_dir: str, resume: bool = False, **kwargs) -> None:
        kwargs.setdefault('define_metric_cfg', [dict(name='*', step_metric='iter')])
        super().__init__(save_dir, **kwargs)
        self._resume = resume

    def _init_env(self) -> None:
        import wandb

        last = _last_wandb_run(Path(self._save_dir)) if self._resume else None
        if last is not None and 'WANDB_RUN_ID' not in os.environ:
            self._init_kwargs = dict(dict(id=last, resume='allow'), **(self._init_kwargs or {}))
        try:
            super()._init_env()
        except wandb.Error as error:
            raise UserError(
                f'--wandb: no run can be started ({_in_one_line(error)}). Log in by wandb login; or set '
                'WANDB_MODE=offline, and upload later by wandb sync'
            ) from error

    def _record_config(self, config: Config) -> None:
        # that of a resumed run may say otherwise
        self._wandb.config.update(config.to_dict(), allow_val_change=True)


@VISBACKENDS.register_module()
class MLflowTracker(_Tracker, MLflowVisBackend):
    """MLflow, where it writes by itself: ``MLFLOW_TRACKING_URI``, or the current folder.

    mmengine's backend makes a store of its own for every start, which no other run is in.

    Args:
        save_dir: the work dir, which is a tag of the run.
        resume: go on with the newest run that has this tag. Default False.
        run_name, kwargs: as for mmengine's MLflowVisBackend. ``exp_name`` is the experiment.
    """

    def __init__(self, save_dir: str, resume: bool = False, run_name: str | None = None, **kwargs) -> None:
        # without copies of annotations, checkpoints and the like
        kwargs.setdefault('artifact_suffix', ('results.json', 'cost.json', 'scalars.json', '.log', '.py'))
        super().__init__(save_dir, run_name=run_name, **kwargs)
        self._resume = resume
        self._goes_on = False

    def _init_env(self) -> None:
        import mlflow

        self._mlflow = mlflow
        experiment = self._exp_name or 'Default'
        tags = {'work_dir': os.path.abspath(self._save_dir), **(self._tags or {})}
        try:
            if self._tracking_uri is not None:
                mlflow.set_tracking_uri(self._tracking_uri)
            if self._artifact_location and mlflow.get_experiment_by_name(experiment) is None:
                mlflow.create_experiment(experiment, artifact_location=self._artifact_location)
            mlflow.set_experiment(experiment)
            last = self._last_run(experiment, tags['work_dir']) if self._resume else None
            self._goes_on = last is not None
            mlflow.start_run(run_id=last, run_name=None if last else self._run_name, tags=tags)
            mlflow.log_params(self._params or {})
        except mlflow.exceptions.MlflowException as error:
            raise UserError(
                f'--mlflow: no run can be started at {mlflow.get_tracking_uri()} ({_in_one_line(error)}). '
                'MLFLOW_TRACKING_URI says where else'
            ) from error
        finally:
            _open_logs_again()

    def _record_config(self, config: Config) -> None:
        self.cfg = config
        if self._goes_on:  # MLflow lets no parameter change: a resumed run keeps those that it began with
            self._mlflow.log_text(config.pretty_text, 'config.py')
        else:
            super()._record_config(config)

    def _last_run(self, experiment: str, work_dir: str) -> str | None:
        name = work_dir.replace("'", "\\'")
        runs = self._mlflow.search_runs(
            experiment_names=[experiment],
            filter_string=f"tags.work_dir = '{name}'",
            max_results=1,
            order_by=['attributes.start_time DESC'],
            output_format='list',
        )
        return runs[0].info.run_id if runs else None


@HOOKS.register_module()
class TrackersHook(Hook):
    """Have the trackers of a run follow its training. ``tools/train.py --tensorboard`` and the like add it."""

    priority = 'LOWEST'  # when all others are ready to train

    def before_train(self, runner: Runner) -> None:
        """Called when it is known where training goes on from."""
        start_trackers(runner)
        if is_main_process():
            for tracker in _trackers(runner):
                tracker.begin(runner.iter)


def start_trackers(runner: Runner) -> None:
    """Start what follows a training, before it begins, so that a missing login is answered first."""
    if is_main_process():
        for tracker in _trackers(runner):
            tracker.start()


def _trackers(runner: Runner) -> Iterator[_Tracker]:
    return (one for one in runner.visualizer._vis_backends.values() if isinstance(one, _Tracker))


def _last_wandb_run(folder: Path) -> str | None:
    """The id of the newest run in a folder that wandb writes into, from the names of its folders."""
    found = (_WANDB_RUN.fullmatch(path.name) for path in folder.glob('wandb/*run-*'))
    return max(((match[1], match[2]) for match in found if match), default=(None, None))[1]


def _open_logs_again() -> None:
    """MLflow configures logging when it is imported and when it makes a data base, which closes every log file."""
    for handler in MMLogger.get_current_instance().handlers:
        if isinstance(handler, logging.FileHandler) and (handler.stream is None or handler.stream.closed):
            handler.stream = open(handler.baseFilename, 'a', encoding=handler.encoding)  # noqa: SIM115


def _in_one_line(error: Exception) -> str:
    return ' '.join(str(error).split())[:300]
