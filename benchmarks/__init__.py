"""What the published figures were measured with, `python -m benchmarks.NAME`, run from a checkout, and the figures."""

import importlib.util
import os
import sys
from pathlib import Path

if importlib.util.find_spec("jaxtyping") is None:  # on a lent machine where nothing can be installed
    _stand_ins = str(Path(__file__).parent / "stand_ins")
    sys.path.append(_stand_ins)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), _stand_ins]))
