"""Sequence encoders: a layer computes H from the aligned events S of a behaviour sequence, which has the same width.

``local``: whether H of an event depends on nothing but the event, so that the requests of a timeline share it; an
encoder that is not local encodes the window of each request.
"""

from models.encoders.longer import LongerEncoding
from models.encoders.sizes import EncoderSizes
from models.encoders.swiglu import SwiGLUEncoding
from models.encoders.transformer import TransformerEncoding
from models.encoders.window import Window, make_window, window_keys

Encoding = SwiGLUEncoding | TransformerEncoding | LongerEncoding
ENCODINGS: dict[str, type[SwiGLUEncoding | TransformerEncoding | LongerEncoding]] = {
    "swiglu": SwiGLUEncoding,
    "transformer": TransformerEncoding,
    "longer": LongerEncoding,
}

__all__ = [
    "ENCODINGS",
    "EncoderSizes",
    "Encoding",
    "LongerEncoding",
    "SwiGLUEncoding",
    "TransformerEncoding",
    "Window",
    "make_window",
    "window_keys",
]
