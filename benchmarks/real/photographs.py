"""The photographs: crops of pictures, and cut-outs pasted on crops, in halves for calibration and for testing.

Pictures and cut-outs are split by their source file, so that nothing of a test image was calibrated on.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from fetch import cache_folder, unpacked
from PIL import Image

_LONGEST = 1280  # what a picture keeps of its size; crops are scaled to 256 anyway
_IN, _OUT = 256, 224
_HALVES = {"calibration": 0, "test": 1}
_LEAST_SIDE = 60  # of a cut-out, in pixels


def pool(half: str, n: int, seed: int) -> np.ndarray:
    """`n` images [n, 224, 224, 3] of "calibration" or "test"; a third crops, the others with a cut-out pasted on.

    The first images are the same whatever `n` is.
    """
    path = cache_folder() / "tensors" / f"pool-{half}-{seed}.npy"
    held = np.load(path) if path.exists() else np.empty((0, _OUT, _OUT, 3), np.uint8)
    if len(held) < n:
        pictures, stamps = _half(_pictures(), half), _half(_stamps(), half)
        more = [_image(pictures, stamps, np.random.default_rng((_HALVES[half], seed, i)), i) for i in range(len(held), n)]
        held = np.concatenate([held, np.stack(more)])
        _save(path, held)
    return held[:n]


def imagenet_images() -> tuple[np.ndarray, np.ndarray]:
    """The 20 labelled ImageNet images of foolbox [20, 224, 224, 3] and their classes [20]."""
    files = sorted((unpacked("foolbox") / "foolbox" / "data").glob("imagenet_*.jpg"))
    images = [centre_crop(Image.open(file).convert("RGB")) for file in files]
    return np.stack(images), np.array([int(re.findall(r"_(\d+)\.jpg", file.name)[0]) for file in files])


def centre_crop(image: Image.Image) -> np.ndarray:
    """Short side to 256 pixels (bicubic), then the middle 224 x 224."""
    share = _IN / min(image.size)
    image = image.resize((round(image.width * share), round(image.height * share)), Image.Resampling.BICUBIC)
    left, top = (image.width - _OUT) // 2, (image.height - _OUT) // 2
    return np.asarray(image.crop((left, top, left + _OUT, top + _OUT)))


def _image(pictures: list[np.ndarray], stamps: list[np.ndarray], random: np.random.Generator, index: int) -> np.ndarray:
    picture = Image.fromarray(pictures[random.integers(len(pictures))])
    side = int(random.uniform(0.35, 1.0) * min(picture.size))
    left, top = (int(random.integers(size - side + 1)) for size in picture.size)
    crop = picture.crop((left, top, left + side, top + side))
    if index % 3 == 0:
        return centre_crop(crop)
    crop = crop.resize((_IN, _IN), Image.Resampling.BICUBIC)
    stamp = Image.fromarray(stamps[random.integers(len(stamps))])
    share = random.uniform(0.5, 0.95) * _OUT / max(stamp.size)
    size = (max(1, round(stamp.width * share)), max(1, round(stamp.height * share)))
    stamp = stamp.resize(size, Image.Resampling.BICUBIC)
    margin = (_IN - _OUT) // 2
    place = tuple(margin + int(random.integers(_OUT - length + 1)) for length in stamp.size)
    crop.paste(stamp, place, stamp)
    return centre_crop(crop)


def _half(images: list[np.ndarray], half: str) -> list[np.ndarray]:
    order = np.random.default_rng(0).permutation(len(images))
    return [images[i] for i in order[_HALVES[half] :: 2]]


def _pictures() -> list[np.ndarray]:
    return _decoded("pictures", _picture_files, _picture)


def _stamps() -> list[np.ndarray]:
    return _decoded("stamps", _stamp_files, lambda file: np.asarray(Image.open(file).convert("RGBA")))


def _picture_files() -> list[Path]:
    """One file of each picture; resolutions, dark forms and empty ones are no pictures of their own."""
    backgrounds = [
        *(unpacked("mate-backgrounds") / "usr/share/backgrounds/mate/nature").glob("*"),
        *(unpacked("mate-backgrounds") / "usr/share/backgrounds/mate/abstract").glob("*"),
        *(unpacked("gnome-backgrounds") / "usr/share/backgrounds/gnome").glob("*-l.webp"),
    ]
    kept = [
        file
        for file in backgrounds
        if file.suffix in {".jpg", ".png", ".webp"} and file.stat().st_size > 10_000 and not re.search(r"_\d+x\d+$", file.stem)
    ]
    for folder in sorted((unpacked("plasma-workspace-wallpapers") / "usr/share/wallpapers").glob("*/contents/images")):
        sizes = [file for file in folder.iterdir() if file.is_file() and not file.is_symlink()]
        if sizes:
            kept.append(max(sizes, key=lambda file: (file.stat().st_size, file.name)))
    return sorted(kept)


def _picture(file: Path) -> np.ndarray:
    image = Image.open(file)
    image.draft("RGB", (_LONGEST, _LONGEST))  # a JPEG is decoded at a half or a quarter of its size
    image.thumbnail((_LONGEST, _LONGEST), Image.Resampling.BICUBIC)
    return np.asarray(image.convert("RGB"))


def _stamp_files() -> list[Path]:
    root = unpacked("tuxpaint-stamps-default") / "usr/share/tuxpaint/stamps"
    files = sorted(root.rglob("*.png"))
    kept = [
        file
        for file in files
        if not {"cartoon", "symbols"} & set(file.relative_to(root).parts) and not file.stem.endswith("_mirror")
    ]
    return [file for file in kept if min(Image.open(file).size) >= _LEAST_SIDE]


def _decoded(name: str, files, decode) -> list[np.ndarray]:
    path = cache_folder() / "tensors" / f"{name}.npz"
    if not path.exists():
        _save(path, {f"{i:04d}": decode(file) for i, file in enumerate(files())})
    with np.load(path) as found:
        return [found[key] for key in sorted(found)]


def _save(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"part-{path.name}")
    np.savez(part, **value) if isinstance(value, dict) else np.save(part, value)
    part.replace(path)
