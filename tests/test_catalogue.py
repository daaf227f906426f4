"""Lists, descriptions and the generated table of support."""

import re

import pytest

from effivlm import registry
from effivlm.catalogue import LISTS, describe, supported
from effivlm.methods.base import IntraLLM
from effivlm.setting import parse_setting


def test_every_pair_is_in_the_table_and_every_refusal_has_a_reason():
    lines = list(LISTS["support"]())
    families = [
        c.strip()
        for c in next(line for line in lines if line.startswith("| method")).split("|")[3:-1]
    ]
    reasons = {m[1]: m[2] for line in lines if (m := re.fullmatch(r"(\d+)\. (.+)", line))}
    rows = {
        c[1].strip(): [x.strip() for x in c[3:-1]]
        for c in (line.split("|") for line in lines)
        if len(c) > 3
    }
    methods = {n: c for n, c in registry.methods().items() if n != "none"}
    assert families == list(registry.families()) and set(methods) <= set(rows)
    for name, cls in methods.items():
        for family, cell in zip(families, rows[name], strict=True):
            assert supported(cls)[family] == ("" if cell == "+" else reasons[cell])
    refused = sum(cell != "+" for name in methods for cell in rows[name])
    assert 0 < refused < 0.05 * len(families) * len(methods), "few pairs may be unsupported"


@pytest.mark.parametrize(
    ("name", "preset", "means"),
    [
        ("sparsevlm", "preset=192", ("206.5 (35.9 %)", "187.8 (32.6 %)")),
        ("sparsevlm", "variant=plus,preset=64", ("81.8", "69.5")),
        ("adaptinfer", "preset=64", ("82.9",)),
        ("pyramiddrop", "preset=paper", ("270.0 (46.9 %)",)),
        ("fitprune", "preset=60", ("246.9",)),
    ],
)
def test_published_schedules_are_shown_with_their_true_average(name, preset, means):
    (line,) = [line for line in describe(name) if line.startswith(f"published {name}:{preset}:")]
    assert all(m in line for m in means), line


def test_every_preset_can_be_written_as_a_setting():
    for name, cls in registry.methods().items():
        for fields in cls.presets if issubclass(cls, IntraLLM) else ():
            assert str(parse_setting(f"{name}:{fields}")) == f"{name}:{fields}"
    assert not any("published" in line for line in describe("sparsevlm_rank"))
