"""Videos as frames, and frames as a video."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np

from ..errors import UserError
from ..files import replacing

# What ffmpeg says about damaged files goes to the terminal as it is; read when the first video is opened.
os.environ.setdefault('OPENCV_FFMPEG_LOGLEVEL', '-8')
_FPS = 25  # of files that do not say theirs


class Video:
    """A video file, frame by frame (BGR, uint8); turned as the file says.

    Args:
        path: the file.

    Raises:
        UserError: OpenCV can read no frame of it.
    """

    def __init__(self, path: str):
        self.path = path
        level = cv2.utils.logging.getLogLevel()
        cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # the error below says it
        self._capture = cv2.VideoCapture(path)
        read, self._first = self._capture.read()
        cv2.utils.logging.setLogLevel(level)
        if not read:
            raise UserError(f'{path}: not a video that OpenCV can read, or a damaged one')
        self.height, self.width = self._first.shape[:2]
        fps = self._capture.get(cv2.CAP_PROP_FPS)
        self.fps = fps if 0 < fps <= 1000 else _FPS
        self.announced = max(0, int(self._capture.get(cv2.CAP_PROP_FRAME_COUNT)))
        """The number of frames that the file says it has; 0 if it does not say."""

    def __iter__(self) -> Iterator[np.ndarray]:
        frame = self._first
        while frame is not None:
            yield frame
            read, frame = self._capture.read()
            frame = frame if read else None
        self._capture.release()


@contextmanager
def writing_video(path: Path, width: int, height: int, fps: float) -> Iterator[Callable[[np.ndarray], None]]:
    """A function that appends a frame (BGR, uint8) to an MP4 file, which takes its name when the block ends well.

    Raises:
        UserError: this build of OpenCV writes no MP4.
    """
    with replacing(path) as part:
        writer = cv2.VideoWriter(str(part), cv2.VideoWriter_fourcc(*'mp4v'), fps, (width, height))
        try:
            if not writer.isOpened():
                raise UserError(
                    f'{path}: this build of OpenCV writes no MP4; write the frames as images, or use another'
                )
            yield writer.write
        finally:
            writer.release()
