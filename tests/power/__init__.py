"""How often `verify` passes a defect or takes a right fold for one, measured on real architectures, beside what others use."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the modules beside this package, where it isn't pytest that put them there
