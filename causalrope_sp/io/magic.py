"""What a file is that holds pictures or a video, by its first bytes."""

from __future__ import annotations

MEDIA_BYTES = 12  # that are looked at

_STARTS = (
    (b"\x89PNG\r\n\x1a\n", "a PNG picture"),
    (b"\xff\xd8\xff", "a JPEG picture"),
    (b"GIF8", "a GIF picture"),
    (b"BM", "a BMP picture"),
    (b"II*\x00", "a TIFF picture"),
    (b"MM\x00*", "a TIFF picture"),
    (b"\x1aE\xdf\xa3", "a Matroska or WebM video"),
    (b"\x00\x00\x01\xba", "an MPEG video"),
    (b"FLV", "an FLV video"),
    (b"CVC", "a video that `causalrope-sp compress` wrote"),
)


def media_of(start: bytes) -> str | None:
    """Names the format of a picture or a video, with its article.

    Args:
        start: the file's first `MEDIA_BYTES` bytes, or all if it has fewer.

    Returns:
        The format; None if it is no picture or video of a known kind.
    """
    kind = start[8:12]
    if start[4:8] == b"ftyp":
        return (
            "an AVIF or HEIF picture" if kind in (b"avif", b"heic", b"mif1", b"avis") else "an MP4 or QuickTime video"
        )
    if start[:4] == b"RIFF":
        return {b"WEBP": "a WebP picture", b"AVI ": "an AVI video"}.get(kind)
    return next((name for begin, name in _STARTS if start.startswith(begin)), None)
