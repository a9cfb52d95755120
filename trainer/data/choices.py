"""Which function decodes which file.  No torch, no Pillow: login nodes and the docs read this."""

from __future__ import annotations

# Extension (lower case, without the dot) -> "module:function" of bytes -> numpy array.
#
# The contract: the function gets the whole content of one file and returns a numpy array of
# numbers.  All samples of a set must get one shape and dtype.  It may raise any exception for
# content that it cannot read; the sample is then corrupt.  A new decoder is one row here and its
# function; the config's data.decoders adds rows of the same form, or replaces these.
DECODERS: dict[str, str] = {
    "jpg": "trainer.data.decoding:image",
    "jpeg": "trainer.data.decoding:image",
    "png": "trainer.data.decoding:image",
    "webp": "trainer.data.decoding:image",
    "npy": "trainer.data.decoding:npy",
    "txt": "trainer.data.decoding:text",
    "json": "trainer.data.decoding:numbers",
}

# Name in data.augment -> "module:function" that makes a training view; "" makes none.
#
# The contract: function(inputs [n, ...], uniforms float64 [n, K]) -> views [n, ...].  A view is a
# pure function of its own input and its own K numbers in [0, 1), however many come in one call.
# K is the function's attribute `numbers` (8 where it has none).  Views may differ from the inputs
# in shape and dtype, but must agree with each other.
AUGMENTATIONS: dict[str, str] = {
    "none": "",
    "shift": "trainer.data.augment:shift",
    "flip-crop": "trainer.data.augment:flip_crop",
}
