"""How much memory a projector computes in while it looks at an image: by the biggest that it takes.

llama.cpp makes room for a middling image while it loads, and for a bigger one when it comes. How big that may
be stands in the header of some projectors and in tools/mtmd/clip.cpp for the others.
"""

from __future__ import annotations

from sollold.facts import dataclass
from sollold.models.gguf.header import Header

_AUDIO_PLACES = 1500
"""Places of half a minute of sound, which is what encoders look at together."""
_WINDOWED = ("n_wa_pattern", "wa_layer_indexes", "wa_pattern_mode")
"""Keys of projectors with windows in their attention: they have a mask of every place for every other."""


@dataclass(frozen=True, slots=True)
class VisionLimits:
    """What clip.cpp says of a kind of projector that uses flash attention.

    Attributes:
        tokens: that the biggest image becomes; 0: images are made as large as the header says.
        merge: so many places each way become one token, where the header does not say.
        images: looked at together.
    """

    tokens: int = 0
    merge: int = 2
    images: int = 1


VISION_LIMITS = {
    "dots_ocr": VisionLimits(),
    "dots3note_v": VisionLimits(),
    "exaone4_5": VisionLimits(),
    "gemma3": VisionLimits(),
    "gemma4uv": VisionLimits(1120, 3),
    "gemma4v": VisionLimits(1120, 3),
    "glm4v": VisionLimits(4096),
    "glm5v": VisionLimits(),
    "hunyuanvl": VisionLimits(16384),
    "idefics3": VisionLimits(),
    "internvl": VisionLimits(images=4),
    "janus_pro": VisionLimits(),
    "kimik25": VisionLimits(4096),
    "kimivl": VisionLimits(1024),
    "lfm2": VisionLimits(256),
    "lightonocr": VisionLimits(),
    "ling3vl": VisionLimits(4096),
    "mimovl": VisionLimits(),
    "minimax_m3": VisionLimits(576),
    "muse-glimmer": VisionLimits(4096),
    "paddleocr": VisionLimits(),
    "phi4": VisionLimits(),
    "pixtral": VisionLimits(1024, 1),
    "qwen2.5o": VisionLimits(4096),
    "qwen2.5vl_merger": VisionLimits(4096),
    "qwen2vl_merger": VisionLimits(4096),
    "qwen3vl_merger": VisionLimits(4096),
}
"""By ``clip.projector_type``. Of others, whose images are all of one size, attention's scores are taken to be
written out."""


def seen(header: Header) -> int:
    """Bytes needed to look at one image and to hear half a minute, by the projector's header."""
    return _looking(header) + _hearing(header)


def _looking(header: Header) -> int:
    if header.integer("clip.vision.embedding_length") <= 0:
        return 0
    side = header.integer("clip.vision.image_size")
    patch = max(header.integer("clip.vision.patch_size"), 1)
    kind = header.text("clip.vision.projector_type") or header.text("clip.projector_type")
    pixels = header.integer("clip.vision.image_max_pixels")
    limits = VISION_LIMITS.get(kind, VisionLimits() if pixels > 0 else None)
    if pixels <= 0:
        pixels = side * side
        if limits is not None and limits.tokens:
            merge = header.integer("clip.vision.spatial_merge_size") or header.integer(
                "clip.vision.projector.scale_factor"
            )
            pixels = limits.tokens * ((merge if merge > 0 else limits.merge) * patch) ** 2
    places = pixels // patch**2 + 1
    one = _states(header, "vision", places) + 4 * 3 * pixels
    if limits is None:
        return one + _scores(header, "vision", places)
    windowed = any(f"clip.vision.{key}" in header.metadata for key in _WINDOWED)
    # A mask as it is given, and once more in half as many bytes.
    mask = 6 * places * places * windowed
    return limits.images * one + mask


def _hearing(header: Header) -> int:
    if header.integer("clip.audio.embedding_length") <= 0:
        return 0
    return _states(header, "audio", _AUDIO_PLACES) + _scores(header, "audio", _AUDIO_PLACES)


def _states(header: Header, part: str, places: int) -> int:
    """Bytes of what an encoder holds of every place at a time."""
    width = header.integer(f"clip.{part}.embedding_length")
    inner = header.integer(f"clip.{part}.feed_forward_length")
    return 4 * places * (6 * width + 2 * inner)


def _scores(header: Header, part: str, places: int) -> int:
    """Bytes of attention's scores where they are written out."""
    return 4 * header.integer(f"clip.{part}.attention.head_count") * places * places
