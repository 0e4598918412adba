"""State dicts that MABN takes besides its own: batch norm's, and those whose windows are others or none."""

import warnings

from torch import Tensor

_WINDOWS = {
    'buffer_x2': 'iterations',
    'buffer_gz': 'iterations',
    'pre_x2': 'groups of images',
    'pre_gz': 'groups of images',
}


def take_over(norm, state: dict[str, Tensor], prefix: str, missing: list[str]) -> None:
    """Change what ``state`` has under ``prefix`` into what the MABN ``norm`` can load.

    Args:
        missing: gets the keys that a state of MABN lacks.
    """
    mean, var = (state.get(prefix + name) for name in ('running_mean', 'running_var'))
    if mean is not None and mean.shape == norm.weight.shape and prefix + 'iters' not in state:
        _take_batch_norm(norm, state, prefix)
    if var is not None and var.numel() == norm.num_features:
        state[prefix + 'running_var'] = var.reshape(norm.running_var.shape)
    if any(prefix + name in state for name in ('weight', 'bias', 'running_var')):
        _take_windows(norm, state, prefix, missing)


def _take_batch_norm(norm, state, prefix) -> None:
    mean = state.pop(prefix + 'running_mean').double()
    state.pop(prefix + 'num_batches_tracked', None)
    weight, bias, var = (state.get(prefix + name) for name in ('weight', 'bias', 'running_var'))
    if weight is not None and bias is not None and var is not None:
        shift = weight.double() * mean / (var.double().flatten() + norm.eps).sqrt()
        state[prefix + 'bias'] = (bias.double() - shift).to(bias.dtype)
    _warn(
        'MABN loaded a batch norm: its mean went into the bias (the same function in eval mode of what the same '
        f'convolution puts out); {_restart(norm, state, prefix)}'
    )


def _take_windows(norm, state, prefix, missing) -> None:
    state.pop(prefix + 'sta_matrix', None)  # with groups: published with the windows, a constant
    others = [name for name in _WINDOWS if name not in norm.WINDOWS and prefix + name in state]
    for name in others:
        del state[prefix + name]
    absent = [name for name in ('iters', *norm.WINDOWS) if prefix + name not in state]
    own = _WINDOWS[norm.WINDOWS[0]]
    if absent:  # a counter past the warm-up would average rows that were never written
        restarted = _restart(norm, state, prefix)
        if others:
            _warn(f'MABN loaded a window of {_WINDOWS[others[0]]} into one of {own}; {restarted}')
        else:
            missing += [prefix + name for name in absent]
        return
    for name in norm.WINDOWS:
        rows = state[prefix + name]
        if rows.dim() == 2 and rows.shape[1] == norm.num_features and len(rows) != norm.buffer_size:
            state[prefix + name] = norm.resized(rows, int(state[prefix + 'iters']))
            _warn(f'MABN loaded a window of {len(rows)} {own} into one of {norm.buffer_size}: the newest rows are kept')


def _restart(norm, state, prefix) -> str:
    """Give ``state`` the counter and windows of a new layer; says so."""
    fresh = norm.new_state()
    state.update((prefix + name, fresh[name].to(norm.weight.device)) for name in ('iters', *norm.WINDOWS))
    return 'iters, {} and {} start from 0'.format(*norm.WINDOWS)


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=5)
