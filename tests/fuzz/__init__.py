"""Files made wrong and networks that nobody drew: what bnfold makes of them must be right, or refused in one line."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the modules beside this package, where it isn't pytest that put them there
