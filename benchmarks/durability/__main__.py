"""What a run survives: every matrix of this folder, its counts printed and written as JSON.

    python -m benchmarks.durability reshard        # a checkpoint of any layout is read by any other
    python -m benchmarks.durability NAME --help    # NAME is a file of benchmarks/durability/

Each file has a `main(arguments)`; its first line says what it counts.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
NAMES = sorted(p.stem for p in Path(__file__).parent.glob("[a-z]*.py"))


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in NAMES:
        sys.exit(f"{(__doc__ or '').strip()}\n\nNAME is one of: {', '.join(NAMES)}")
    importlib.import_module(f"benchmarks.durability.{sys.argv[1]}").main(sys.argv[2:])


if __name__ == "__main__":
    main()
