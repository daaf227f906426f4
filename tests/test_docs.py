"""What the documents show is what works."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_example_method_is_the_one_in_the_docs():
    shown = re.search(r"```python\n(.*?)```", (ROOT / "docs/adding-a-method.md").read_text(), re.S).group(1)
    code = (ROOT / "examples/edges.py").read_text()
    assert shown.strip() == code.strip()
    assert len(code.splitlines()) <= 40


def test_a_method_in_one_file_is_found_and_passes_the_contract(tmp_path):
    """A copy of the package with one file more; no other file is touched."""
    import shutil

    shutil.copytree(ROOT / "src/effivlm", tmp_path / "effivlm", ignore=shutil.ignore_patterns("checkpoints", "__pycache__"))
    shutil.copy(ROOT / "examples/edges.py", tmp_path / "effivlm/methods/pre_llm/edges.py")
    shutil.copytree(ROOT / "tests", tmp_path / "tests", ignore=shutil.ignore_patterns("golden", "__pycache__"))
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/test_contract.py",
        "-k",
        "edges and (llava or qwen2_vl or internvl or idefics2)",
    ]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": f"{tmp_path}:{tmp_path}/tests", "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    passed = int(re.search(r"(\d+) passed", done.stdout).group(1))
    assert passed >= 15, done.stdout[-500:]


def test_readme_commands_are_make_targets():
    text, targets = (ROOT / "README.md").read_text(), (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", text, re.M):
        assert f"\n{target}:" in targets, target
