"""Frames of video files, and videos of frames, by OpenCV."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
from PIL import Image

from .images import ImageReadError, printable

__all__ = [
    "VIDEO_EXTENSIONS",
    "VideoWriter",
    "frames_per_second",
    "is_video",
    "opencv",
    "read_video",
]

logger = logging.getLogger(__name__)

VIDEO_EXTENSIONS = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm")
CODECS = {".avi": "MJPG", ".mp4": "mp4v"}
"""Of the containers that can be written; OpenCV's wheels have both."""


def is_video(path: str | os.PathLike[str]) -> bool:
    """Whether a file is taken for a video: by its extension."""
    return Path(path).suffix.lower() in VIDEO_EXTENSIONS


def opencv() -> ModuleType:
    """Return the module `cv2`; raise a ValueError that says what to do if it is not there."""
    try:
        import cv2
    except ModuleNotFoundError as error:
        raise ValueError(
            "videos need OpenCV, which is not installed: pip install opencv-python-headless, or "
            "give a folder of frames"
        ) from error
    return cv2


def read_video(path: Path) -> Iterator[tuple[Path, Image.Image]]:
    """Yield (name, image in RGB) of each frame: "clip.mp4/000000", "clip.mp4/000001", ...

    Raises:
        ImageReadError: the file is missing, or no video that OpenCV can decode.
        ValueError: OpenCV is not installed.
    """
    cv2 = opencv()
    if not os.path.isfile(path):
        raise ImageReadError(path, "No such file or directory")
    video = cv2.VideoCapture(str(path))
    try:
        expected, number = int(video.get(cv2.CAP_PROP_FRAME_COUNT)), 0
        while True:
            there, frame = video.read()
            if not there:
                break
            image = Image.fromarray(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB))
            yield path / f"{number:06d}", image
            number += 1
    finally:
        video.release()
    if not number:
        raise ImageReadError(path, "no video, or of a format that OpenCV cannot decode")
    if number + 1 < expected:  # many containers count one too many
        logger.warning("%s ends after %d of %d frames", printable(path), number, expected)


def frames_per_second(path: Path, default: float = 10.0) -> float:
    """The rate of a video's frames; `default` where the file doesn't say."""
    cv2 = opencv()
    video = cv2.VideoCapture(str(path))
    try:
        rate = video.get(cv2.CAP_PROP_FPS)
    finally:
        video.release()
    return rate if 0 < rate < 1000 else default


class VideoWriter:
    """A video that frames are added to; on leaving the context it is moved into place as a whole.

    Frames of another size than the first are fitted into it, on black.

    Args:
        path: .mp4 or .avi.
        fps: frames a second.

    Raises:
        ValueError: another extension, or OpenCV is not installed or cannot write such files.
    """

    def __init__(self, path: Path, fps: float) -> None:
        if path.suffix not in CODECS:
            raise ValueError(f"the extension of {path} must be one of {', '.join(CODECS)}")
        self.cv2, self.path, self.fps = opencv(), path, fps
        # OpenCV tells the container by the extension.
        self.temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
        self._writer = None
        self._size = (0, 0)

    def add(self, image: Image.Image) -> None:
        """Append a frame in RGB."""
        if self._writer is None:
            # Many codecs want even sides.
            self._size = tuple(side + side % 2 for side in image.size)
            codec = self.cv2.VideoWriter_fourcc(*CODECS[self.path.suffix])
            writer = self.cv2.VideoWriter(str(self.temporary), codec, self.fps, self._size)
            if not writer.isOpened():
                raise ValueError(f"OpenCV cannot write {self.path}: give another extension")
            self._writer = writer
        if image.size != self._size:
            page = Image.new("RGB", self._size)
            if image.width > self._size[0] or image.height > self._size[1]:
                image = image.copy()
                image.thumbnail(self._size)
            page.paste(image)
            image = page
        self._writer.write(self.cv2.cvtColor(np.asarray(image), self.cv2.COLOR_RGB2BGR))

    def __enter__(self) -> "VideoWriter":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if self._writer is None:
            return
        self._writer.release()
        if kind is None:
            os.replace(self.temporary, self.path)
        else:
            self.temporary.unlink(missing_ok=True)
