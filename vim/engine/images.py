"""Finding image files, reading them as RGB, and laying them out on a contact sheet."""

import glob
import math
import os
import sys
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError

__all__ = [
    "ImageReadError",
    "SheetEntry",
    "contact_sheet",
    "find_images",
    "printable",
    "read_image",
]

# Raster formats that Pillow decodes itself. Others are left out on purpose: EPS, for one,
# would run Ghostscript on any file that starts like PostScript.
FORMATS = {"AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TGA", "TIFF", "WEBP"}
# Pillow refuses more than this too (2 x Image.MAX_IMAGE_PIXELS).
MAX_PIXELS = 178_956_970


class ImageReadError(ValueError):
    """An image file that cannot be read: `path`, and the `reason` in words."""

    def __init__(self, path: str | os.PathLike[str], reason: str) -> None:
        super().__init__(path, reason)
        self.path = Path(path)
        self.reason = reason

    def __str__(self) -> str:
        return f"{printable(self.path)}: {self.reason}"


def printable(path: str | os.PathLike[str]) -> str:
    """The path as text that any UTF-8 stream accepts, also where its bytes are not UTF-8."""
    return os.fsencode(path).decode("utf-8", "replace")


def find_images(args: Iterable[str], also: Collection[str] = ()) -> list[Path]:
    """Image files named by command-line arguments, sorted and without duplicates.

    A file is taken whatever its extension; a folder gives the image files below it, told by
    extension, hidden ones left out; a glob pattern (`**` goes into subfolders) means the files and
    folders that it matches; `-` reads file names from standard input, one a line. These are taken
    literally: one that does not exist is a failure of reading, not of finding.

    Args:
        args: files, folders, glob patterns or `-`.
        also: extensions, in lower case, of further files that folders are searched for.

    Raises:
        ValueError: an argument names nothing, or nothing but folders without images.
    """
    found: dict[str, Path] = {}
    for arg in args:
        for path in _find(arg, also):
            found.setdefault(os.path.abspath(path), path)
    if not found:
        raise ValueError("no images given: name files, folders, glob patterns, or - for a list")
    return sorted(found.values())


def _find(arg: str, also: Collection[str]) -> list[Path]:
    if arg == "-":
        lines = os.fsdecode(sys.stdin.buffer.read()).split("\n")
        return [Path(line.rstrip("\r")) for line in lines if line.strip()]
    matches = [arg] if os.path.exists(arg) else glob.glob(arg, recursive=True)
    if not matches:
        raise ValueError(
            f"no such file or folder, and no file matches it as a pattern: {printable(arg)!r}; "
            "give files, folders, glob patterns, or - for a list on standard input"
        )
    paths = []
    for match in matches:
        paths += _images_below(match, also) if os.path.isdir(match) else [Path(match)]
    if not paths:
        raise ValueError(
            f"no image in {printable(arg)!r} or below, told by extension "
            f"({' '.join(sorted(_extensions().union(also)))}); name the files if theirs differ"
        )
    return paths


def _extensions() -> set[str]:
    Image.init()
    return {ext for ext, name in Image.registered_extensions().items() if name in FORMATS}


def _images_below(folder: str, also: Collection[str]) -> list[Path]:
    extensions = _extensions().union(also)
    paths = []
    for root, folders, files in os.walk(folder, onerror=_raise):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths += [
            Path(root, name)
            for name in files
            if not name.startswith(".") and Path(name).suffix.lower() in extensions
        ]
    return paths


def _raise(error: OSError) -> None:
    raise error


def read_image(path: str | os.PathLike[str], *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The image in a file as 8-bit RGB, upright, the first frame if there are several.

    The EXIF orientation is applied and transparency is composited on white. 16-bit grey keeps its
    high byte (as Pillow does for 16-bit colour); float grey in [0, 1] is stretched to [0, 255],
    and clipped to [0, 255] otherwise.

    Args:
        path: image file; its content decides the format, not its name.
        max_pixels: larger images are refused on reading the header, before any decoding.

    Raises:
        ImageReadError: the file is missing, empty, broken, truncated, too large or no image.
    """
    try:
        return _read(path, max_pixels)
    except ImageReadError:
        raise
    except UnidentifiedImageError as error:
        empty = os.path.getsize(path) == 0
        allowed = ", ".join(sorted(FORMATS))
        reason = "the file is empty" if empty else f"not an image, or none of {allowed}"
        raise ImageReadError(path, reason) from error
    except OSError as error:
        raise ImageReadError(path, error.strerror or str(error)) from error
    except Exception as error:  # a broken file may lead a decoder to any exception
        raise ImageReadError(path, f"{type(error).__name__}: {error}") from error


def _read(path: str | os.PathLike[str], max_pixels: int) -> Image.Image:
    Image.init()
    with Image.open(path, formats=sorted(FORMATS & Image.OPEN.keys())) as image:
        width, height = image.size
        if width * height > max_pixels:
            size = f"{width} x {height} pixels"
            raise ImageReadError(path, f"{size} are more than the {max_pixels} allowed")
        return to_rgb(ImageOps.exif_transpose(image))


def to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        return _grey_to_rgb(np.asarray(image).astype(np.int32) >> 8)
    if image.mode == "F":
        values = np.nan_to_num(np.asarray(image), posinf=np.inf, neginf=-np.inf)
        unit = values.min() >= 0 and values.max() <= 1
        return _grey_to_rgb(np.rint(values.clip(0, 255) * (255 if unit else 1)))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _grey_to_rgb(values: np.ndarray) -> Image.Image:
    return Image.fromarray(values.clip(0, 255).astype(np.uint8)).convert("RGB")


@dataclass
class SheetEntry:
    """One cell of a contact sheet: an image file and its likeliest classes, or what went wrong.

    `image` is what the cell shows where there is no such file, as of a video's frame.
    """

    path: Path
    classes: Sequence[tuple[str, float]] = field(default_factory=list)
    error: str = ""
    image: Image.Image | None = None


# Contact sheet measures in pixels.
CELL, MARGIN, PAD, ROW, FONT = 240, 24, 12, 24, 14
BACKGROUND, CARD, PANEL, BAR = "#eef0f3", "#ffffff", "#f6f7f9", "#c9dcf7"
TEXT, FAINT, ALERT = "#1b1f24", "#6b7480", "#b3261e"


def contact_sheet(entries: Sequence[SheetEntry]) -> Image.Image:
    """Thumbnails in a grid of cards, each over its file name and bars of class probabilities.

    Args:
        entries: at least one; their images are read here again, one at a time.
    """
    columns = min(len(entries), math.ceil(math.sqrt(len(entries) * 1.5)))
    rows = math.ceil(len(entries) / columns)
    lines = max(1, *(len(entry.classes) for entry in entries))
    card_width, card_height = CELL + 2 * PAD, CELL + 2 * PAD + ROW * (lines + 1) + PAD // 2
    width = MARGIN + columns * (card_width + MARGIN)
    height = MARGIN + rows * (card_height + MARGIN)
    sheet = Image.new("RGB", (width, height), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(FONT)
    for index, entry in enumerate(entries):
        row, column = divmod(index, columns)
        x = MARGIN + column * (card_width + MARGIN)
        y = MARGIN + row * (card_height + MARGIN)
        draw.rounded_rectangle((x, y, x + card_width, y + card_height), 8, CARD)
        _draw_card(sheet, draw, font, entry, x + PAD, y + PAD)
    return sheet


def _draw_card(sheet, draw, font, entry: SheetEntry, x: int, y: int) -> None:
    draw.rectangle((x, y, x + CELL - 1, y + CELL - 1), PANEL)
    try:
        image = read_image(entry.path) if entry.image is None else entry.image
        thumbnail = ImageOps.contain(image, (CELL, CELL))
        offset = (CELL - thumbnail.width) // 2, (CELL - thumbnail.height) // 2
        sheet.paste(thumbnail, (x + offset[0], y + offset[1]))
    except ImageReadError:
        middle = x + CELL // 2, y + CELL // 2
        draw.text(middle, "unreadable", FAINT, font, anchor="mm")
    y += CELL + PAD // 2
    draw.text((x, y + ROW // 2), _fit(printable(entry.path.name), font, CELL), TEXT, font, "lm")
    if entry.error:
        draw.text((x, y + ROW * 3 // 2), _fit(entry.error, font, CELL), ALERT, font, "lm")
    for label, probability in entry.classes:
        y += ROW
        middle = y + ROW // 2
        draw.rectangle((x, y + 2, x + round(probability * (CELL - 1)), y + ROW - 3), BAR)
        percent = f"{probability:.1%}"
        room = CELL - font.getlength(percent) - 16
        draw.text((x + 6, middle), _fit(label, font, room), TEXT, font, "lm")
        draw.text((x + CELL - 4, middle), percent, FAINT, font, "rm")


def _fit(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """The text, cut with an ellipsis where it is wider than `width` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"
