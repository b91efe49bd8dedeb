"""What all pictures of this package share. Figures use matplotlib's object API, without global state.

The modules of this package import matplotlib and jinja2 in the functions that draw and write. A training needs them at
its end only, and its start would wait about a second for them.
"""

from __future__ import annotations

import logging
import os
from typing import IO, TYPE_CHECKING, Union

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

PathLike = Union[str, os.PathLike]
Output = Union[PathLike, IO[bytes]]

# Colors that color-blind readers can tell apart too (Okabe and Ito), the most readable on white first.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#4D4D4D")


def color(index: int) -> str:
    """Return the color of the ``index``-th thing in a figure; the colors repeat after seven."""
    return COLORS[index % len(COLORS)]


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of ``width`` x ``height`` inches, whose axes matplotlib places."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # here: see the module's docstring
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08)
    figure = Figure(figsize=(width, height), facecolor="white", layout=layout)
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, output: Output, dpi: float = 100) -> str:
    """Write ``figure`` as a PNG to a path, whose folder is created, or to a binary file; return the path or ""."""
    if not isinstance(output, (str, os.PathLike)):
        figure.savefig(output, dpi=dpi, format="png")
        return ""
    path = os.fspath(output)
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    figure.savefig(path, dpi=dpi, format="png")
    logger.info(f"Wrote {path}")
    return path
