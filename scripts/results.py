"""What the experiments share: a CSV file of finished trainings, with which the same command goes on, and figures"""
import csv
import io
import os
import statistics
from pathlib import Path
from typing import Any, Dict, List

from matplotlib.figure import Figure
from scipy.stats import ttest_rel

from timm_cbam.hub import staged_file


def read(file: Path, columns: List[str], settings: Dict[str, Any]) -> List[Dict[str, str]]:
    """Read the finished trainings and leave the file such that lines can be appended.

    Raises:
        ValueError: If the file is another one than this script's, or was made with other settings.
    """
    header = ','.join([*columns, *settings]) + '\n'
    text = file.read_text(errors='replace') if file.exists() else ''
    if not (text.startswith(header) or header.startswith(text)):
        raise ValueError(f'{file} is no table of this script; choose another --output.')
    whole = text[:text.rfind('\n') + 1]  # a killed process may leave half a line
    rows = list(csv.DictReader(io.StringIO(whole)))
    for row in rows:
        for name, value in settings.items():
            if row[name] != str(value):
                raise ValueError(
                    f'{file} was made with {name}={row[name]}, not {value}; choose another --output, or remove it.')
    if whole:
        os.truncate(file, len(whole.encode()))
    else:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(header)
    return rows


def append(file: Path, values: List[Any]) -> None:
    """Append the line of a finished training."""
    with file.open('a', newline='') as f:
        csv.writer(f, lineterminator='\n').writerow(values)


def spread(values: List[float], divisor: float = 1., sign: str = '') -> str:
    """Mean and standard deviation, the latter divided; of one value that only."""
    mean = f'{statistics.mean(values):{sign}.2f}'
    return f'{mean} ± {statistics.stdev(values) / divisor:.2f}' if len(values) > 1 else mean


def compare(values: List[float], reference: List[float]) -> str:
    """Mean difference of pairs with its standard error, marked if a t-test at 5 % does not see it."""
    differences = [a - b for a, b in zip(values, reference, strict=True)]
    text = spread(differences, len(differences) ** 0.5, '+')
    if len(differences) == 1 or ttest_rel(values, reference).pvalue < 0.05:
        return text
    return f'{text} (within noise)'


def save_figure(figure: Figure, file: Path) -> None:
    with staged_file(file, replace=True) as staged:
        figure.savefig(staged, format='png', dpi=120)
