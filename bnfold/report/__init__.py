"""What each verb reports. Keys may be added, never renamed.

`inputs` and `seconds` are filled in by whoever knows them: the command line knows the files, a library call that got a live model doesn't.
"""

from .base import RENDERINGS, InputFile, Report
from .fuse import Composed, Counts, Dropped, Equalised, FuseReport, InspectReport, Layer, Merged, Size, WeightRange
from .others import BenchReport, ExplainReport, Latency, PipelineReport, Timing
from .recalibrate import Accuracy, Effect, LayerStatistics, RecalibrateReport, Word
from .verify import (
    Certified,
    Coefficients,
    Deployment,
    Difference,
    Function,
    LayerError,
    Levels,
    OutputError,
    PairedOperator,
    Verdict,
    VerifyReport,
)


def _text(report: Report) -> str:
    from .render.terminal import text

    return text(report)


def _html(report: Report) -> str:
    from .render.html import embedded

    return embedded(report)


RENDERINGS.update(text=_text, html=_html)
