"""Images of every mode are read as people see them, and no file stops more than itself."""

import io
import os
import sys

import numpy as np
import pytest
from PIL import Image

from vim.engine.images import (
    ImageReadError,
    SheetEntry,
    contact_sheet,
    find_images,
    printable,
    read_image,
)

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def pixels(path):
    return np.asarray(read_image(path)).tolist()


def save(image, path, **options):
    image.save(path, **options)
    return path


def palette_image():
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *BLUE])
    image.putpixel((1, 0), 1)
    return image


@pytest.mark.parametrize(
    ("values", "name", "expected"),
    [
        pytest.param(np.uint8([[0, 100, 255]]), "x.png", [0, 100, 255], id="L"),
        pytest.param(np.array([[False, True]]), "x.png", [0, 255], id="1"),
        pytest.param(np.uint16([[0, 255, 256, 40000, 65535]]), "x.png", [0, 0, 1, 156, 255]),
        pytest.param(np.uint16([[0, 255, 256, 40000, 65535]]), "x.tif", [0, 0, 1, 156, 255]),
        pytest.param(np.int32([[-5, 256, 65535, 10**6]]), "x.tif", [0, 1, 255, 255], id="I"),
        pytest.param(np.float32([[0, 0.5, 1]]), "x.tif", [0, 128, 255], id="F-unit"),
        pytest.param(np.float32([[-3, 0.6, 200, 300]]), "x.tif", [0, 1, 200, 255], id="F-bytes"),
        pytest.param(np.float32([[np.nan, 0.5, np.inf]]), "x.tif", [0, 0, 255], id="F-not-finite"),
    ],
)
def test_grey(values, name, expected, tmp_path):
    path = save(Image.fromarray(values), tmp_path / name)
    assert pixels(path) == [[[value] * 3 for value in expected]]


def test_16_bit_pgm(tmp_path):
    path = tmp_path / "x.pgm"
    path.write_bytes(b"P5 3 1 65535\n" + np.array([0, 40000, 65535], ">u2").tobytes())
    assert pixels(path) == [[[0] * 3, [156] * 3, [255] * 3]]


@pytest.mark.parametrize(
    ("image", "options", "expected"),
    [
        pytest.param(Image.new("RGB", (1, 1), RED), {}, [RED], id="RGB"),
        pytest.param(Image.new("RGBA", (1, 1), (*RED, 255)), {}, [RED], id="RGBA-opaque"),
        pytest.param(Image.new("RGBA", (1, 1), (*RED, 0)), {}, [WHITE], id="RGBA-clear"),
        pytest.param(Image.new("RGBA", (1, 1), (*RED, 51)), {}, [(255, 204, 204)], id="RGBA"),
        pytest.param(Image.new("LA", (1, 1), (0, 51)), {}, [(204,) * 3], id="LA"),
        pytest.param(palette_image(), {}, [RED, BLUE], id="P"),
        pytest.param(palette_image(), {"transparency": 1}, [RED, WHITE], id="P-index"),
        pytest.param(
            palette_image(), {"transparency": b"\x33\xff"}, [(255, 204, 204), BLUE], id="P-bytes"
        ),
        pytest.param(Image.new("L", (1, 1), 7), {"transparency": 7}, [WHITE], id="L-key"),
        pytest.param(Image.new("RGB", (1, 1), RED), {"transparency": RED}, [WHITE], id="RGB-key"),
    ],
)
def test_colour_and_transparency(image, options, expected, tmp_path):
    path = save(image, tmp_path / "x.png", **options)
    assert pixels(path) == [[list(colour) for colour in expected]]


@pytest.mark.parametrize("name", ["x.tif", "x.jpg"])
def test_cmyk(name, tmp_path):
    path = save(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), tmp_path / name)
    assert read_image(path).getpixel((4, 4)) == pytest.approx(RED, abs=3)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(orientation, tmp_path):
    """What is stored turned in any way, with the tag that says so, is read as the original."""
    original = Image.fromarray(np.arange(18, dtype=np.uint8).reshape(2, 3, 3))
    undone_by = Image.Transpose
    stored = {
        1: [],
        2: [undone_by.FLIP_LEFT_RIGHT],
        3: [undone_by.ROTATE_180],
        4: [undone_by.FLIP_TOP_BOTTOM],
        5: [undone_by.TRANSPOSE],
        6: [undone_by.ROTATE_90],
        7: [undone_by.TRANSVERSE],
        8: [undone_by.ROTATE_270],
    }[orientation]
    image = original
    for method in stored:
        image = image.transpose(method)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(image, tmp_path / "x.png", exif=exif)
    assert pixels(path) == np.asarray(original).tolist()


@pytest.mark.parametrize("name", ["x.gif", "x.png", "x.webp", "x.tif"])
def test_first_frame_of_several(name, tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, BLUE)]
    options = {"lossless": True} if name == "x.webp" else {}
    path = save(frames[0], tmp_path / name, save_all=True, append_images=frames[1:], **options)
    assert read_image(path).getpixel((4, 4)) == RED


def test_content_decides_the_format(tmp_path):
    save(Image.new("RGB", (1, 1), RED), tmp_path / "x.png")
    (tmp_path / "x.png").rename(tmp_path / "x.jpg")
    assert pixels(tmp_path / "x.jpg") == [[list(RED)]]


def bytes_of(image, kind):
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        pytest.param(b"", "the file is empty", id="empty"),
        pytest.param(b"hello", "not an image", id="text"),
        pytest.param(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an", id="EPS"),
        pytest.param(bytes_of(NOISE, "JPEG")[:1500], "truncated", id="cut-JPEG"),
        pytest.param(bytes_of(NOISE, "PNG")[:1500], "truncated", id="cut-PNG"),
        pytest.param(bytes_of(NOISE, "TIFF")[:1500], ".", id="cut-TIFF"),
        pytest.param(bytes_of(NOISE, "GIF")[:1500], ".", id="cut-GIF"),
        pytest.param(bytes_of(NOISE, "WEBP")[:1500], ".", id="cut-WEBP"),
        pytest.param(
            bytes_of(NOISE, "PNG").replace(b"IDAT", b"IDAX"), ".", id="PNG-without-its-data"
        ),
    ],
)
def test_unreadable(content, reason, tmp_path):
    path = tmp_path / "x.jpg"
    path.write_bytes(content)
    with pytest.raises(ImageReadError, match=reason) as error:
        read_image(path)
    assert error.value.path == path
    assert error.value.reason
    assert str(error.value) == f"{path}: {error.value.reason}"


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(ImageReadError, match="No such file"):
        read_image(tmp_path / "x.png")
    with pytest.raises(ImageReadError, match="s a directory"):
        read_image(tmp_path)


def test_too_large_is_refused_before_decoding(tmp_path, monkeypatch):
    path = save(Image.new("1", (100, 100)), tmp_path / "x.png")
    assert read_image(path, max_pixels=10_000).size == (100, 100)
    monkeypatch.setattr(Image.Image, "load", lambda *args: pytest.fail("decoded"))
    with pytest.raises(ImageReadError, match=r"100 x 100 pixels .* 9999 allowed"):
        read_image(path, max_pixels=9_999)


def test_decompression_bomb(tmp_path):
    path = tmp_path / "x.pgm"
    path.write_bytes(b"P5 20000 20000 255\n")
    limit = Image.MAX_IMAGE_PIXELS
    with pytest.raises(ImageReadError, match="400000000 pixels"):
        read_image(path)
    assert limit == Image.MAX_IMAGE_PIXELS


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """The current folder: images at three depths, and what is no image."""
    monkeypatch.chdir(tmp_path)
    for name in ("b.png", "sub/a.JPG", "sub/deep/c.webp", "notes.txt", ".hidden.png", ".git/d.png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return tmp_path


@pytest.mark.parametrize(
    ("args", "found"),
    [
        (["b.png"], ["b.png"]),
        (["."], ["b.png", "sub/a.JPG", "sub/deep/c.webp"]),
        (["sub"], ["sub/a.JPG", "sub/deep/c.webp"]),
        (["notes.txt"], ["notes.txt"]),
        (["sub", "b.png", "./b.png", "sub/a.JPG"], ["b.png", "sub/a.JPG", "sub/deep/c.webp"]),
        (["*.png"], ["b.png"]),
        (["*.txt"], ["notes.txt"]),
        (["s*b"], ["sub/a.JPG", "sub/deep/c.webp"]),
        (["**/*.webp"], ["sub/deep/c.webp"]),
        (["sub/*"], ["sub/a.JPG", "sub/deep/c.webp"]),
    ],
    ids=" ".join,
)
def test_find(args, found, tree):
    assert [str(path) for path in find_images(args)] == found


def test_absolute_and_relative_are_the_same(tree):
    assert len(find_images(["b.png", str(tree / "b.png")])) == 1


def test_file_named_like_a_pattern(tree):
    (tree / "x[1].png").write_bytes(b"")
    assert [path.name for path in find_images(["x[1].png"])] == ["x[1].png"]


def test_list_on_standard_input(tree, monkeypatch):
    lines = io.BytesIO(b"sub/a.JPG\r\n\nmissing*.png\nb.png\ncaf\xe9.png")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(lines))
    names = [b"b.png", b"caf\xe9.png", b"missing*.png", b"sub/a.JPG"]
    assert [os.fsencode(path) for path in find_images(["-"])] == names


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["no.png"], "no such file or folder.*'no.png'.*give files"),
        (["*.gif"], "matches it as a pattern.*'.*gif'"),
        (["empty"], r"no image in 'empty'.*\.png.*name the files"),
        (["b.png", "empty"], "no image in 'empty'"),
        (["em*"], "no image in 'em"),
        ([], "no images given"),
    ],
)
def test_nothing_found(args, message, tree):
    (tree / "empty").mkdir()
    (tree / "empty" / "notes.txt").write_bytes(b"")
    with pytest.raises(ValueError, match=message):
        find_images(args)


def test_printable_name_that_is_not_utf_8():
    assert printable(os.fsdecode(b"caf\xe9.png")) == "caf\N{REPLACEMENT CHARACTER}.png"


@pytest.mark.parametrize("count", [1, 2, 7])
def test_contact_sheet(count, tmp_path):
    path = save(Image.new("RGB", (40, 20), RED), tmp_path / "red.png")
    classes = [("a label too long for its place in the card" * 3, 1.0), ("cat", 0.0)]
    entries = [SheetEntry(path, classes) for _ in range(count - 1)]
    entries.append(SheetEntry(tmp_path / "missing.png", error="No such file or directory"))
    sheet = contact_sheet(entries)
    assert sheet.mode == "RGB"
    colours = {colour for _, colour in sheet.getcolors(2**16)}
    assert (RED in colours) == (count > 1)
    # Cards of about 290 x 350 pixels with the margin.
    assert sheet.width * sheet.height == pytest.approx(count * 110_000, rel=0.4)
