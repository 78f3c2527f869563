"""How fast `tspin tokenize` is: `python benchmarks/tokenize.py [--quick]`, see `tokenization_speed.py`.

Python puts a script's folder first, so for every script beside this one the name is also that of the standard library's
`tokenize`. Whoever imports it gets that one.
"""

import importlib.util
import runpy
import sys
import sysconfig
from pathlib import Path

_HERE = Path(__file__).resolve()

if __name__ == "__main__":
    sys.path[:] = [place for place in sys.path if Path(place).resolve() != _HERE.parent]
    sys.argv[0] = str(_HERE.with_name("tokenization_speed.py"))
    runpy.run_path(sys.argv[0], run_name="__main__")
else:
    _spec = importlib.util.spec_from_file_location(__name__, Path(sysconfig.get_paths()["stdlib"]) / "tokenize.py")
    if _spec is None or _spec.loader is None:
        raise ImportError("Python's own tokenize.py is not where its library is")
    sys.modules[__name__] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules[__name__])
