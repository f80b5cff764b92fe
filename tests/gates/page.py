"""The page of a trace in a browser: `python -m tests.gates.page`, or `make test-page`.

Runs the tests of the page, those in Chromium among them, and then takes pictures of it at the widths of a desk, a
tablet and a phone, light and dark, into build/page, for somebody to look at: no test sees what is ugly.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.insight import pages
from tests.kit.chromium import Browser, Page, found

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build/page"
TESTS = ("tests/insight/test_page.py", "tests/insight/test_page_in_chromium.py")
WIDTHS = {"desk": (1280, 900), "tablet": (820, 1100), "phone": (390, 844)}
MADE = {"small": pages.small, "long": pages.long, "paged": pages.paged, "hostile": pages.hostile}


def installed() -> bool:
    """Whether there is a browser. As root on Debian and its kin it is installed where it is missing, else named."""
    if found() is not None:
        return True
    if os.geteuid() == 0 and shutil.which("apt-get") is not None:
        print("installing chromium", flush=True)
        for command in (["update", "-qq"], ["install", "-y", "-qq", "--no-install-recommends", "chromium"]):
            quiet = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
            subprocess.run(["apt-get", *command], check=True, env=quiet, stdout=2)
        return found() is not None
    print("test-page needs a browser: apt-get install chromium, or set QKV_CHROMIUM to one")
    return False


def pictures() -> None:
    """A picture of each page, at each width and in both themes."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as profile:
        browser = Browser(Path(profile))
        for name, make in MADE.items():
            file = BUILD / f"{name}.html"
            make().html(file)
            for width, size in WIDTHS.items():
                for theme in ("light", "dark"):
                    page = Page(browser, file, size, dark=theme == "dark")
                    (BUILD / f"{name}-{width}-{theme}.png").write_bytes(page.picture())
                    page.close()
        browser.close()
    print(f"{len(list(BUILD.glob('*.png')))} pictures in {BUILD.relative_to(ROOT)}")


def main() -> int:
    if not installed():
        return 1
    code = subprocess.run([sys.executable, "-m", "pytest", *TESTS], cwd=ROOT, check=False).returncode
    pictures()
    return code


if __name__ == "__main__":
    sys.exit(main())
