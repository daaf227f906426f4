"""Budgets and the text form of settings: one rule, round trips, and messages that say what to do."""

import pytest

from effivlm.budget import Budget, BudgetError, parse_budget, solve_mean, split
from effivlm.methods.kv_cache.adakv import AdaKV
from effivlm.methods.kv_cache.h2o import H2O
from effivlm.methods.kv_cache.pyramidkv import PyramidKV
from effivlm.methods.kv_cache.snapkv import SnapKV
from effivlm.methods.kv_cache.tova import Tova
from effivlm.registry import UnknownName
from effivlm.setting import Part, Setting, SettingError, parse_setting


@pytest.mark.parametrize(
    ("text", "n", "k"),
    [
        ("0.1", 576, 57),
        ("10%", 576, 57),
        ("1/3", 576, 192),
        ("1.0", 576, 576),
        ("64", 576, 64),
        ("64tok", 30, 30),
        ("1tok", 9, 1),
        ("0.001", 576, 1),
        ("0.29", 100, 29),
        ("2/9", 9, 2),
        ("0.1", 0, 0),
    ],
)
def test_one_rounding_rule(text, n, k):
    assert parse_budget(text, "visual").count(n) == k


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0", "asks for 0 tokens"),
        ("-0.1", "is the share -0.1"),
        ("1.5", "is the share 1.5"),
        ("abc", "is not a number"),
        ("1", "ambiguous"),
        ("0.0", "is the share 0"),
        ("1/0", "is not a number"),
        ("-3", "at least 1"),
        ("200%", "is the share 2"),
        ("", "is not a number"),
    ],
)
def test_bad_budgets_say_why(text, message):
    with pytest.raises(BudgetError, match=message):
        parse_budget(text, "visual")


def test_counts_make_no_sense_for_kv():
    with pytest.raises(BudgetError, match="give a share"):
        parse_setting("snapkv@64")


@pytest.mark.parametrize("weights", [[1, 1, 1], [3, 1, 0.5], [0, 0, 0], [5, 0, 1, 1]])
@pytest.mark.parametrize("total", [0, 1, 7, 20])
def test_split_is_exact_and_capped(weights, total):
    caps = [9] * len(weights)
    parts = split(total, weights, caps)
    assert sum(parts) == total and all(0 <= p <= 9 for p in parts)
    assert split(total, weights, caps) == parts


def test_split_is_largest_remainder():
    assert split(10, [3.6, 3.3, 3.1]) == [4, 3, 3]
    assert split(3, [1, 1, 1, 1]) == [1, 1, 1, 0]
    assert split(10, [100, 1, 1], [4, 9, 9]) == [4, 3, 3]
    with pytest.raises(BudgetError, match="only 6 fit"):
        split(7, [1, 1], [3, 3])


def test_solve_mean_meets_the_average():
    m = solve_mean(0.3, 32, [(2, 1.0)])
    assert abs((2 + 30 * m) / 32 - 0.3) < 1e-9
    with pytest.raises(BudgetError, match=r"smallest feasible share is above 0\.0625"):
        solve_mean(0.05, 32, [(2, 1.0)])


@pytest.mark.parametrize(
    "text",
    [
        "none",
        "visionzip@0.1",
        "visionzip@0.1 + snapkv@0.4",
        "divprune@1/3 + fastv@1/3",
        "fastv@0.15:layer=3,rows=all",
        "snapkv@0.2:rows=32,pooling=max",
        "fastv@0.4:unit=visual_mean",
        "uniform@0.5:positions=repack",
        "visionzip@64:ratio=8.0,positions=repack",
        "h2o@0.1:shared=true",
        "adakv@0.2",
        "adakv(snapkv:rows=32,kernel=7)@0.2",
        "adakv(snapkv:rows=32,kernel=7,pooling=max)@0.2:floor=0.3,normalize=true",
        "criticalkv(expected_attention:value_norms=false)@0.2",
        "layer_adaptive(look_m:merge=none)@0.2:uniform=0.4",
        "divprune@0.5 + adakv(snapkv:rows=32)@0.2:positions=repack",
        "divprune@0.5 + adakv(snapkv:rows=32)@0.2:floor=0.3,positions=repack",
    ],
)
def test_text_round_trips(text):
    setting = parse_setting(text)
    assert parse_setting(str(setting)) == setting
    assert str(parse_setting(str(setting))) == str(setting)
    assert str(setting) == text


def test_every_scorer_with_its_own_parameters_round_trips_in_a_wrapper():
    """The text of a held method is its own text form; what has its default is left out."""
    for inner in (
        SnapKV(rows=32, kernel=7),
        H2O(window=0.5),
        Tova(shared=False),
        PyramidKV(beta=9),
    ):
        setting = Setting((Part(AdaKV(inner, floor=0.3), parse_budget("0.2", "prompt_kv")),))
        assert parse_setting(str(setting)) == setting
        assert str(setting) == f"adakv({Part(inner, None)})@0.2:floor=0.3"
    assert str(parse_setting("adakv(snapkv:kernel=5)@0.2")) == "adakv@0.2"


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("fastvv@0.1", UnknownName, "did you mean fastv"),
        ("fastv@0.1:layr=3", SettingError, "did you mean layer"),
        ("fastv@0.1:layer=two", SettingError, "layer='two' is not a int"),
        ("fastv@0.1:layer", SettingError, "expected field=value"),
        ("fastv", BudgetError, "write for example fastv@0.1"),
        ("none@0.1", BudgetError, "takes no budget"),
        ("snapkv@0.1 + h2o@0.1", SettingError, "one such method"),
        ("fastv@0.1:unit=prompt_kv", BudgetError, "does not honour"),
        ("fastv@0.1:positions=repack", SettingError, "cuts before the LLM"),
        ("uniform@0.1:positions=sideways", SettingError, "expected one of original, repack"),
        ("", SettingError, "cannot read"),
        ("fastv@0.1:layer=0", ValueError, "layer"),
        ("fastv@0.1:layer=1,layer=2", SettingError, "says layer=1 and layer=2"),
        ("fastv@0.1:layer=1,layer=1", SettingError, "says layer=1 and layer=1"),
        (
            "uniform@0.5:positions=repack + snapkv@0.5:positions=original",
            SettingError,
            "both positions=repack and positions=original",
        ),
        ("adakv(snapkv:rows=8,rows=9)@0.2", SettingError, "says rows=8 and rows=9"),
        ("adakv@0.2:base=h2o", SettingError, r"stands in brackets: adakv\(h2o\)"),
        ("adakv(snapkv@0.2)", BudgetError, r"belongs to the whole: write adakv\(snapkv\)@0.2"),
        ("adakv(snapkv:rows=9)", BudgetError, r"write for example adakv\(snapkv:rows=9\)@0.1"),
        ("adakv(snapkw)@0.2", UnknownName, "did you mean snapkv"),
        ("adakv(snapkv:row=9)@0.2", SettingError, "unknown parameter of snapkv 'row'"),
        ("adakv(snapkv:positions=repack)@0.2", SettingError, "unknown parameter of snapkv"),
        ("adakv(streaming_llm)@0.2", SettingError, "cannot wrap streaming_llm: expected .*h2o"),
        ("adakv(criticalkv(h2o))@0.2", SettingError, "adakv cannot wrap criticalkv"),
        ("adakv(snapkv(h2o))@0.2", SettingError, r"snapkv wraps no other .* leave out \(h2o\)"),
        ("snapkv(h2o)@0.2", SettingError, r"snapkv wraps no other method: leave out \(h2o\)"),
        ("adakv()@0.2", SettingError, "cannot read ''"),
        ("adakv(snapkv@0.2", SettingError, "cannot read"),
        ("adakv@0.2(snapkv)", SettingError, "cannot read"),
    ],
)
def test_bad_settings_say_why(text, error, message):
    with pytest.raises(error, match=message):
        parse_setting(text)


def test_budget_counts_are_per_image_and_full_is_known():
    assert Budget(1.0, None, "visual", "1.0").full and not parse_budget("64", "visual").full
