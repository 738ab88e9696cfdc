"""What bnfold and other tools make of the same networks: BatchNorms left, wrong results, crashes, time and memory."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the modules beside this package, where it isn't pytest that put them there
