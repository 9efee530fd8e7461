"""The training of pytorch_images.py where no folder can be mounted: the same loop, its files opened through fsspec.

    python examples/pytorch_images_fsspec.py --data orchestra:///digits --epochs 2

The only differences from an ordinary folder: names come from `ls`, and a file's bytes from `cat_file`.
"""

from __future__ import annotations

import io

import fsspec
from PIL import Image
from pytorch_images import Pictures, Sample, parse_arguments, train


def find_samples(url: str) -> tuple[list[str], list[Sample]]:
    """Return the class names and the URL of every picture below them, both in sorted order."""
    filesystem, root = fsspec.core.url_to_fs(url)
    folders = sorted(entry["name"] for entry in filesystem.ls(root, detail=True) if entry["type"] == "directory")
    samples = []
    for label, folder in enumerate(folders):
        names = sorted(name for name in filesystem.ls(folder, detail=False) if name.endswith(".png"))
        samples += [Sample(filesystem.unstrip_protocol(name), label) for name in names]
    return [folder.rsplit("/", 1)[-1] for folder in folders], samples


class FsspecPictures(Pictures):
    """Opens files by URL."""

    def load(self, path: str) -> Image.Image:
        """Return the decoded picture."""
        filesystem, name = fsspec.core.url_to_fs(path)
        return Image.open(io.BytesIO(filesystem.cat_file(name))).convert("L")


def main() -> None:
    """Find the pictures, then train on them."""
    options = parse_arguments()
    classes, samples = find_samples(options.data)
    if not samples:
        raise SystemExit(f"no PNG files in class folders below {options.data}")
    print(f"{len(samples)} pictures in {len(classes)} classes", flush=True)
    train(options, FsspecPictures, classes, samples)


if __name__ == "__main__":
    main()
