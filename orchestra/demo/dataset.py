"""The demo's data: scikit-learn's handwritten digits as PNG files in class folders, and one object of several blocks.

Owns: keys and bytes, the same on every run. Leaves to others: putting them into a bucket.
"""

from __future__ import annotations

import io
from collections.abc import Iterator

import xxhash

from orchestra.config import BLOCK_SIZE_BYTES

DIGITS_FOLDER = "digits"
BIG_KEY = "large/random.bin"
# Three blocks and a rest: the last one is short, so the object's end is not a block's end.
BIG_SIZE_BYTES = 3 * BLOCK_SIZE_BYTES + 1_234_567
_SIDE = 32  # pixels; the bundled pictures have 8 x 8
_INK_MAX = 16  # their darkest grey


def objects() -> Iterator[tuple[str, bytes]]:
    """Yield key and bytes of everything."""
    yield from digit_files()
    yield BIG_KEY, big_object()


def digit_files() -> Iterator[tuple[str, bytes]]:
    """Yield key and PNG bytes of each of the 1,797 pictures: digits/<class>/<number>.png, numbers from 0001."""
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    for number, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True), start=1):
        image = Image.fromarray((pixels * (255 / _INK_MAX)).astype("uint8"))
        png = io.BytesIO()
        image.resize((_SIDE, _SIDE), Image.Resampling.BICUBIC).save(png, "PNG")
        yield f"{DIGITS_FOLDER}/{label}/{number:04d}.png", png.getvalue()


def big_object() -> bytes:
    """Return the bytes of the large object: a counter's hashes, so that every run and every place in it differ."""
    digest_size = 16
    hashes = (xxhash.xxh3_128_digest(n.to_bytes(8, "little")) for n in range(BIG_SIZE_BYTES // digest_size + 1))
    return b"".join(hashes)[:BIG_SIZE_BYTES]
