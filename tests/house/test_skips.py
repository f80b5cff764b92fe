"""A test that cannot check says why, from a list: a run with another reason fails."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.kit import skips

ROOT = Path(__file__).resolve().parents[2]
ALLOWED = f"""
import pytest
def test_it(): pytest.skip({skips.NOT_LINUX!r})
"""
REFUSED = {
    "another reason": "import pytest\ndef test_it(): pytest.skip('not today')\n",
    "a mark": "import pytest\n@pytest.mark.skip(reason='slow')\ndef test_it(): pass\n",
    "a missing package": "import pytest\npytest.importorskip('no_such_package')\n",
    "a whole file": "import pytest\npytest.skip('later', allow_module_level=True)\n",
    "no cases": "import pytest\n@pytest.mark.parametrize('x', [])\ndef test_it(x): pass\n",
    "an expected failure": "import pytest\n@pytest.mark.xfail(reason='known')\ndef test_it(): assert False\n",
    "an expected failure that passes": "import pytest\n@pytest.mark.xfail(strict=True)\ndef test_it(): pass\n",
    "in a fixture": "import pytest\n@pytest.fixture\ndef f(): pytest.skip('no')\ndef test_it(f): pass\n",
}


def run(tmp_path: Path, code: str) -> subprocess.CompletedProcess[str]:
    (tmp_path / "test_it.py").write_text(code, encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.kit.skips", "-p", "no:cacheprovider"]
    command += ["-c", str(tmp_path / "none.ini"), "--rootdir", str(tmp_path), str(tmp_path)]
    (tmp_path / "none.ini").write_text("[pytest]\n", encoding="utf-8")
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("kind", REFUSED)
def test_other_reasons_fail_the_run(kind: str, tmp_path: Path) -> None:
    done = run(tmp_path, REFUSED[kind])
    assert done.returncode != 0, done.stdout


def test_reasons_of_the_list_pass(tmp_path: Path) -> None:
    done = run(tmp_path, ALLOWED)
    assert done.returncode == 0, done.stdout
    assert "1 skipped" in done.stdout
