"""Computes how much memory a projector needs to process an image, by the largest image it accepts.

llama.cpp reserves memory for a medium image while it loads, and for a larger one when it arrives. The maximum
size is in the header of some projectors, and in tools/mtmd/clip.cpp for the others.
"""

from __future__ import annotations

from sollold.facts import dataclass
from sollold.models.gguf.header import Header

_AUDIO_POSITIONS = 1500
"""Positions in 30 seconds of audio, which encoders process together."""
_WINDOWED = ("n_wa_pattern", "wa_layer_indexes", "wa_pattern_mode")
"""Keys of projectors with windowed attention, which have a mask over all pairs of positions."""


@dataclass(frozen=True, slots=True)
class VisionLimits:
    """What clip.cpp specifies for a kind of projector that uses flash attention.

    Attributes:
        tokens: tokens of the largest image; 0: images are scaled as the header says.
        merge: positions per token in each direction, if the header gives none.
        images: images processed together.
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
"""Limits by ``clip.projector_type``. Other types have images of one size; their attention scores are counted
in full."""


def encoder_bytes(header: Header) -> int:
    """Return the bytes needed to process one image and 30 seconds of audio, by the projector's header."""
    return _vision_bytes(header) + _audio_bytes(header)


def _vision_bytes(header: Header) -> int:
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
    positions = pixels // patch**2 + 1
    image_bytes = _states(header, "vision", positions) + 4 * 3 * pixels
    if limits is None:
        return image_bytes + _scores(header, "vision", positions)
    windowed = any(f"clip.vision.{key}" in header.metadata for key in _WINDOWED)
    # The mask as given, and a copy of it with half as many bytes.
    mask = 6 * positions * positions * windowed
    return limits.images * image_bytes + mask


def _audio_bytes(header: Header) -> int:
    if header.integer("clip.audio.embedding_length") <= 0:
        return 0
    return _states(header, "audio", _AUDIO_POSITIONS) + _scores(header, "audio", _AUDIO_POSITIONS)


def _states(header: Header, part: str, positions: int) -> int:
    """Return the bytes that an encoder holds for all positions at once."""
    width = header.integer(f"clip.{part}.embedding_length")
    inner = header.integer(f"clip.{part}.feed_forward_length")
    return 4 * positions * (6 * width + 2 * inner)


def _scores(header: Header, part: str, positions: int) -> int:
    """Return the bytes of materialized attention scores."""
    return 4 * header.integer(f"clip.{part}.attention.head_count") * positions * positions
