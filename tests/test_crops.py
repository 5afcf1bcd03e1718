"""Exact pixels out of encoded images: boxes, modes, orientation, reduced decoding."""

import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
import torch
from images import PHOTOGRAPH, encoded, gradient
from PIL import Image, ImageOps, JpegImagePlugin

from capi.data.crops import centre_box, crop, random_box, whole

SIZE = 8


def pillow_crop(image: Image.Image, box: tuple, size: int) -> np.ndarray:
    """Crop, then resize: rows first, as Pillow did before it chose the order itself."""
    left, top, width, height = box
    cropped = image.crop((left, top, left + width, top + height))
    narrow = cropped.resize((size, height), Image.Resampling.BICUBIC)
    return np.asarray(narrow.resize((size, size), Image.Resampling.BICUBIC)).astype(int)


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def tiff_of_12_bits(value: int) -> bytes:
    """4 x 4 pixels of one grey value; Pillow does not write such files."""
    pixels = int(f"{value:012b}" * 16, 2).to_bytes(24, "big")
    tags = {256: 4, 257: 4, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: 4, 279: len(pixels)}
    entries = b"".join(struct.pack("<HHIHH", tag, 3, 1, content, 0) for tag, content in tags.items())
    return b"II*\0" + struct.pack("<I", 8 + len(pixels)) + pixels + struct.pack("<H", len(tags)) + entries + bytes(4)


class TestCrop:
    @pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "CMYK", "I;16"])
    @pytest.mark.parametrize("kind", ["photograph", "noise", "small", "large", "flat"])
    def test_matches_pillow(self, kind: str, mode: str):
        rng = np.random.default_rng(0)
        image = Image.open(io.BytesIO(PHOTOGRAPH))
        if kind == "noise":
            image = Image.fromarray(rng.integers(0, 256, (333, 200, 3), dtype=np.uint8))
        elif kind != "photograph":
            image = image.resize({"small": (9, 7), "large": (1500, 1100), "flat": (700, 1)}[kind])
        if mode == "I;16":
            grey = rgb = image.convert("L")
            image = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
        else:
            image = image.convert(mode)
            rgb = image
        data = encoded(image, "TIFF" if mode == "CMYK" else "PNG")
        for size in (224, 98, 16):
            box = random_box(*image.size, (0.1, 1.0), rng)
            actual = crop(data, size, lambda *_, box=box: box)
            difference = np.abs(actual.astype(int) - pillow_crop(rgb.convert("RGB"), box, size))
            # Of two passes each may round otherwise, and the second may add to what the first did. A rounding differs
            # where weights of 16 and of 22 bits matter: 4 taps * 255 levels / 2^16 on both sides of a half, at worst.
            assert difference.max() <= 2
            assert (difference > 0).mean() < 0.03

    def test_jpeg_matches_pillow(self):
        image, box = Image.open(io.BytesIO(PHOTOGRAPH)), (30, 40, 400, 500)
        difference = np.abs(crop(PHOTOGRAPH, 224, lambda *_: box).astype(int) - pillow_crop(image, box, 224))
        assert difference.max() <= 2
        assert (difference > 0).mean() < 0.03

    def test_threads_change_no_bit(self):
        threads = torch.get_num_threads()
        try:
            results = []
            for n in (1, 2, 3):
                torch.set_num_threads(n)
                results.append(crop(PHOTOGRAPH, 224, centre_box))
        finally:
            torch.set_num_threads(threads)
        assert np.array_equal(results[0], results[1]) and np.array_equal(results[0], results[2])

    def test_sees_the_size_and_hands_over_pixels(self):
        pixels = np.asarray(gradient(20, 10))
        sizes = []
        actual = crop(pixels, 5, lambda *size: sizes.append(size) or (2, 3, 5, 5))
        assert sizes == [(20, 10)]
        assert np.array_equal(actual, pixels[3:8, 2:7])

    @pytest.mark.filterwarnings("ignore:Palette images with Transparency")
    @pytest.mark.parametrize(
        ("image", "options", "expected"),
        [
            (Image.new("RGB", (9, 9), (10, 20, 30)), {}, (10, 20, 30)),
            (Image.new("RGBA", (9, 9), (10, 20, 30, 5)), {}, (10, 20, 30)),
            (Image.new("L", (9, 9), 77), {}, (77, 77, 77)),
            (Image.new("LA", (9, 9), (77, 5)), {}, (77, 77, 77)),
            (Image.new("1", (9, 9), 1), {}, (255, 255, 255)),
            (Image.new("RGB", (9, 9), (10, 20, 30)).quantize(4), {"transparency": 0}, (10, 20, 30)),
            (Image.new("RGB", (9, 9), (10, 20, 30)).quantize(4), {"transparency": b"\x05\xff"}, (10, 20, 30)),
            (Image.fromarray(np.full((9, 9), 25700, np.uint16)), {}, (100, 100, 100)),
            (Image.fromarray(np.full((9, 9), 65535, np.uint16)), {}, (255, 255, 255)),
            (Image.fromarray(np.full((9, 9), 200, np.uint16)), {}, (1, 1, 1)),
            (Image.fromarray(np.full((9, 9), 25700, np.uint16)), {"file_format": "TIFF"}, (100, 100, 100)),
            (Image.fromarray(np.full((9, 9), 200, np.uint16)), {"file_format": "TIFF"}, (1, 1, 1)),
            (Image.new("YCbCr", (9, 9), (76, 85, 255)), {"file_format": "TIFF"}, (254, 0, 0)),
            (Image.new("LA", (9, 9), (77, 5)).convert("PA"), {"file_format": "TIFF"}, (77, 77, 77)),
            (Image.new("RGB", (9, 9), (10, 20, 30)), {"file_format": "JPEG2000", "irreversible": False}, (10, 20, 30)),
            (Image.new("CMYK", (9, 9), (255, 0, 0, 0)), {"file_format": "TIFF"}, (0, 255, 255)),
            (Image.new("CMYK", (9, 9), (0, 0, 0, 128)), {"file_format": "JPEG", "quality": 100}, (127, 127, 127)),
            (Image.new("L", (9, 9), 77), {"file_format": "JPEG", "quality": 100}, (77, 77, 77)),
            (Image.new("RGB", (9, 9), (50, 50, 50)), {"file_format": "WEBP", "lossless": True}, (50, 50, 50)),
            (Image.new("P", (9, 9), 0), {"file_format": "GIF"}, (0, 0, 0)),
        ],
    )
    def test_every_mode_becomes_rgb(self, image: Image.Image, options: dict, expected: tuple):
        actual = crop(encoded(image, **options), 4, centre_box)
        assert actual.shape == (4, 4, 3)
        assert actual.dtype == np.uint8
        assert np.array_equal(actual, np.broadcast_to(np.array(expected), (4, 4, 3)))

    @pytest.mark.parametrize(("value", "expected"), [(4095, 255), (2048, 128), (0, 0)])
    def test_12_bits_of_a_tiff(self, value: int, expected: int):
        assert np.array_equal(crop(tiff_of_12_bits(value), 4, centre_box), np.full((4, 4, 3), expected))

    def test_lab(self):
        colour = crop(encoded(Image.new("LAB", (9, 9), (136, 209, 195)), "TIFF"), 4, centre_box)
        # L* 53.3, a* 81, b* 67 is a red; what is left is of the 8 bits of each and of the white point.
        assert np.abs(colour.astype(int) - [255, 0, 0]).max() <= 12

    def test_premultiplied_grey(self):
        # Pillow does not write this mode: two samples a pixel, of which the second is alpha of the first.
        data = encoded(Image.new("LA", (9, 9), (50, 85)), "TIFF")
        unassociated, associated = (struct.pack("<HHIHH", 338, 3, 1, kind, 0) for kind in (2, 1))
        assert data.count(unassociated) == 1
        pixel = crop(data.replace(unassociated, associated), 4, centre_box)[0, 0]
        assert np.array_equal(pixel, [150, 150, 150])

    def test_16_bits_of_a_portable_map(self):
        data = b"P5 2 2 1000 " + struct.pack(">4H", *[500] * 4)
        assert np.array_equal(crop(data, 4, centre_box), np.full((4, 4, 3), 128))

    @pytest.mark.parametrize(
        ("mode", "pixels"),
        [
            ("F: floats of 32 bits from 0 to 1", np.eye(9, dtype=np.float32)),
            ("F: floats of 32 bits from 0 to 65535", np.eye(9, dtype=np.float32) * 65535),
            ("I: integers of 32 bits from 0 to 255", np.eye(9, dtype=np.int32) * 255),
            (r"I: integers of 32 bits from -7 to 0", np.eye(9, dtype=np.int32) * -7),
        ],
    )
    def test_unknown_range_is_refused_by_name(self, mode: str, pixels: np.ndarray):
        data = encoded(Image.fromarray(pixels), "TIFF")
        with pytest.raises(ValueError, match=rf"expected pixels of 8 or 16 bits, got mode {mode}, of which"):
            crop(data, 4, centre_box)

    @pytest.mark.parametrize("file_format", ["PNG", "JPEG", "TIFF"])
    @pytest.mark.parametrize(
        ("orientation", "as_stored"),
        [
            (1, lambda upright: upright),
            (2, lambda upright: upright[:, ::-1]),
            (3, lambda upright: upright[::-1, ::-1]),
            (4, lambda upright: upright[::-1]),
            (5, lambda upright: upright.swapaxes(0, 1)),
            (6, lambda upright: np.rot90(upright, 1)),
            (7, lambda upright: upright[::-1, ::-1].swapaxes(0, 1)),
            (8, lambda upright: np.rot90(upright, -1)),
        ],
    )
    def test_exif_orientation(self, orientation: int, as_stored: Callable, file_format: str):
        upright = np.asarray(gradient(48, 32))
        exif = Image.Exif()
        exif[0x0112] = orientation
        options = {"quality": 100, "subsampling": 0} if file_format == "JPEG" else {}
        data = encoded(Image.fromarray(np.ascontiguousarray(as_stored(upright))), file_format, exif=exif, **options)
        actual = crop(data, 16, centre_box).astype(int)
        expected = np.asarray(Image.fromarray(upright[:, 8:40]).resize((16, 16), Image.Resampling.BICUBIC))
        # One level of rounding for the order of the two passes, two more for JPEG's own at quality 100.
        assert np.abs(actual - expected).max() <= (3 if file_format == "JPEG" else 1)

    @pytest.mark.parametrize(("side", "reductions"), [(31, [1]), (32, [2]), (63, [2]), (64, [4]), (200, [8])])
    def test_large_jpeg_is_decoded_small_but_lands_alike(self, monkeypatch, side: int, reductions: list[int]):
        asked = []
        draft = JpegImagePlugin.JpegImageFile.draft

        def recorded(image, mode, size):
            asked.append(round(image.width / size[0]))
            return draft(image, mode, size)

        monkeypatch.setattr(JpegImagePlugin.JpegImageFile, "draft", recorded)
        image = gradient(331, 273)
        box = (61, 47, side, side)
        actual = crop(encoded(image, "JPEG", quality=100, subsampling=0), SIZE, lambda *_: box).astype(int)
        expected = image.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=(61, 47, 61 + side, 47 + side))
        assert asked == reductions
        # A pixel of the source is 255 / 331 levels: a box that is off by more than 3 pixels shows.
        assert np.abs(actual - np.asarray(expected))[..., :2].max() <= 3

    def test_boxes_of_large_jpegs_are_moved_without_bias(self):
        image, rng = gradient(900, 700), np.random.default_rng(0)
        data = encoded(image, "JPEG", quality=100, subsampling=0)
        differences = []
        for _ in range(40):
            box = random_box(900, 700, (0.2, 1.0), rng)
            expected = pillow_crop(image, box, SIZE)
            differences.append((crop(data, SIZE, lambda *_, box=box: box).astype(int) - expected)[..., :2])
        # Eight pixels are decoded as one: rounding moves an edge by up to 4 pixels of 255 / 900 levels.
        assert np.abs(differences).max() <= 3
        assert np.abs(np.mean(differences, axis=(0, 1, 2))).max() < 0.25

    @pytest.mark.parametrize("file_format", ["JPEG", "PNG"])
    def test_truncated_file_raises(self, file_format: str):
        data = encoded(Image.open(io.BytesIO(PHOTOGRAPH)), file_format)
        with pytest.raises(OSError, match="truncated"):
            crop(data[: len(data) * 2 // 3], SIZE, centre_box)


BOMB = zlib.compress(bytes(2**21))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data", "ignore:Image appears to be a malformed MPO")
class TestMetadata:
    """What is wrong beside the pixels of an image does not make it unreadable."""

    def image(self, file_format: str, **options) -> bytes:
        exif = Image.Exif()
        exif[0x0112] = 3
        return encoded(gradient(12, 10), file_format, **{"exif": exif, **options})

    @pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP"])
    def test_broken_exif(self, file_format: str):
        broken = self.image(file_format, exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xffjunk")
        plain = encoded(gradient(12, 10), file_format)
        assert np.array_equal(crop(broken, SIZE, centre_box), crop(plain, SIZE, centre_box))

    @pytest.mark.parametrize("place", ["before the pixels", "after the pixels", "after the pixels, cut off"])
    @pytest.mark.parametrize(
        "chunk",
        [
            png_chunk(b"zTXt", b"key\0\0" + BOMB),
            png_chunk(b"iTXt", b"key\0\1\0\0\0" + BOMB),
            png_chunk(b"iCCP", b"profile\0\0" + BOMB),
            png_chunk(b"iCCP", b"p\0\7unknown method"),
            png_chunk(b"iCCP", b"p\0\0no profile"),
            png_chunk(b"pHYs", b"\0"),
            png_chunk(b"acTL", b"\0"),
            png_chunk(b"tRNS", b"\0"),
            png_chunk(b"tEXt", b"key\0value")[:-1] + b"?",  # Its check sum is another.
            png_chunk(b"tEXt", b"key\0" + bytes(2**26 + 1)),
            png_chunk(b"a?1!", b"no such chunk"),
        ],
        ids=lambda chunk: f"{chunk[4:8]}{len(chunk)}",
    )
    def test_png_chunks(self, chunk: bytes, place: str):
        data = self.image("PNG")
        split = 33 if place.startswith("before") else -12
        added = data[:split] + chunk + ("cut off" not in place) * data[split:]
        added = added[: -len(chunk) // 2] if "cut off" in place else added
        assert np.array_equal(crop(added, SIZE, centre_box), crop(data, SIZE, centre_box))

    @pytest.mark.parametrize(
        ("marker", "body"),
        [
            (0xE0, b"JFIF"),
            (0xE2, b"ICC_PROFILE\0"),
            (0xEE, b"Adobe"),
            (0xED, b"Photoshop 3.0\x008BIM\x04\x04"),
            (0xE2, b"MPF\0?"),
        ],
    )
    def test_jpeg_segments(self, marker: int, body: bytes):
        data = self.image("JPEG", quality=95)
        segment = bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body
        assert np.array_equal(crop(data[:2] + segment + data[2:], SIZE, centre_box), crop(data, SIZE, centre_box))

    def test_jpeg_keeps_what_its_colours_mean(self):
        data = encoded(Image.new("RGB", (9, 9), (200, 50, 100)), "JPEG", quality=100, keep_rgb=True)
        # Without the letters, Adobe's segment alone says that the planes are not luma and chroma.
        for letters in (b"R\x11\0G\x11\0B\x11\0", b"\3R\0G\0B\0"):
            assert data.count(letters) == 1
            data = data.replace(letters, letters.translate(bytes.maketrans(b"RGB", b"\1\2\3")))
        broken = data[:2] + b"\xff\xe2\x00\x0eICC_PROFILE\0" + data[2:]
        assert np.abs(crop(broken, 4, centre_box).astype(int) - [200, 50, 100]).max() <= 1

    @pytest.mark.parametrize("file_format", ["PNG", "JPEG"])
    def test_pixels_that_are_cut_off_or_broken_stay_unreadable(self, file_format: str):
        data = encoded(Image.open(io.BytesIO(PHOTOGRAPH)).resize((60, 70)), file_format)
        bad = png_chunk(b"zTXt", b"k\0\0" + BOMB) if file_format == "PNG" else b"\xff\xe0\x00\x06JFIF"
        at = 33 if file_format == "PNG" else 2
        broken = data[:at] + bad + data[at : len(data) * 2 // 3]
        with pytest.raises(OSError, match="truncated"):
            crop(broken, SIZE, centre_box)

    def test_what_is_no_image_is_refused_as_before(self):
        for data in (b"", b"text", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"\xff\xd8\xff\xe0\x00"):
            with pytest.raises(OSError, match="cannot identify image file"):
                crop(data, SIZE, centre_box)


class TestRandomBox:
    SCALE = (0.3, 0.9)

    def boxes(self, width: int, height: int, n: int = 4000) -> np.ndarray:
        rng = np.random.default_rng(0)
        return np.array([random_box(width, height, self.SCALE, rng) for _ in range(n)])

    def test_lies_inside_with_area_and_aspect_in_range(self):
        left, top, width, height = self.boxes(500, 375).T
        assert (left >= 0).all() and (left + width <= 500).all()
        assert (top >= 0).all() and (top + height <= 375).all()
        # Sides are rounded by up to half a pixel, so area by up to (width + height) / 2 + 1.
        slack = (width + height) / 2 + 1
        assert (width * height >= self.SCALE[0] * 500 * 375 - slack).all()
        assert (width * height <= self.SCALE[1] * 500 * 375 + slack).all()
        assert (width + 0.5 >= 3 / 4 * (height - 0.5)).all()
        assert (width - 0.5 <= 4 / 3 * (height + 0.5)).all()

    def test_distribution(self):
        # At up to 0.9 * 3/4 of the area every draw fits into a square: both laws are then the uniform ones.
        rng, n = np.random.default_rng(0), 4000
        left, top, width, height = np.array([random_box(2000, 2000, (0.3, 0.75), rng) for _ in range(n)]).T
        uniforms = [
            (width * height / 2000**2 - 0.3) / 0.45,
            np.log(width / height) / (2 * np.log(4 / 3)) + 0.5,
            (left + 0.5) / (2000 - width + 1),
            (top + 0.5) / (2000 - height + 1),
        ]
        for values in uniforms:
            # Kolmogorov-Smirnov: 1.95 / sqrt(n) is exceeded once in a thousand.
            distance = np.abs(np.sort(values) - (np.arange(n) + 0.5) / n).max()
            assert distance < 1.95 / np.sqrt(n)

    @pytest.mark.parametrize(
        ("size", "expected"),
        [((100, 9), (44, 0, 12, 9)), ((9, 100), (0, 44, 9, 12)), ((1, 1), (0, 0, 1, 1)), ((1, 50), (0, 24, 1, 1))],
    )
    def test_falls_back_to_the_centre(self, size: tuple, expected: tuple):
        assert random_box(*size, (0.99, 1.0), np.random.default_rng(0)) == expected


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_whole_image_is_upright_and_of_its_own_size(orientation) -> None:
    image = gradient(37, 21)
    exif = image.getexif()
    exif[0x0112] = orientation
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(encoded(image, exif=exif)))))
    np.testing.assert_array_equal(whole(encoded(image, exif=exif), lambda own: own), upright)


@pytest.mark.parametrize("longer", [1, 10, 300])
def test_the_whole_image_has_the_longer_side_that_is_wanted(longer) -> None:
    photograph = Image.open(io.BytesIO(PHOTOGRAPH))
    shorter = max(1, round(longer * min(photograph.size) / max(photograph.size)))
    assert photograph.width < photograph.height
    pixels = whole(PHOTOGRAPH, lambda own: longer if own == photograph.height else 0)
    assert pixels.shape == (longer, shorter, 3)
    if longer > 1:
        expected = np.asarray(photograph.resize((shorter, longer), Image.Resampling.BICUBIC)).astype(int)
        assert np.abs(pixels - expected).mean() < 2


def test_the_whole_of_sixteen_bits_is_scaled_to_eight() -> None:
    deep = np.linspace(0, 65535, 12 * 20).reshape(12, 20).astype(np.uint16)
    pixels = whole(encoded(Image.fromarray(deep)), lambda own: own)
    np.testing.assert_array_equal(pixels, np.repeat((deep / 257).round().astype(np.uint8)[..., None], 3, axis=2))
