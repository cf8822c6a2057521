# python benchmarks/screenshots.py
"""Makes the pictures of `docs/img/`: the page of a plan of `examples/unet_skips.py`, wide and light, narrow and dark.
Needs Chromium."""

from __future__ import annotations

import base64
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from autopipe.cli import main as autopipe  # noqa: E402
from scenarios.chromium import PROGRAM, Browser  # noqa: E402

PICTURES = (("report-wide.png", 1280, False), ("report-narrow-dark.png", 390, True))
CALL = ("--num-stages", "3", "--num-microbatches", "6", "--memory-limit", "64MiB", "--quiet")


def picture(browser: Browser, page: Path, width: int, dark: bool) -> bytes:
    """The whole page as a PNG."""
    browser.open(page, width, dark=dark)
    height = browser.value("document.documentElement.scrollHeight")
    browser.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
    return base64.b64decode(browser.call("Page.captureScreenshot", format="png")["data"])


def main() -> None:
    if PROGRAM is None:
        raise SystemExit("no Chromium on PATH; on Debian: apt-get install chromium")
    with tempfile.TemporaryDirectory() as place, Browser() as browser:
        page = Path(place) / "unet.html"
        status = autopipe(["report", f"{ROOT / 'examples' / 'unet_skips.py'}:build", *CALL, "-o", str(page)])
        if status:
            raise SystemExit(status)
        for name, width, dark in PICTURES:
            target = ROOT / "docs" / "img" / name
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(picture(browser, page, width, dark))
            print(f"{target.relative_to(ROOT)}  {target.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
