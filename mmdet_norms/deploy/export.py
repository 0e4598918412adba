"""Fused models on disk: checkpoints, and ONNX files of their convolutional part."""

import inspect
import os
import warnings

import torch
from torch import Tensor, nn

from ..files import replacing
from ..version import __version__
from .folding import fuse


def is_fused(checkpoint: dict | str | os.PathLike) -> bool:
    """Whether a checkpoint holds the weights of a fused model, as :func:`save_fused` writes them.

    Args:
        checkpoint: a loaded one, or a file (of which the weights are not read). A file that cannot be read is none.
    """
    if not isinstance(checkpoint, dict):
        try:
            checkpoint = torch.load(checkpoint, map_location='cpu', weights_only=True, mmap=True)
        except Exception:  # of an old format, damaged, or with more than plain data: not written by save_fused
            return False
    meta = checkpoint.get('meta') if isinstance(checkpoint, dict) else None
    return isinstance(meta, dict) and 'fused' in meta


def save_fused(model: nn.Module, path: str | os.PathLike, meta: dict | None = None) -> None:
    """Write the weights of a fused model, marked as such, so that ``tools/test.py`` fuses before it loads them.

    Args:
        model: what :func:`fuse` returned.
        path: of the new file, which is replaced in one step.
        meta: what the file's ``meta`` says besides; plain data, e.g. the ``meta`` of the checkpoint in training.

    Raises:
        ValueError: the model is not fused.
    """
    if not hasattr(model, 'fuse_report'):
        raise ValueError('save_fused(model) takes what fuse(model) returned; save other models with torch.save')
    fused = dict(mmdet_norms=__version__, folded=len(model.fuse_report.folded), reduced=len(model.fuse_report.reduced))
    with replacing(path) as part, open(part, 'wb') as file:  # by name torch would not tell a full disk
        torch.save(dict(meta=dict(meta or {}, fused=fused), state_dict=model.state_dict()), file)


def load_fused(model: nn.Module, path: str | os.PathLike) -> nn.Module:
    """A fused copy of ``model`` with the weights that :func:`save_fused` wrote.

    Args:
        model: as the config builds it, fused or not; its weights do not matter.
        path: the file.

    Raises:
        ValueError: the file is no fused checkpoint.
        RuntimeError: the weights belong to another model.
    """
    checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    if not is_fused(checkpoint):
        raise ValueError(
            f'{path} is no checkpoint of a fused model (its meta has no entry "fused"): load it into the model as any '
            'other and call fuse(model) after that'
        )
    model = fuse(model)
    model.load_state_dict(checkpoint['state_dict'])
    if 'dataset_meta' in checkpoint['meta']:
        model.dataset_meta = checkpoint['meta']['dataset_meta']
    return model


PARTS = ('features', 'heads')


class RawMaps(nn.Module):
    """What of a model is one graph of tensors: a detector's feature maps and what its dense head makes of them, or a
    classifier's scores.

    Input: normalized images ``(N, C, H, W)``, which is what ``data_preprocessor`` puts out. Output: a flat tuple of
    maps, named by :attr:`output_names`. Decoding of boxes, NMS and RoI heads are left to the caller.

    Args:
        detector: an mmdet detector, or an ``ImageClassifier``, whose head gives ``scores`` (before softmax).
        part: ``'features'``: backbone and neck. ``'heads'``: and the dense head (``bbox_head`` of a single-stage
            detector, ``rpn_head`` of a two-stage one): for a single-stage detector the maps of the head alone, for a
            two-stage detector after the feature maps, which its RoI heads need.

    Raises:
        ValueError: the detector has no ``extract_feat``, or no dense head.
    """

    def __init__(self, detector: nn.Module, part: str):
        super().__init__()
        if part not in PARTS:
            raise ValueError(f'part={part!r} is unknown; choose one of: {", ".join(PARTS)}')
        if not hasattr(detector, 'extract_feat'):
            raise ValueError(f'{type(detector).__name__} has no extract_feat; export takes a detector of mmdet')
        self.detector = detector
        self.two_stage = getattr(detector, 'rpn_head', None) is not None
        self.head = None
        if part == 'heads' and _is(detector, 'ImageClassifier'):
            self.head = detector.head
        elif part == 'heads':
            self.head = detector.rpn_head if self.two_stage else getattr(detector, 'bbox_head', None)
            if not _is(self.head, 'BaseDenseHead'):
                raise ValueError(f"{type(detector).__name__} has no dense head; write part='features'")
        self.output_names: list[str] = []

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        features = self.detector.extract_feat(image)
        maps = {}
        if _is(self.detector, 'ImageClassifier'):  # of several maps, it has taken the last
            maps = {'features': features} if self.head is None else {'scores': self.head(features)}
            self.output_names = list(maps)
            return tuple(maps.values())
        if self.head is None or self.two_stage:
            maps = {f'features_{i}': feature for i, feature in enumerate(features)}
        if self.head is not None:
            # A dense head hands its outputs to predict_by_feat, whose parameters say what they are.
            names = list(inspect.signature(self.head.predict_by_feat).parameters)
            for name, levels in zip(names, self.head(features)):
                maps.update({f'{name}_{i}': level for i, level in enumerate(levels or ()) if level is not None})
        self.output_names = list(maps)
        return tuple(maps.values())


def _is(module: nn.Module | None, name: str) -> bool:
    """Whether a module is of a class of that name, as mmdet is not known here.

    A ``BaseDenseHead`` maps feature maps to maps; a transformer's head wants queries.
    """
    return any(cls.__name__ == name for cls in type(module).__mro__)


def require_onnx() -> None:
    """Import what :func:`export_onnx` needs, which is no requirement of the package.

    Raises:
        ImportError: onnx or onnxscript is missing.
    """
    import onnx  # noqa: F401
    import onnxscript  # noqa: F401


@torch.no_grad()
def export_onnx(
    model: nn.Module,
    path: str | os.PathLike,
    size: tuple[int, int] = (800, 1344),
    batch: int = 1,
    dynamic: bool = False,
    part: str | None = None,
) -> list[str]:
    """Write the convolutional part of a detector, or a classifier, as an ONNX file with the weights inside.

    Needs the packages onnx and onnxscript. What is written is read back and checked; and, where onnxruntime is
    installed, run and compared with torch.

    Args:
        model: a detector, best what :func:`fuse` returned.
        path: of the new file, which is replaced in one step.
        size: height and width of the images. Multiples of the coarsest stride, for a pyramid.
        batch: images per call.
        dynamic: leave batch, height and width open; ``size`` and ``batch`` are then those of the example.
        part: see :class:`RawMaps`. Default: ``'heads'`` for a single-stage detector and a classifier, ``'features'``
            for others.

    Returns:
        The names of the outputs. The input is called ``image``.

    Raises:
        ImportError: onnx or onnxscript are missing.
        ValueError: the model has no such part.
        RuntimeError: the file's numbers are not those of the model.
    """
    require_onnx()
    import onnx

    if part is None:
        single_stage = getattr(model, 'rpn_head', None) is None
        dense = single_stage and _is(getattr(model, 'bbox_head', None), 'BaseDenseHead')
        part = 'heads' if dense or _is(model, 'ImageClassifier') else 'features'
    maps = RawMaps(model, part).eval()
    reference = next(model.parameters())
    images = torch.randn(batch, _channels(model), *size, generator=torch.Generator().manual_seed(0)).to(reference)
    expected = maps(images)
    shapes = None
    if dynamic:
        images = torch.cat([images, images]) if batch == 1 else images  # one image would look like a constant
        shapes = ({0: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO},)
    with replacing(path) as file, warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of the exporter, about itself
        torch.onnx.export(
            maps, (images,), file, dynamo=True, verbose=False, external_data=False, input_names=['image'],
            output_names=maps.output_names, dynamic_shapes=shapes,
        )  # fmt: skip
        written = onnx.load(file)
        if dynamic:
            _require_open(written.graph.input[0])
        onnx.helper.set_model_props(written, _preprocessing(model))
        onnx.save(written, file)
        onnx.checker.check_model(file)
        _compare_with_onnxruntime(file, images[:batch], expected, maps.output_names)
    return maps.output_names


def _channels(model: nn.Module) -> int:
    """Of the images that a detector takes, by its first convolution."""
    focused = 1
    for module in getattr(model, 'backbone', model).modules():
        if type(module).__name__ == 'Focus':  # puts four pixels into one
            focused = 4
        elif isinstance(module, nn.Conv2d):
            return module.in_channels // focused
    return 3


def _require_open(image) -> None:
    axes = image.type.tensor_type.shape.dim
    fixed = [name for name, axis in zip(('batch', 'channels', 'height', 'width'), axes) if not axis.dim_param]
    if fixed != ['channels']:
        raise RuntimeError(f'the model fixes {" and ".join(fixed)} of its images; export without dynamic')


def _preprocessing(model: nn.Module) -> dict[str, str]:
    """What a caller has to do to an image (BGR, 0 to 255) before the graph, as ONNX metadata."""
    found = {'mmdet_norms': __version__}
    preprocessor = getattr(model, 'data_preprocessor', None)
    for key in ('mean', 'std'):
        value = getattr(preprocessor, key, None)
        if isinstance(value, Tensor):
            found[key] = ' '.join(f'{number:g}' for number in value.flatten().tolist())
    if preprocessor is not None:
        found['bgr_to_rgb'] = str(getattr(preprocessor, '_channel_conversion', False))
        found['pad_size_divisor'] = str(getattr(preprocessor, 'pad_size_divisor', 1))
    return found


def _compare_with_onnxruntime(file: str, images: Tensor, expected: tuple[Tensor, ...], names: list[str]) -> None:
    try:
        import onnxruntime
    except ImportError:
        return
    session = onnxruntime.InferenceSession(file, providers=['CPUExecutionProvider'])
    found = session.run(names, {'image': images.cpu().numpy()})
    for name, ours, theirs in zip(names, expected, found):
        ours, theirs = ours.float().cpu(), torch.from_numpy(theirs).float()
        margin = 1e-3 * float(ours.abs().max())
        if ours.shape != theirs.shape or not torch.allclose(ours, theirs, rtol=1e-2, atol=margin):
            raise RuntimeError(f'the ONNX output {name} differs from that of the model; nothing was written')
