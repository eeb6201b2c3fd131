"""The README's Python example, as it stands there."""

import shutil
import subprocess
import sys

from conftest import CALL_SECONDS, FIXTURES, ROOT


def test_the_example_streams_an_answer(cluster, tmp_path):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    example = text.split("```python\n")[1].split("```")[0]
    assert "http://127.0.0.1:8080" in example
    example = example.replace("http://127.0.0.1:8080", cluster.http)
    shutil.copy(FIXTURES / "media" / "photo.jpg", tmp_path / "photo.jpg")
    run = subprocess.run(
        [sys.executable, "-c", example],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=CALL_SECONDS,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip()
