"""Which function decodes which file.  No torch, no Pillow: login nodes and the docs read this."""

from __future__ import annotations

# Extension (lower case, without the dot) -> "module:function" of bytes -> numpy array.
#
# The contract: the function gets the whole content of one file and returns a numpy array of
# numbers.  All samples of a set must get one shape and dtype.  It may raise any exception for
# content that it cannot read. The sample is then corrupt.  A new decoder is one row here and its
# function. The config's data.decoders adds rows of the same form, or replaces these.
DECODERS: dict[str, str] = {
    "jpg": "trainer.data.decoding:image",
    "jpeg": "trainer.data.decoding:image",
    "jpe": "trainer.data.decoding:image",
    "jfif": "trainer.data.decoding:image",
    "png": "trainer.data.decoding:image",
    "webp": "trainer.data.decoding:image",
    "gif": "trainer.data.decoding:image",
    "bmp": "trainer.data.decoding:image",
    "tif": "trainer.data.decoding:image",
    "tiff": "trainer.data.decoding:image",
    "ppm": "trainer.data.decoding:image",
    "pgm": "trainer.data.decoding:image",
    "pbm": "trainer.data.decoding:image",
    "pnm": "trainer.data.decoding:image",
    "npy": "trainer.data.decoding:npy",
    "txt": "trainer.data.decoding:text",
    "json": "trainer.data.decoding:numbers",
}

PICTURES = tuple(name for name, function in DECODERS.items() if function.endswith(":image"))
