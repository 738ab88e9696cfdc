"""What each verb reports. Keys may be added, never renamed.

`inputs` and `seconds` are filled in by whoever knows them: the command line knows the files, a library call that got a live model doesn't.
"""

from .base import RENDERINGS
from .base import InputFile as InputFile
from .base import Report as Report
from .fuse import Counts as Counts
from .fuse import Dropped as Dropped
from .fuse import Equalised as Equalised
from .fuse import FuseReport as FuseReport
from .fuse import InspectReport as InspectReport
from .fuse import Layer as Layer
from .fuse import Merged as Merged
from .fuse import Size as Size
from .fuse import WeightRange as WeightRange
from .others import BenchReport as BenchReport
from .others import ExplainReport as ExplainReport
from .others import Latency as Latency
from .others import PipelineReport as PipelineReport
from .others import Timing as Timing
from .recalibrate import Accuracy as Accuracy
from .recalibrate import Effect as Effect
from .recalibrate import LayerStatistics as LayerStatistics
from .recalibrate import RecalibrateReport as RecalibrateReport
from .recalibrate import Word as Word
from .verify import Certified as Certified
from .verify import Coefficients as Coefficients
from .verify import Deployment as Deployment
from .verify import Difference as Difference
from .verify import Function as Function
from .verify import LayerError as LayerError
from .verify import Levels as Levels
from .verify import OutputError as OutputError
from .verify import PairedOperator as PairedOperator
from .verify import Verdict as Verdict
from .verify import VerifyReport as VerifyReport


def _text(report: Report) -> str:
    from .render.terminal import text

    return text(report)


def _html(report: Report) -> str:
    from .render.html import embedded

    return embedded(report)


RENDERINGS.update(text=_text, html=_html)
