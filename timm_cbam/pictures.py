"""Figures of maps over images and of histograms, laid out in inches so that each row fills the width"""
import re
import textwrap
import unicodedata
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple, Union

import numpy as np

__all__ = ['Block', 'Histograms', 'Maps', 'Panel', 'Row', 'SUFFIXES', 'printable', 'save_figure']

# Those of matplotlib's formats that people look at and that keep transparency.
SUFFIXES = ('.png', '.jpg', '.jpeg', '.webp', '.tif', '.tiff', '.pdf', '.svg')

_WIDTH = 8.  # of every figure, so that 9 points are 12 pixels where it is shown 800 pixels wide
_DPI = 200
_FONT, _SMALL_FONT = 9, 8  # points
_LINE = 0.155  # height of a line of text
_LETTER = 0.08  # width of a letter
_MARGIN, _GAP = 0.1, 0.12
_MAX_HEIGHT = 3.4  # of a panel
_MIN_SLOT = 1.2  # width that a panel's title has at least
_BAR = 0.1  # height of a colour bar
_BINS = 25

# Installed fonts are asked for what matplotlib's own font lacks, mainly Chinese, Japanese and Korean.
_FALLBACK_FONTS = (
    'Noto Sans CJK SC', 'Noto Sans CJK JP', 'Noto Sans CJK KR', 'Source Han Sans SC', 'WenQuanYi Zen Hei',
    'WenQuanYi Micro Hei', 'Microsoft YaHei', 'Yu Gothic', 'Malgun Gothic', 'PingFang SC', 'Hiragino Sans',
    'Apple SD Gothic Neo', 'Arial Unicode MS', 'Noto Sans', 'Noto Sans Devanagari', 'Noto Sans Thai', 'Nirmala UI')


class Panel(NamedTuple):
    """An image (H, W, 3) with its title's lines, and values (h, w) over it."""
    lines: Sequence[str]
    image: np.ndarray
    values: Optional[np.ndarray] = None


class Row(NamedTuple):
    """Panels side by side, with what is written on their left."""
    panels: Sequence[Panel]
    lines: Sequence[str] = ()


def printable(text: object) -> str:
    """One line of text that any output takes: without control characters and halves of surrogate pairs."""
    line = ' '.join(str(text).splitlines())
    return ''.join(c if c.isprintable() else '\N{REPLACEMENT CHARACTER}' for c in line)


class _Wrapper(textwrap.TextWrapper):
    wordsep_re = re.compile(r'(\s+|(?<=[_./-]))')  # names of models and files have no spaces


def _wrap(lines: Sequence[str], inches: float) -> str:
    wrapped: List[str] = []
    for line in map(printable, lines):
        wide = any(unicodedata.east_asian_width(c) in 'WF' for c in line)
        width = max(int(inches / _LETTER / (2 if wide else 1)), 4)
        wrapped += _Wrapper(width, max_lines=3, placeholder='…').wrap(line)
    return '\n'.join(wrapped)


def _height(text: str) -> float:
    return _LINE * (text.count('\n') + 1) if text else 0.


def _ticks(limits: Tuple[float, float]) -> Tuple[List[float], List[str]]:
    values = np.linspace(*limits, 3).tolist()
    return values, [f'{value:.3g}' for value in values]


def _colors():
    """A luminous colour map, the more transparent the lower the value."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    colors = colormaps['plasma'](np.linspace(0, 1, 256))
    colors[:, 3] = 0.8 * np.linspace(0, 1, 256)
    return ListedColormap(colors)


class _Page:
    """A figure to place things on, in inches from its upper left corner."""

    def __init__(self, height: float) -> None:
        from matplotlib.figure import Figure

        self.height = height
        self.figure = Figure(figsize=(_WIDTH, height))

    def axes(self, x: float, y: float, width: float, height: float):
        return self.figure.add_axes((
            x / _WIDTH, 1 - (y + height) / self.height, width / _WIDTH, height / self.height))

    def text(self, x: float, y: float, text: str, **kwargs) -> None:
        self.figure.text(x / _WIDTH, 1 - y / self.height, text, **kwargs)


class Maps:
    """Rows of images with maps over them, and one colour bar for all."""

    def __init__(
            self,
            rows: Sequence[Row],
            label: str,
            limits: Tuple[float, float] = (0., 1.),
            heading: str = '',
    ) -> None:
        """
        Args:
            rows: What to show.
            label: Text of the colour bar.
            limits: Values at its ends.
            heading: Text above the rows.
        """
        self.rows, self.label, self.limits = rows, label, limits
        self.heading = _wrap([heading], _WIDTH - 1)
        columns = max(len(row.panels) for row in rows)
        aspects = [max(p.image.shape[0] / p.image.shape[1] for p in row.panels) for row in rows]
        heights = [min(_MAX_HEIGHT, self._slot(columns, 0.) * aspect) for aspect in aspects]
        self.labels = [_wrap(row.lines, max(height, 0.8)) for row, height in zip(rows, heights, strict=True)]
        self.left = max(map(_height, self.labels))
        self.slot = self._slot(columns, self.left)
        if self.slot * max(aspects) > _MAX_HEIGHT:
            self.slot = min(self.slot, max(_MAX_HEIGHT / max(aspects), _MIN_SLOT))
        self.heights = [min(_MAX_HEIGHT, self.slot * aspect) for aspect in aspects]
        self.titles = [[_wrap(panel.lines, self.slot) for panel in row.panels] for row in rows]
        # what is left where panels are as high as they may be
        spare = _WIDTH - 2 * _MARGIN - self.left - columns * self.slot - (columns - 1) * _GAP
        self.left += _MARGIN + spare / 2
        self.height = (
            _height(self.heading) + sum(self.heights) + sum(max(map(_height, titles)) + _GAP for titles in self.titles)
            + _BAR + 1.5 * _LINE)

    @staticmethod
    def _slot(columns: int, left: float) -> float:
        return (_WIDTH - 2 * _MARGIN - left - (columns - 1) * _GAP) / columns

    def draw(self, page: _Page, y: float) -> None:
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import Normalize

        norm, colors = Normalize(*self.limits), _colors()
        page.text(_MARGIN, y, self.heading, va='top', weight='bold')
        y += _height(self.heading)
        for row, label, titles, height in zip(self.rows, self.labels, self.titles, self.heights, strict=True):
            y += max(map(_height, titles)) + _GAP / 2
            page.text(
                self.left - _GAP / 2, y + height / 2, label, ha='right', va='center', rotation=90,
                multialignment='center')
            x = self.left
            for panel, title in zip(row.panels, titles, strict=True):
                ax = page.axes(x, y, self.slot, height)
                h, w = panel.image.shape[:2]
                extent = (-0.5, w - 0.5, h - 0.5, -0.5)
                ax.imshow(panel.image, extent=extent)
                if panel.values is not None:
                    ax.imshow(panel.values, cmap=colors, norm=norm, extent=extent, interpolation='nearest')
                ax.set_title(title, pad=3)
                ax.set_axis_off()
                ax.set_anchor('N')
                x += self.slot + _GAP
            y += height + _GAP / 2
        bar = page.axes(_WIDTH / 2, y, _WIDTH / 4, _BAR)
        bar.set_facecolor('gray')  # in the image's place, which is seen where values are low
        colorbar = page.figure.colorbar(ScalarMappable(norm, colors), cax=bar, orientation='horizontal')
        ticks, labels = _ticks(self.limits)
        colorbar.set_ticks(ticks, labels=labels)
        page.text(_WIDTH / 2 - _GAP, y + _BAR / 2, self.label, ha='right', va='center')


class Histograms:
    """Histograms side by side, on the same axes."""

    def __init__(
            self,
            values: Dict[str, np.ndarray],
            xlabel: str,
            ylabel: str,
            limits: Tuple[float, float],
            heading: str,
    ) -> None:
        """
        Args:
            values: What to count (N,), by title.
            xlabel: Name of the values.
            ylabel: Name of their share, in percent.
            limits: Least and largest value to show.
            heading: Text above them.
        """
        self.values, self.limits, self.xlabel, self.ylabel = values, limits, xlabel, ylabel
        self.heading = _wrap([heading], _WIDTH - 1)
        self.left, self.gap = 0.62, 0.25
        self.slot = (_WIDTH - _MARGIN - self.left - (len(values) - 1) * self.gap) / len(values)
        self.titles = [_wrap([title], self.slot) for title in values]
        self.panel = 1.25
        self.height = (
            _height(self.heading) + max(map(_height, self.titles)) + _GAP / 2 + self.panel + 2.7 * _LINE)

    def draw(self, page: _Page, y: float) -> None:
        page.text(_MARGIN, y, self.heading, va='top', weight='bold')
        y += _height(self.heading) + max(map(_height, self.titles)) + _GAP / 2
        axes = []
        for i, (title, values) in enumerate(zip(self.titles, self.values.values(), strict=True)):
            ax = page.axes(self.left + i * (self.slot + self.gap), y, self.slot, self.panel)
            ax.hist(
                values, bins=_BINS, range=self.limits, weights=np.full(len(values), 100 / len(values)), color='#0072b2')
            ax.set_xlim(*self.limits)
            ax.set_xticks(*_ticks(self.limits))
            ax.set_title(title, pad=3)
            ax.set_xlabel(self.xlabel, labelpad=1)
            axes.append(ax)
        top = max(ax.get_ylim()[1] for ax in axes)
        for ax in axes:
            ax.set_ylim(0, top)
        for ax in axes[1:]:
            ax.tick_params(labelleft=False)
        axes[0].set_ylabel(self.ylabel)


Block = Union[Maps, Histograms]


@contextmanager
def _style() -> Iterator[None]:
    from matplotlib import style
    from matplotlib.font_manager import fontManager

    installed = {font.name for font in fontManager.ttflist}
    rc: Dict[str, Any] = {
        'font.family': ['DejaVu Sans', *(name for name in _FALLBACK_FONTS if name in installed)],
        'font.size': _FONT,
        'axes.titlesize': _FONT,
        'axes.labelsize': _SMALL_FONT,
        'xtick.labelsize': _SMALL_FONT,
        'ytick.labelsize': _SMALL_FONT,
        'text.parse_math': False,  # names may have dollars
    }
    # whatever the user's matplotlibrc says
    with style.context(['default', rc]), warnings.catch_warnings():
        warnings.filterwarnings('ignore', message='Glyph .* missing')
        yield


def save_figure(file: Union[str, Path], blocks: Sequence[Block]) -> None:
    """Draw blocks below each other.

    Args:
        file: File to write, with one of SUFFIXES.
        blocks: What to draw.
    """
    with _style():
        page = _Page(2 * _MARGIN + sum(block.height for block in blocks) + _GAP * (len(blocks) - 1))
        y = _MARGIN
        for block in blocks:
            block.draw(page, y)
            y += block.height + _GAP
        page.figure.savefig(file, dpi=_DPI)
