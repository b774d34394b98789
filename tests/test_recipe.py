"""Recipes: what is possible, what is refused and how, YAML in and out, and which rule decides."""

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from bittern.errors import RecipeError
from bittern.recipe import Format, Recipe, Role, Rule, load_recipe, recipe_names

READY_MADE = ["ternary", "ternary-2-2-8", "vt-w4a4", "vt-w6a6", "vt-w8a8", "w4a4", "w4a8", "w6a6", "w8a8", "w8a8-token"]
property_test = settings(max_examples=100, deadline=None, derandomize=True, database=None)

TERNARY = Format(kind="ternary")
W8 = Format(bits=8, granularity="row", range="static")
A8 = Format(bits=8, scheme="asymmetric", range="static")
HEAD = Format(bits=8, granularity="head", range="static")
MAP = Format(bits=4, scheme="unsigned")


def one_line(error: pytest.ExceptionInfo[RecipeError]) -> str:
    """The message, which is one line."""
    message = str(error.value)
    assert len(message.splitlines()) == 1
    return message


# Formats


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "ternary", "bits": 3}, "ternary always has 2 bits, not 3; leave `bits` out"),
        ({"kind": "binary", "bits": 2}, "binary always has 1 bits, not 2; leave `bits` out"),
        ({"bits": 0}, "bits must be 1 to 12, got 0"),
        ({"bits": 13}, "bits must be 1 to 12, got 13"),
        ({"bits": 1}, "needs 2 bits or more; use kind: binary for 1 bit"),
        ({"kind": "ternary", "scheme": "unsigned"}, "scheme: unsigned has no meaning for kind: ternary; leave it out"),
        ({"kind": "binary", "scheme": "asymmetric"}, "has no meaning for kind: binary; leave it out"),
        ({"granularity": "group"}, "group_size goes with granularity: group"),
        ({"group_size": 8}, "group_size goes with granularity: group"),
        ({"granularity": "group", "group_size": 1}, "group_size must be 2 or more, got 1"),
        ({"clip": 0.0}, "clip must be positive and finite, got 0.0; leave it out"),
        ({"clip": -2.5}, "clip must be positive and finite, got -2.5"),
        ({"clip": math.nan}, "clip must be positive and finite, got nan"),
        ({"clip": math.inf}, "clip must be positive and finite, got inf"),
        ({"range": "static", "granularity": "token"}, "a static scale cannot be per token.*; use tensor or head"),
        ({"storage": "base3"}, "storage: base3 is for kind: ternary only"),
    ],
    ids=str,
)
def test_impossible_format(fields: dict[str, Any], message: str) -> None:
    """A format that cannot be is refused with what is wrong and what to write instead."""
    with pytest.raises(ValidationError, match=message):
        Format(**fields)


@pytest.mark.parametrize(("kind", "bits"), [("ternary", 2), ("binary", 1), ("uniform", 8)])
def test_bits_left_out(kind: Any, bits: int) -> None:
    """Without `bits` a format has those that its kind fixes, or 8."""
    assert Format(kind=kind).bits == bits


@pytest.mark.parametrize(
    ("fmt", "text"),
    [
        (TERNARY, "ternary per tensor"),
        (Format(kind="ternary", storage="base3", granularity="row"), "ternary per row, base 3"),
        (Format(kind="binary", range="static"), "binary per tensor, static"),
        (Format(bits=3, granularity="group", group_size=64), "uniform 3-bit per group of 64"),
        (A8, "uniform 8-bit asymmetric per tensor, static"),
        (Format(bits=1, scheme="unsigned", granularity="token"), "uniform 1-bit unsigned per token"),
        (MAP, "uniform 4-bit unsigned per tensor"),
    ],
    ids=str,
)
def test_format_in_words(fmt: Format, text: str) -> None:
    """A format reads as kind, bits, scheme, unit and range."""
    assert str(fmt) == text


# Rules


@pytest.mark.parametrize(
    ("field", "fmt", "message"),
    [
        ("weight", Format(granularity="token"), "a weight has no tokens; use tensor, row or group"),
        ("weight", Format(granularity="head"), "a weight has no heads; use tensor, row or group"),
        ("input", W8, "the input of a layer has no rows; use tensor or token"),
        ("input", Format(granularity="group", group_size=8), "the input of a layer has no groups; use tensor or token"),
        ("input", HEAD, "the input of a layer has no heads; use tensor or token"),
        *(
            (field, fmt, f"{field} has no {fmt.granularity}s; use tensor, token or head")
            for field in ("query", "key", "value", "map")
            for fmt in (W8, Format(granularity="group", group_size=8))
        ),
        *(
            (field, Format(kind=kind), f"kind: {kind} is for weights; use uniform for {field}")
            for field in ("input", "query", "key", "value", "map")
            for kind in ("ternary", "binary")
        ),
    ],
    ids=str,
)
def test_impossible_rule(field: str, fmt: Format, message: str) -> None:
    """A format where it cannot be is refused with what is wrong and what to use instead."""
    with pytest.raises(ValidationError, match=message):
        Rule(**{field: fmt})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"roles": ("qkv", "ffn"), "query": HEAD}, "formats of the role attention; add it to roles"),
        ({"roles": ("attention",), "weight": W8}, "attention has no weight and input"),
    ],
)
def test_rule_that_could_never_select(fields: dict[str, object], message: str) -> None:
    """A rule whose formats do not belong to its roles is refused, since it would do nothing."""
    with pytest.raises(ValidationError, match=message):
        Rule(**fields)


@pytest.mark.parametrize(
    ("rule", "is_float", "for_layers", "for_attention"),
    [
        (Rule(), True, False, False),
        (Rule(weight=TERNARY), False, True, False),
        (Rule(input=A8), False, True, False),
        (Rule(query=HEAD), False, False, True),
        (Rule(weight=W8, map=MAP), False, True, True),
    ],
    ids=str,
)
def test_what_a_rule_is_for(rule: Rule, is_float: bool, for_layers: bool, for_attention: bool) -> None:
    """A rule is for layers, for attention or for both by the formats it has, and keeps float without any."""
    assert (rule.is_float, rule.for_layers, rule.for_attention) == (is_float, for_layers, for_attention)


# Recipes

ORDERED = Recipe(
    name="ordered",
    rules=(
        Rule(modules="encoder.0.*"),
        Rule(modules="*.query", roles=("qkv",), weight=TERNARY),
        Rule(roles=("qkv", "ffn"), weight=W8),
        Rule(modules="encoder.*", query=HEAD, map=MAP),
        Rule(roles=("stem", "attention"), input=A8, key=HEAD),
    ),
)


@pytest.mark.parametrize(
    ("name", "role", "decides"),
    [
        ("encoder.0.query", "qkv", 0),
        ("encoder.0.attention", "attention", 0),
        ("encoder.1.query", "qkv", 1),
        ("encoder.1.query", "ffn", 2),
        ("encoder.1.value", "qkv", 2),
        ("encoder.1.attention", "attention", 3),
        ("encoder.1.stem", "stem", 4),
        ("decoder.1.attention", "attention", 4),
        ("encoder.1.other", "other", None),
        ("Encoder.0.other", "other", None),
    ],
)
def test_first_matching_rule_wins(name: str, role: Role, decides: int | None) -> None:
    """The first rule whose glob, roles and formats fit a module decides, and without one it has none."""
    assert ORDERED.rule_for(name, role) == (Rule() if decides is None else ORDERED.rules[decides])


MODULES: dict[str, Role] = {"encoder.0.query": "qkv", "encoder.0.ffn": "ffn", "encoder.0.attention": "attention"}


@pytest.mark.parametrize(
    ("rule", "parts"),
    [
        (Rule(modules="encoder.0.qery", weight=W8), ("'encoder.0.qery' matches nothing", "encoder.0.query")),
        (Rule(modules="blocks.*", weight=W8), ("'blocks.*' matches nothing", "for example, encoder.0.")),
        (Rule(modules="zzz"), ("'zzz' matches nothing", "for example, encoder.0.query")),
        (Rule(modules="*.ffn", roles=("qkv",), weight=W8), ("encoder.0.ffn has the role ffn", "does not address")),
        (Rule(modules="*.ffn", map=MAP), ("encoder.0.ffn has the role ffn", "does not address")),
        (Rule(modules="*.attention", weight=W8), ("encoder.0.attention has the role attention", "does not address")),
    ],
    ids=str,
)
def test_glob_that_matches_nothing(rule: Rule, parts: tuple[str, ...]) -> None:
    """A glob that selects no module is refused with the recipe, the glob and the names that come nearest."""
    with pytest.raises(RecipeError) as error:
        Recipe(name="mine", rules=(rule, Rule(weight=W8))).check_globs(MODULES)
    assert all(part in one_line(error) for part in ("recipe mine", *parts))


def test_globs_that_match() -> None:
    """Globs that select something pass, and so do rules for roles that this model does not have."""
    rules = (Rule(modules="*.ffn"), Rule(modules="encoder.*", map=MAP), Rule(roles=("pooler",), weight=W8))
    Recipe(name="mine", rules=rules).check_globs(MODULES)


@pytest.mark.parametrize(
    ("model", "field"), [(Format(), "bits"), (Rule(), "weight"), (ORDERED, "rules")], ids=["format", "rule", "recipe"]
)
def test_frozen(model: BaseModel, field: str) -> None:
    """Formats, rules and recipes do not change."""
    with pytest.raises(ValidationError, match="frozen"):
        setattr(model, field, None)


# YAML in and out


def test_ready_made_recipes_are_complete() -> None:
    """The ready-made recipes are those that the tests name."""
    assert recipe_names() == READY_MADE


@pytest.mark.parametrize("name", READY_MADE)
def test_ready_made_recipe(name: str) -> None:
    """Every ready-made recipe loads under its own name, quantizes layers and attention, and survives YAML."""
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.rule_for("any", "ffn").for_layers
    assert recipe.rule_for("any", "attention").for_attention
    assert recipe.rule_for("any", "head").is_float
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe


def test_ternary() -> None:
    """`ternary` is the published recipe without its clips."""
    published = load_recipe("ternary-2-2-8").model_dump()
    for rule in published["rules"]:
        for form in rule.values():
            if isinstance(form, dict):
                assert form["clip"] in (2.5, None)
                form["clip"] = None
    assert load_recipe("ternary").model_dump() == published | {"name": "ternary"}


FORMATS = st.sampled_from([None, Format(), Format(bits=2, scheme="unsigned", clip=2.5), Format(range="static")])
WEIGHTS = st.sampled_from([TERNARY, W8, Format(kind="ternary", storage="base3", granularity="group", group_size=128)])
MATMULS = st.sampled_from([None, HEAD, MAP, Format(range="static", clip=2.5)])
RULES = st.builds(
    Rule,
    modules=st.text(max_size=8),
    roles=st.sampled_from([(), ("ffn", "head", "attention")]),
    weight=st.none() | WEIGHTS,
    input=FORMATS,
    **dict.fromkeys(("query", "key", "value", "map"), MATMULS),
)


@settings(property_test, max_examples=30)
@given(name=st.text(), rules=st.lists(RULES, max_size=2), last=st.builds(Rule, weight=WEIGHTS))
def test_yaml_round_trip(name: str, rules: list[Rule], last: Rule) -> None:
    """Any recipe, whatever its name and globs, is the same after a trip through YAML."""
    recipe = Recipe(name=name, rules=(*rules, last))
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe


def test_yaml_is_short() -> None:
    """YAML keeps the order of the fields and leaves out what is the default, written or not."""
    recipe = Recipe(
        name="mine", rules=(Rule(modules="*", roles=("ffn",), weight=Format(bits=4, storage="bits"), input=Format()),)
    )
    lines = ["name: mine", "rules:", "- roles:", "  - ffn", "  weight:", "    bits: 4", "  input: {}"]
    assert recipe.to_yaml().splitlines() == lines


KEYS = st.sampled_from(["name", "rules", *Rule.model_fields, *Format.model_fields, "typo", "", 1, None])
LEAVES = st.sampled_from([None, True, 0, 2, 2.5, math.nan, "", "a\nb", "ternary", "static", "qkv", "group", "token"])
DATA = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner), max_leaves=12)


@property_test
@given(rules=DATA, fmt=st.dictionaries(KEYS, LEAVES | st.lists(LEAVES)), extra=st.dictionaries(KEYS, DATA, max_size=1))
def test_any_data_gives_a_recipe_or_one_line(rules: Any, fmt: Any, extra: dict[Any, Any]) -> None:
    """Whatever a file holds, the answer is a recipe or a RecipeError of one line that begins with its source."""
    for data in ({"name": "mine", "rules": rules}, {"name": "mine", "rules": [{"weight": fmt}]} | extra):
        try:
            answer: Recipe | str = Recipe.from_dict(data, "mine.yaml")
        except RecipeError as error:
            answer = str(error)
        assert isinstance(answer, Recipe) or (answer.startswith("mine.yaml: ") and len(answer.splitlines()) == 1)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("name: a\nrules:\n- weight: {bit: 4}", ("rules.0.weight", "unknown key 'bit'", "known: kind, bits, scheme")),
        ("name: a\nrules:\n- weight: {bits: 4}\n  weight: {bits: 8}", ("not valid YAML", "key 'weight' stands twice")),
        ("name: a\nrules:\n- map: {bit: 4}", ("rules.0.map", "unknown key 'bit'", "known: kind, bits, scheme")),
        (
            "name: a\nrules:\n- {wieght: {bits: 4}}",
            ("rules.0", "unknown key 'wieght'", "known: modules, roles, weight"),
        ),
        ("name: a\nrule: []\nrules:\n- weight: {}", ("recipe", "unknown key 'rule'", "known: name, rules")),
        ('name: a\n"x\\ny": 1\nrules: [{weight: {}}]', ("unknown key 'x\\ny'", "known: name, rules")),
        ("name: a\nrules:\n- {roles: [ffnn], weight: {}}", ("rules.0.roles.0", "'ffn'", "'pooler'", "got 'ffnn'")),
        ("name: a\nrules:\n- {roles: ffn, weight: {}}", ("rules.0.roles", "got 'ffn'")),
        ("name: a\nrules:\n- weight: {kind: ternery}", ("rules.0.weight.kind", "'ternary'", "got 'ternery'")),
        ("name: a\nrules:\n- weight: {kind: [ternary]}", ("rules.0.weight.kind", "'ternary'", "got ['ternary']")),
        ("name: a\nrules:\n- weight: {bits: four}", ("rules.0.weight.bits", "integer", "got 'four'")),
        ("name: a\nrules:\n- weight: {bits: 4.0}", ("rules.0.weight.bits", "integer", "got 4.0")),
        (
            "name: a\nrules:\n- weight: {learned: true}",
            ("rules.0.weight", "key 'learned'", "known: kind, bits"),
        ),
        ("name: a\nrules:\n- weight: {kind: log2}", ("rules.0.weight.kind", "'ternary'", "got 'log2'")),
        ("name: a\nrules:\n- weight: 4", ("rules.0.weight", "Format", "got 4")),
        ("name: a\nrules:\n- {}\n- weight: {bits: 13}", ("rules.1.weight", "bits must be 1 to 12, got 13")),
        ("name: a\nrules:\n- weight: {granularity: token}", ("rules.0", "a weight has no tokens", "use tensor, row")),
        ("name: a\nrules: 4", ("rules", "got 4")),
        ("name: 4\nrules:\n- weight: {}", ("name", "string", "got 4")),
        ("name: a", ("rules", "required")),
        ("rules:\n- weight: {}", ("name", "required")),
        ("name: a\nrules: []", ("no rule has a format, so nothing would be quantized",)),
        ("name: a\nrules:\n- {modules: x}", ("no rule has a format, so nothing would be quantized",)),
        ("- weight: {}", ("expected `name:` and `rules:`, got list",)),
        ("", ("expected `name:` and `rules:`, got NoneType",)),
        ("name: a\nrules: [", ("not valid YAML", "line 2")),
        ("name: a\nrules:\n\t- weight: {}", ("not valid YAML", "line 3")),
        ("name: 2024-13-45\nrules: []", ("not valid YAML", "month")),
        ("name: a\x00", ("not valid YAML", "special characters are not allowed")),
    ],
    ids=repr,
)
def test_mistake_in_a_file(text: str, parts: tuple[str, ...], tmp_path: Path) -> None:
    """A mistake in a file is one line that names the file, the place, what is allowed and what was given."""
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError) as error:
        load_recipe(path)
    assert all(part in one_line(error) for part in (f"{path}: ", *parts))


def test_binary_file(tmp_path: Path) -> None:
    """A file that is no text is refused by name."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"\x80\xff\x00\x9f")
    with pytest.raises(RecipeError) as error:
        load_recipe(path)
    assert one_line(error) == f"{path}: not a text file; expected YAML"


@pytest.mark.parametrize(
    "name", ["w8a9", "W8A8", "", ".", "missing/mine.yaml", "x" * 300, "a\x00b", "name: a\nrules: []"]
)
def test_unknown_recipe(name: str) -> None:
    """What is neither a ready-made recipe nor a file is refused with all names there are."""
    with pytest.raises(RecipeError) as error:
        load_recipe(name)
    assert all(part in one_line(error) for part in (repr(name), *READY_MADE, "path to a YAML file"))


def test_load_own_recipe(tmp_path: Path) -> None:
    """One's own recipe loads from a path, as text or Path, and a Recipe is returned as it is."""
    path = tmp_path / "mine.yaml"
    path.write_text(ORDERED.to_yaml(), encoding="utf-8")
    assert load_recipe(path) == load_recipe(str(path)) == ORDERED
    assert load_recipe(ORDERED) is ORDERED
