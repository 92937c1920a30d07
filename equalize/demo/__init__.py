"""What `equalize demo` runs on: a small trained UPerNet and the street scenes it has not seen (see README.md here)."""

from pathlib import Path

MODEL = Path(__file__).parent / "model"
DATA = Path(__file__).parent / "data"
