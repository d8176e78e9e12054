"""The README's three ways to use the package, run as they stand there, and the limits of their length."""

import re
import shlex
import struct
import zlib
from pathlib import Path

import pytest
import torch
from command import run
from torch import nn

ROOT = Path(__file__).parent.parent
WAYS = (ROOT / "README.md").read_text().partition("## Three ways to use it")[2].partition("\n## ")[0]
OPENVINO, FPGA = re.findall(r"```bash\n(.*?)```", WAYS, re.S)
[PYTHON] = re.findall(r"```python\n(.*?)```", WAYS, re.S)

NET = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
    ).eval()

def batches():
    images = torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return [(part, torch.arange(len(part)) % 4) for part in images.split(16)]
"""


def write_png(path, pixels):
    """An RGB image [height, width, 3] of bytes, by the format's definition."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + bytes(row.flatten().tolist()) for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + data)


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """Weights of the README's network and a folder of small images, in two classes."""
    models = pytest.importorskip("torchvision").models
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    torch.save(models.mobilenet_v3_small().state_dict(), "net.pth")
    for i in range(8):
        folder = Path("photos") / f"class{i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        write_png(folder / f"{i}.png", torch.randint(0, 256, (32, 32, 3)))


def run_all(block, capsys):
    commands = [shlex.split(line) for line in block.replace("\\\n", " ").strip().splitlines()]
    assert len(commands) == 3
    for program, *words in commands:
        assert program == "mpq"
        code, _, err = run(capsys, *words)
        assert code == 0, err


@pytest.mark.usefixtures("photos")
def test_openvino(capsys):
    """Three commands, from weights and a folder of images to a verified file and its report."""
    run_all(OPENVINO, capsys)
    assert Path("net.xml").exists()
    assert Path("report.json").exists()


def test_fpga(tmp_path, monkeypatch, capsys):
    """Three commands, from a network in a file to a trained and verified QONNX file."""
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(NET)
    run_all(FPGA, capsys)
    assert Path("net.onnx").exists()


def test_python(tmp_path, monkeypatch, capsys):
    """Twelve lines at most, with a model and a loader of one's own."""
    monkeypatch.chdir(tmp_path)
    assert len([line for line in PYTHON.splitlines() if line.strip()]) <= 12
    scope = {}
    exec(NET, scope)
    names = {"model": scope["build"](), "loader": scope["batches"](), "example": torch.zeros(1, 3, 16, 16)}
    exec(PYTHON, names)
    assert capsys.readouterr().out.count("\n") < 20
    layers = {name for name, module in names["model"].named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))}
    assert set(names["widths"]) == layers
    sizes = {name: names["model"].get_submodule(name).weight.numel() for name in layers}
    assert sum(names["widths"][name] * size for name, size in sizes.items()) <= 3.5 * sum(sizes.values())


def slug(heading):
    """The anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lstrip("# ").lower()).replace(" ", "-")


def test_every_link_leads_somewhere():
    """Links of the README and of the pages, to files and to headings."""
    pages = {path: path.read_text() for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))}
    for path, text in pages.items():
        for target in re.findall(r"\]\(([^)#\s]*)(?:#[^)]*)?\)", text):
            assert not target or target.startswith("http") or (path.parent / target).exists(), (path.name, target)
        for target, heading in re.findall(r"\]\(([^)#\s]*)#([^)]*)\)", text):
            page = (path.parent / target).resolve() if target else path
            if page in pages:
                assert heading in [slug(line) for line in pages[page].splitlines() if line.startswith("#")], (
                    path.name,
                    heading,
                )


def test_the_glossary_is_in_order_and_each_word_once():
    """As in a dictionary."""
    words = re.findall(r"^\| ([^|]+) \|", (ROOT / "docs" / "glossary.md").read_text(), re.M)[1:]
    assert words == sorted(words, key=str.lower)
    assert len(set(words)) == len(words) >= 20
