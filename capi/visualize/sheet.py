"""A sheet of pictures: a title, what is seen, and groups of panels with captions, pixel by pixel."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from numpy import ndarray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

_MARGIN, _GAP, _BETWEEN_GROUPS, _LINE = 20, 6, 22, 19
_WIDEST, _PAGE = 1900, 1.6  # Pixels; width to height.
_SMALLEST_SIDE = 200
_BLACK, _GREY = (20, 20, 20), (95, 95, 95)


@dataclass
class Panel:
    """A picture of a sheet and the words over it, which may take more lines than one."""

    pixels: UInt8[ndarray, "height width 3"]
    caption: str = ""


def enlargement(picture: UInt8[Tensor, "3 height width"]) -> int:
    """How many pixels of a sheet a pixel of the picture takes: 1, or as many as make a small one plain to see."""
    return max(1, round(_SMALLEST_SIDE / max(picture.shape[1:])))


def shown(picture: UInt8[Tensor, "3 height width"]) -> UInt8[ndarray, "shown_height shown_width 3"]:
    """The picture as large as a sheet shows it."""
    times = enlargement(picture)
    return picture.permute(1, 2, 0).repeat_interleave(times, 0).repeat_interleave(times, 1).numpy()


def bytes_of(colours: Float[Tensor, "height width 3"]) -> UInt8[ndarray, "height width 3"]:
    """Of colours from 0 to 1; what lies outside is clipped."""
    return (colours.clamp(0, 1) * 255).round().to(torch.uint8).numpy()


def sheet(title: str, note: str, *sections: Sequence[Sequence[Panel]]) -> Image.Image:
    """The groups of a section from left to right and line by line; the panels of a group stay side by side."""
    lines = [line for groups in sections for line in _flowed([_row(group) for group in groups])]
    width = max(max(sum(block.width for block in line) + _BETWEEN_GROUPS * (len(line) - 1) for line in lines), 640)
    heading = _wrapped(title, _font(20, bold=True), width)
    words = _wrapped(note, _font(14), width)
    top = _MARGIN + 27 * len(heading) + _LINE * len(words) + 12
    heights = [max(block.height for block in line) for line in lines]
    height = top + sum(heights) + _BETWEEN_GROUPS * (len(lines) - 1) + _MARGIN
    image = Image.new("RGB", (width + 2 * _MARGIN, height), "white")
    draw = ImageDraw.Draw(image)
    for i, text in enumerate(heading):
        draw.text((_MARGIN, _MARGIN + 27 * i), text, fill=_BLACK, font=_font(20, bold=True))
    for i, text in enumerate(words):
        draw.text((_MARGIN, _MARGIN + 27 * len(heading) + _LINE * i), text, fill=_GREY, font=_font(14))
    for line, line_height in zip(lines, heights, strict=True):
        left = _MARGIN
        for block in line:
            image.paste(block, (left, top))
            left += block.width + _BETWEEN_GROUPS
        top += line_height + _BETWEEN_GROUPS
    return image


def _row(panels: Sequence[Panel]) -> Image.Image:
    font = _font(13)
    captions = [_wrapped(panel.caption, font, panel.pixels.shape[1]) for panel in panels]
    over = _LINE * max(map(len, captions))
    width = sum(panel.pixels.shape[1] for panel in panels) + _GAP * (len(panels) - 1)
    image = Image.new("RGB", (width, over + max(panel.pixels.shape[0] for panel in panels)), "white")
    draw = ImageDraw.Draw(image)
    left = 0
    for panel, lines in zip(panels, captions, strict=True):
        for i, text in enumerate(lines):
            draw.text((left, over - _LINE * (len(lines) - i)), text, fill=_BLACK, font=font)
        image.paste(Image.fromarray(np.ascontiguousarray(panel.pixels)), (left, over))
        left += panel.pixels.shape[1] + _GAP
    return image


def _flowed(blocks: Sequence[Image.Image]) -> list[list[Image.Image]]:
    """In lines of as many blocks as make a page with few gaps, fewer where they are too wide."""

    def lines_of(most: int) -> list[list[Image.Image]]:
        lines: list[list[Image.Image]] = [[]]
        free = _WIDEST
        for block in blocks:
            if lines[-1] and (block.width > free or len(lines[-1]) == most):
                lines.append([])
                free = _WIDEST
            lines[-1].append(block)
            free -= block.width + _BETWEEN_GROUPS
        return lines

    def unlike_a_page(lines: list[list[Image.Image]]) -> float:
        width = max(sum(block.width + _BETWEEN_GROUPS for block in line) for line in lines)
        height = sum(max(block.height for block in line) + _BETWEEN_GROUPS for line in lines)
        places = len(lines) * max(map(len, lines))
        return abs(math.log(width / height / _PAGE)) + 2 * (places - len(blocks)) / places

    return min((lines_of(n + 1) for n in range(len(blocks))), key=unlike_a_page)


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Lines of at most this width in pixels; a word that is wider is cut, with dots in its middle."""
    lines: list[str] = []
    for word in text.split():
        while font.getlength(word) > width and len(word) > 3:
            half = (len(word) - 2) // 2
            word = f"{word[:half]}…{word[-half:]}"
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


@cache
def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """The typeface that comes with matplotlib: the same on every machine."""
    import matplotlib as mpl

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(mpl.get_data_path()) / "fonts" / "ttf" / name, size)


def framed(pixels: UInt8[ndarray, "height width 3"], side: int, part: float) -> UInt8[ndarray, "side side 3"]:
    """The pixels as a square of `side`, with a frame around the middle `part` of it."""
    image = Image.fromarray(np.ascontiguousarray(pixels)).resize((side, side), Image.Resampling.BICUBIC)
    low, high = round(side * (1 - part) / 2), round(side * (1 + part) / 2)
    draw = ImageDraw.Draw(image)
    draw.rectangle((low - 2, low - 2, high + 1, high + 1), outline="black")
    draw.rectangle((low - 1, low - 1, high, high), outline="white")
    return np.asarray(image)
