"""The commit of the checkout, here and as the testbed passes it on."""

import os
from pathlib import Path

import pytest

from pykvm.host.checkout import commit

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.unit
def test_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYKVM_COMMIT", "abcdef123456+")
    assert commit() == "abcdef123456+"
    monkeypatch.delenv("PYKVM_COMMIT")
    if (ROOT / ".git").is_dir():
        head = (ROOT / ".git/HEAD").read_text().strip()
        if head.startswith("ref: ") and (ROOT / ".git" / head[5:]).exists():
            head = (ROOT / ".git" / head[5:]).read_text().strip()
            assert commit().rstrip("+") == head[:12]
            monkeypatch.setenv("GIT_DIR", "/nonexistent")  # must not select another repository
            assert commit().rstrip("+") == head[:12]
    monkeypatch.setenv("PATH", os.devnull)
    assert commit() == ""
