"""Labelled pictures that Debian's packages hold, as folders that `capi.train` and `capi.evaluate` read.

`apt-get install fonts-noto-color-emoji unicode-data openclipart-png wesnoth-1.16-data`; without root, `apt-get
download` and `dpkg -x`.
"""

import hashlib
import re
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFont, features

_HELD_OUT = 0.25
_SIDE = 64  # of the files, in pixels
_MARGIN = 8 / 7  # Evaluations look at the middle 7/8 of a picture.
_BITMAP = 109  # the only size that the font has
_SKIN = range(0x1F3FB, 0x1F400)
_FEWEST = 100  # pictures that a category of clip art must have
_LEFT_OUT = ("special", "unsorted", "shapes")  # The first two are no categories, the third is circles nearly all alike.
_MOST_PIXELS = 20_000_000  # A few are posters, which take minutes.
_LARGEST = 200  # pixels of a side of a unit: a few are several in one file
_KINDS = 4  # that a people must have, and a hundred pictures

Picture = tuple[str, str, str, Image.Image]  # class, kind within it, of which all are trained on or none, name, drawing


def listed(listing: Path) -> Iterator[tuple[str, str]]:
    """Group and text of each emoji of Unicode's emoji-test.txt, without those of another skin."""
    group = ""
    for line in listing.read_text().splitlines():
        if line.startswith("# group: "):
            group = line.removeprefix("# group: ").replace(" & ", "-and-")
        elif found := re.match(r"([0-9A-F ]+?) *; fully-qualified", line):
            codes = [int(code, 16) for code in found[1].split()]
            if not any(code in _SKIN for code in codes):
                yield group, "".join(map(chr, codes))


def emoji(share: Path) -> Iterator[Picture]:
    """Emoji of Noto's colour font (SIL OFL 1.1) by Unicode's nine groups.

    Raises RuntimeError where Pillow cannot compose an emoji of several characters.
    """
    font = share / "fonts" / "truetype" / "noto" / "NotoColorEmoji.ttf"
    if not font.is_file():  # Pillow would not name it.
        raise FileNotFoundError(f"expected the font {font}, got no such file")
    if not features.check("raqm"):
        raise RuntimeError("emoji of several characters need a Pillow with Raqm, got one without")
    typeface = ImageFont.truetype(font, _BITMAP, layout_engine=ImageFont.Layout.RAQM)
    for group, text in listed(share / "unicode" / "emoji" / "emoji-test.txt"):
        drawing = Image.new("RGB", typeface.getbbox(text)[2:], "white")
        ImageDraw.Draw(drawing).text((0, 0), text, font=typeface, embedded_color=True)
        name = "-".join(f"{ord(character):x}" for character in text)
        yield group, name, name, drawing


def clipart(share: Path) -> Iterator[Picture]:
    """The Open Clip Art Library of 2005 (public domain) by its categories of a hundred pictures and more."""
    root = share / "openclipart" / "png"
    for category in sorted(root.iterdir()):
        files = sorted(category.rglob("*.png"))
        if len(files) < _FEWEST or category.name in _LEFT_OUT:
            continue
        for file in files:
            with file.open("rb") as png:
                width, height = struct.unpack(">II", png.read(24)[16:])
            if width * height > _MOST_PIXELS:
                continue
            drawing = _on_white(file)
            # Some are small on a large page.
            drawing = drawing.crop(ImageChops.invert(drawing).getbbox())
            drawing.thumbnail((4 * _SIDE, 4 * _SIDE))
            name = "-".join(file.relative_to(category).with_suffix("").parts)
            yield category.name, name, name, drawing


def units(share: Path) -> Iterator[Picture]:
    """Units of The Battle for Wesnoth (GPL 2, CC BY-SA 4) in all their poses, by their people.

    Those that are tested are of kinds that were never seen: the poses of one are nearly alike.
    """
    roots = sorted((share / "games" / "wesnoth").glob("*/data/core/images/units"))
    if len(roots) != 1:
        raise FileNotFoundError(f"expected one version of Wesnoth's data below {share / 'games'}, got {len(roots)}")
    (root,) = roots
    for people in sorted(path for path in root.iterdir() if path.is_dir()):
        kinds: dict[str, list[Path]] = {}
        for file in sorted(people.rglob("*.png")):
            first, *deeper = file.relative_to(people).with_suffix("").parts
            kinds.setdefault(first if deeper else re.split("[-+]", first)[0], []).append(file)
        if len(kinds) < _KINDS or sum(map(len, kinds.values())) < _FEWEST:
            continue
        for kind, file in ((kind, file) for kind, files in kinds.items() for file in files):
            drawing = _on_white(file)
            if max(drawing.size) <= _LARGEST:
                yield people.name, kind, "-".join(file.relative_to(people).with_suffix("").parts), drawing


def _on_white(file: Path) -> Image.Image:
    with Image.open(file) as opened:
        drawing = opened.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", drawing.size, "white"), drawing).convert("RGB")


SETS: dict[str, Callable[[Path], Iterator[Picture]]] = {"emoji": emoji, "clipart": clipart, "units": units}


def write_pictures(name: str, share: Path, folder: Path) -> None:
    """Writes each distinct picture of a set to `folder`/train/NAME/CLASS or, those of a quarter of each class's kinds
    by chance, /test/NAME/CLASS.

    The same files at every call; nothing where they are there already. Raises OSError where a package is missing.
    """
    if (folder / "test" / name).is_dir():
        return
    kinds: dict[str, dict[str, list[tuple[str, Image.Image]]]] = {}
    known = set()
    for label, kind, title, drawing in SETS[name](share):
        side = round(max(drawing.size) * _MARGIN)
        picture = Image.new("RGB", (side, side), "white")
        picture.paste(drawing, ((side - drawing.width) // 2, (side - drawing.height) // 2))
        picture = picture.resize((_SIDE, _SIDE), Image.Resampling.LANCZOS)
        if (digest := hashlib.sha256(picture.tobytes()).digest()) not in known:
            known.add(digest)
            kinds.setdefault(label, {}).setdefault(kind, []).append((title, picture))
    unfinished = folder / f".{name}.tmp"
    shutil.rmtree(unfinished, ignore_errors=True)
    rng = np.random.default_rng(0)
    for label, of_class in kinds.items():
        for place, pictures in zip(rng.permutation(len(of_class)), of_class.values(), strict=True):
            to = unfinished / ("test" if place < max(1, round(_HELD_OUT * len(of_class))) else "train") / label
            to.mkdir(parents=True, exist_ok=True)
            for title, picture in pictures:
                picture.save(to / f"{title}.png", compress_level=1)  # They are read often.
    for part in ("train", "test"):
        (folder / part).mkdir(exist_ok=True)
        shutil.rmtree(folder / part / name, ignore_errors=True)
        (unfinished / part).rename(folder / part / name)
    unfinished.rmdir()
