"""What the documents show is what works."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_example_method_is_the_one_in_the_docs():
    shown = re.search(
        r"```python\n(.*?)```", (ROOT / "docs/adding-a-method.md").read_text(), re.S
    ).group(1)
    code = (ROOT / "examples/edges.py").read_text()
    assert shown.strip() == code.strip()
    assert len(code.splitlines()) <= 40


def test_a_method_in_one_file_is_found_and_passes_the_contract(tmp_path):
    """A copy of the package with one file more; no other file is touched."""
    import shutil

    shutil.copytree(
        ROOT / "src/effivlm",
        tmp_path / "effivlm",
        ignore=shutil.ignore_patterns("checkpoints", "__pycache__"),
    )
    shutil.copy(ROOT / "examples/edges.py", tmp_path / "effivlm/methods/pre_llm/edges.py")
    shutil.copytree(
        ROOT / "tests", tmp_path / "tests", ignore=shutil.ignore_patterns("golden", "__pycache__")
    )
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


def test_the_readme_has_both_commands_and_its_experiment_can_be_read():
    import yaml

    from effivlm.config import build_experiment

    text = (ROOT / "README.md").read_text()
    assert re.findall(r"^make (\w+)$", text, re.M) == ["demo", "test"]
    (shown,) = re.findall(r"```yaml\n(.*?)```", text, re.S)
    experiment = build_experiment(yaml.safe_load(shown), "README.md")
    assert experiment.settings[0] == "none" and len(experiment.settings) == 17


def test_experiments_round_trip_through_yaml():
    import yaml

    from effivlm.config import (
        build_experiment,
        default_experiment,
        dump_experiment,
        load_experiment,
    )

    for path in (
        default_experiment(),
        *(ROOT / "gpu/measure").glob("*.yaml"),
        *(ROOT / "experiments").glob("*.yaml"),
    ):
        experiment = load_experiment(path)
        assert build_experiment(yaml.safe_load(dump_experiment(experiment)), "again") == experiment


def test_verbs_in_the_readme_are_those_of_the_command_line():
    from effivlm.cli import app

    shown = set(re.findall(r"^effivlm (\w+)", (ROOT / "README.md").read_text(), re.M))
    verbs = {c.name or c.callback.__name__.rstrip("_") for c in app.registered_commands}
    assert shown == verbs | {g.name for g in app.registered_groups}


def test_scripts_are_listed():
    for folder in ("gpu", "benchmarks"):
        text = (ROOT / folder / "README.md").read_text()
        for script in [*(ROOT / folder).glob("*.py"), *(ROOT / folder).glob("*.sh")]:
            assert f"{script.name}" in text, script


def test_contract_table_names_tests_that_exist():
    """Section 11 of the design: every item has a test, and the test is there."""
    from effivlm.contract import families, gate

    table = (ROOT / "docs/design.md").read_text().split("## 11. ")[1]
    assert [int(n) for n in re.findall(r"^\| (\d+) \|", table, re.M)] == list(range(1, 21))
    rules = {r.check.__name__ for r in gate.RULES} | {r.__name__ for r in families.RULES}
    named = {n for n in re.findall(r"`(\w+)`", table) if not n.startswith("test_")}
    assert {r.check.__name__ for r in gate.RULES} <= named and named - {"repack"} <= rules
    for path, names in re.findall(r"`(test_\w+\.py)`: ([^|;]+)", table):
        source = (ROOT / "tests" / path).read_text()
        for name in re.findall(r"`(\w+)`", names):
            assert f"def {name}(" in source, f"{path} has no {name}"
