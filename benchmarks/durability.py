"""What a run survives: every matrix of the folder beside this file, its counts printed and written as JSON.

    python benchmarks/durability.py reshard        # a checkpoint of any layout is read by any other
    python benchmarks/durability.py NAME --help    # NAME is a file of benchmarks/durability/

Each file has a `main(arguments)`; its first line says what it counts.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # not this folder: `benchmarks.durability` is the package beside this file

NAMES = sorted(p.stem for p in (ROOT / "benchmarks" / "durability").glob("[a-z]*.py"))


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in NAMES:
        sys.exit(f"{(__doc__ or '').strip()}\n\nNAME is one of: {', '.join(NAMES)}")
    importlib.import_module(f"benchmarks.durability.{sys.argv[1]}").main(sys.argv[2:])


if __name__ == "__main__":
    main()
