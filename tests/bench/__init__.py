"""Speed and memory: each file says how it is run."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the modules beside this package, where it isn't pytest that put them there
