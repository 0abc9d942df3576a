"""Text to ids and back: the tokenizer, and the template of conversations."""

from mmdiff.text.template import (
    CAPTION_PROMPT,
    PLACEHOLDER,
    VISION_SYSTEM,
    Content,
    Dialogue,
    Encoded,
    from_llava,
    image_first,
)
from mmdiff.text.tokenizer import SPECIAL_TOKENS, Tokenizer

__all__ = [
    "CAPTION_PROMPT",
    "PLACEHOLDER",
    "SPECIAL_TOKENS",
    "VISION_SYSTEM",
    "Content",
    "Dialogue",
    "Encoded",
    "Tokenizer",
    "from_llava",
    "image_first",
]
