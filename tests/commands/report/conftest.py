import pytest
from matplotlib.figure import Figure

from equalize.commands.report import comparison, training


@pytest.fixture
def drawn(monkeypatch) -> Figure:
    """The figure that is filled, in place of its picture."""
    figure = Figure()
    for module in (comparison, training):
        monkeypatch.setattr(module, "draw_picture", lambda name, alt, draw, *, size: draw(figure))
    return figure
