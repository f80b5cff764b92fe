"""A test that cannot check says why, from a list: a run with another reason fails."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tests.kit import skips

ROOT = Path(__file__).resolve().parents[2]
ALLOWED = f"import pytest\ndef test_it(): pytest.skip({skips.NOT_LINUX!r})\n"
REFUSED = {
    "another_reason": "def test_it(): pytest.skip('not today')",
    "a_mark": "@pytest.mark.skip(reason='slow')\ndef test_it(): pass",
    "a_missing_package": "pytest.importorskip('no_such_package')",
    "a_whole_file": "pytest.skip('later', allow_module_level=True)",
    "no_cases": "@pytest.mark.parametrize('x', [])\ndef test_it(x): pass",
    "an_expected_failure": "@pytest.mark.xfail(reason='known')\ndef test_it(): assert False",
    "an_expected_failure_that_passes": "@pytest.mark.xfail\ndef test_it(): pass",
    "in_a_fixture": "@pytest.fixture\ndef f(): pytest.skip('no')\ndef test_it(f): pass",
}


def test_reasons_of_the_list_pass_and_others_fail_the_run(tmp_path: Path) -> None:
    (tmp_path / "none.ini").write_text("[pytest]\n", encoding="utf-8")
    (tmp_path / "test_allowed.py").write_text(ALLOWED, encoding="utf-8")
    for name, code in REFUSED.items():
        (tmp_path / f"test_{name}.py").write_text(f"import pytest\n{code}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-rA", "-p", "tests.kit.skips", "-p", "no:cacheprovider"]
    command += ["--continue-on-collection-errors", "-c", str(tmp_path / "none.ini"), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0, done.stdout
    for name in REFUSED:
        assert re.search(rf"^(FAILED|ERROR) .*test_{name}\.py", done.stdout, re.MULTILINE), f"{name}\n{done.stdout}"
    assert "1 skipped" in done.stdout
    assert not re.search(r"^(FAILED|ERROR|PASSED) .*test_allowed\.py", done.stdout, re.MULTILINE)
