"""Image files without what is not needed for their pixels, and which Pillow may refuse a whole image for."""

import struct
import zlib

_PNG, _JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"
_START_OF_SCAN, _COMMENT = 0xDA, 0xFE
_WITHOUT_LENGTH = {0x01, *range(0xD0, 0xD8)}


def without_metadata(data: bytes) -> bytes | None:
    """A PNG or JPEG file with its pixels, colours and orientation alone; None for what is neither.

    What is broken or cut off in the pixels stays so.
    """
    if data.startswith(_PNG):
        return _bare_png(data)
    if data.startswith(_JPEG):
        return _bare_jpeg(data)
    return None


def _bare_png(data: bytes) -> bytes:
    parts, start = [_PNG], len(_PNG)
    while len(data) >= start + 12:
        length, kind = struct.unpack_from(">I4s", data, start)
        end = start + length + 12
        chunk = data[start:end]
        critical = not kind[0] & 0x20
        if critical or (kind == b"eXIf" and zlib.crc32(chunk[4:-4]).to_bytes(4, "big") == chunk[-4:]):
            parts.append(chunk)
        start = end
    return b"".join(parts)


def _bare_jpeg(data: bytes) -> bytes | None:
    parts, start = [data[:2]], 2
    while len(data) >= start + 4 and data[start] == 0xFF:
        marker = data[start + 1]
        if marker == _START_OF_SCAN:
            return b"".join([*parts, data[start:]])
        if marker == 0xFF:  # Filling.
            start += 1
            continue
        end = start + 2 if marker in _WITHOUT_LENGTH else start + 2 + int.from_bytes(data[start + 2 : start + 4], "big")
        if _is_needed(marker, data[start + 4 : end]):
            parts.append(data[start:end])
        start = end
    return None


def _is_needed(marker: int, body: bytes) -> bool:
    if marker == 0xE0:
        return body.startswith(b"JFIF\0") and len(body) >= 14
    if marker == 0xE1:
        return body.startswith(b"Exif\0\0")
    if marker == 0xEE:  # Says which colours the planes hold.
        return body.startswith(b"Adobe") and len(body) >= 12
    return not (0xE0 <= marker <= 0xEF or marker == _COMMENT)
