"""Reading videos frame by frame, and writing them as a whole or not at all."""

import builtins
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("cv2")

from vim.engine.images import ImageReadError
from vim.engine.video import VideoWriter, frames_per_second, is_video, opencv, read_video


def write(path, count=5, size=(64, 48), fps=5):
    with VideoWriter(path, fps) as video:
        for index in range(count):
            video.add(Image.new("RGB", size, (40 * index, 0, 200)))
    return path


@pytest.mark.parametrize("extension", [".mp4", ".avi"])
def test_written_and_read(tmp_path, extension):
    path = write(tmp_path / f"clip{extension}")
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    frames = list(read_video(path))
    assert [name for name, _ in frames] == [path / f"{i:06d}" for i in range(5)]
    for index, (_, image) in enumerate(frames):
        assert image.size == (64, 48)
        red, green, blue = np.asarray(image).mean(axis=(0, 1))
        assert abs(red - 40 * index) < 20
        assert green < 20
        assert abs(blue - 200) < 20
    assert frames_per_second(path) == 5


def test_sides_are_made_even_and_other_sizes_fitted(tmp_path):
    with VideoWriter(tmp_path / "clip.mp4", 5) as video:
        for size in ((33, 21), (20, 20), (200, 300)):
            video.add(Image.new("RGB", size, "white"))
    images = [image for _, image in read_video(tmp_path / "clip.mp4")]
    assert {image.size for image in images} == {(34, 22)}
    assert np.asarray(images[1])[:, 28:].mean() < 30


def test_nothing_is_left_of_what_failed(tmp_path):
    def fail():
        with VideoWriter(tmp_path / "clip.mp4", 5) as video:
            video.add(Image.new("RGB", (32, 32)))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert list(tmp_path.iterdir()) == []
    with VideoWriter(tmp_path / "empty.mp4", 5):
        pass
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_read(tmp_path):
    (tmp_path / "text.mp4").write_text("text")
    with pytest.raises(ImageReadError, match="no video, or of a format"):
        list(read_video(tmp_path / "text.mp4"))
    with pytest.raises(ImageReadError, match="No such file"):
        list(read_video(tmp_path / "no.mp4"))
    assert frames_per_second(tmp_path / "text.mp4", default=7) == 7


def test_names():
    assert is_video("a/B.MP4")
    assert not is_video("a.png")
    with pytest.raises(ValueError, match=r"clip.gif must be one of .avi, .mp4"):
        VideoWriter(Path("clip.gif"), 5)


def test_without_opencv(monkeypatch):
    real = builtins.__import__

    def without(name, *arguments):
        if name == "cv2":
            raise ModuleNotFoundError("no cv2", name="cv2")
        return real(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=r"pip install opencv-python-headless, or give a folder"):
        opencv()
