"""Colour spaces: converts an image from the colour space of its ICC profile to sRGB, and holds the sRGB profile of encoded files.

Does not know files. A profile is untrusted: LittleCMS gets only the tags that are needed here and whose size bounds their cost.
"""

from __future__ import annotations

import io
import struct

from PIL import Image, ImageChops, ImageCms

_HEADER_BYTES, _ENTRY_BYTES = 128, 12
_MAX_TAGS = 100  # as in LittleCMS
_CLASSES = (b"mntr", b"scnr", b"prtr", b"spac")  # of devices and colour spaces; other classes do not describe images
_MODES = {b"RGB ": "RGB", b"GRAY": "L", b"CMYK": "CMYK"}
# ICC.1:2022, 9.2. Excludes D2Bx, whose elements can be listed a million times, and tags that convert to the device.
_TAGS = (b"A2B0", b"rXYZ", b"gXYZ", b"bXYZ", b"rTRC", b"gTRC", b"bTRC", b"kTRC", b"wtpt", b"chad")
_MAX_LEVELS_OF_ROUNDING = 1


def _srgb_profile() -> bytes:
    """LittleCMS's own, without its creation time: the same image always gives the same file."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    made_at = slice(24, 36)
    return profile[: made_at.start] + struct.pack(">6H", 2000, 1, 1, 0, 0, 0) + profile[made_at.stop :]


SRGB_PROFILE = _srgb_profile()  # 588 bytes


def to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Convert L, LA, RGB, RGBA or CMYK from `profile` to sRGB. `image` may be changed in place.

    Keeps alpha. Changes nothing if there is no profile, or if it cannot be read, is for another mode, or is sRGB.
    """
    if profile is None:
        return image
    try:
        mode = _mode_of(profile)
        if mode == "RGB" and image.mode in ("L", "LA"):  # a grey photograph keeps its camera's profile
            image = image.convert("RGBA" if image.mode == "LA" else "RGB")
        if mode != image.mode.removesuffix("A"):
            return image
        source = ImageCms.ImageCmsProfile(io.BytesIO(_with_needed_tags(profile)))
        return _converted(image, source)
    except _UNREADABLE:
        return image


# Errors that Pillow raises for a profile that LittleCMS cannot use, and errors of unpacking a profile.
_UNREADABLE = (OSError, ValueError, TypeError, LookupError, struct.error, ImageCms.PyCMSError)


def _mode_of(profile: bytes) -> str | None:
    """The mode, without alpha, of the images that the profile describes."""
    kind, space = profile[12:16], profile[16:20]
    return _MODES.get(space) if kind in _CLASSES else None


def _with_needed_tags(profile: bytes) -> bytes:
    """The profile with a shorter tag table; the data of other tags stays and is not read. Raises ValueError if the profile is cut short."""
    (count,) = struct.unpack_from(">I", profile, _HEADER_BYTES)
    start, end = _HEADER_BYTES + 4, _HEADER_BYTES + 4 + count * _ENTRY_BYTES
    if count > _MAX_TAGS or end > len(profile):
        raise ValueError("the tag table is too long")
    entries = [profile[at : at + _ENTRY_BYTES] for at in range(start, end, _ENTRY_BYTES)]
    needed = {entry[:4]: entry for entry in entries if entry[:4] in _TAGS}
    table = b"".join(needed.values())
    return profile[:_HEADER_BYTES] + struct.pack(">I", len(needed)) + table.ljust(end - start, b"\0") + profile[end:]


def _converted(image: Image.Image, source: ImageCms.ImageCmsProfile) -> Image.Image:
    if image.mode in ("L", "LA", "CMYK"):
        colours = image.getchannel("L") if image.mode == "LA" else image
        converted = _transform(source, colours.mode).apply(colours)
        if image.mode == "LA":
            converted.putalpha(image.getchannel("A"))
        return converted
    transform = _transform(source, image.mode)
    # A conversion from sRGB to sRGB would only round.
    return image if _is_identity(transform) else transform.apply_in_place(image)


def _transform(source: ImageCms.ImageCmsProfile, mode: str) -> ImageCms.ImageCmsTransform:
    """Uses the perceptual intent, as browsers do."""
    target = ImageCms.ImageCmsProfile(io.BytesIO(SRGB_PROFILE))
    return ImageCms.ImageCmsTransform(source, target, mode, "RGBA" if mode == "RGBA" else "RGB")


def _is_identity(transform: ImageCms.ImageCmsTransform) -> bool:
    """Whether no colour of a probe (all 4,096 colours of every 17th level, greys included) changes by more than one level."""
    levels = bytes(range(0, 256, 17))
    colours = bytes(level for red in levels for green in levels for blue in levels for level in (red, green, blue))
    probe = Image.frombytes("RGB", (64, 64), colours).convert(transform.input_mode)
    difference = ImageChops.difference(probe, transform.apply(probe)).convert("RGB")
    return difference.point([int(level > _MAX_LEVELS_OF_ROUNDING) for level in range(256)] * 3).getbbox() is None
