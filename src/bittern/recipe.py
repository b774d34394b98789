"""Format, Rule and Recipe say what is quantized, and how: frozen and strict, YAML in and out."""

from __future__ import annotations

import os
from collections.abc import Iterable
from difflib import get_close_matches
from fnmatch import fnmatchcase
from importlib.resources import files
from math import inf
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Strict, ValidationError, model_validator

from bittern.errors import RecipeError

Role = Literal[
    "embedding", "position", "stem", "qkv", "attention_output", "ffn", "pooler", "head", "other", "attention"
]
Operand = Literal["query", "key", "value", "map"]
FIXED_BITS = {"ternary": 2, "binary": 1}  # of kinds; uniform has any
OPERANDS: tuple[Operand, ...] = Operand.__args__  # type: ignore[attr-defined]  # of the two matmuls of attention


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML in which no key may stand twice; YAML itself would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"key {twice[0]!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


class Format(_Strict):
    """Representation of one tensor: the code book, its granularity and where its scale comes from.

    kind: `uniform` (integers), `ternary` {-1, 0, 1} or `binary` {-1, 1}.
    bits: 2 to 12, fixed at 2 for ternary, 1 for binary; 1 is possible for unsigned codes.
    scheme: `symmetric` codes around zero, `unsigned` codes from zero, `asymmetric` codes from the minimum.
    granularity: one scale per `tensor`, weight `row` (output channel), `group` of `group_size` inputs of a row,
        activation `token`, or attention `head`.
    range: `dynamic` scales follow each tensor; `static` ones are found once and stored.
    clip: the tensor is first clipped to ±clip and gets no gradient outside (2.5 in the QAT papers).
    storage: ternary only: `bits` packs 4 codes in a byte, `base3` packs 5 (1.6 bits a weight).
    """

    kind: Literal["uniform", "ternary", "binary"] = "uniform"
    bits: int = 8
    scheme: Literal["symmetric", "unsigned", "asymmetric"] = "symmetric"
    granularity: Literal["tensor", "row", "group", "token", "head"] = "tensor"
    group_size: int | None = None
    range: Literal["dynamic", "static"] = "dynamic"
    clip: float | None = None
    storage: Literal["bits", "base3"] = "bits"

    @model_validator(mode="before")
    @classmethod
    def _fixed_bits(cls, data: Any) -> Any:
        return {"bits": FIXED_BITS.get(str(data.get("kind")), 8)} | data if isinstance(data, dict) else data

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.bits != (fixed := FIXED_BITS.get(self.kind, self.bits)):
            raise ValueError(f"{self.kind} always has {fixed} bits, not {self.bits}; leave `bits` out")
        if not 1 <= self.bits <= 12:
            raise ValueError(f"bits must be 1 to 12, got {self.bits}")
        if self.kind == "uniform" and self.scheme == "symmetric" and self.bits == 1:
            raise ValueError("a symmetric uniform format needs 2 bits or more; use kind: binary for 1 bit")
        if self.kind != "uniform" and self.scheme != "symmetric":
            raise ValueError(f"scheme: {self.scheme} has no meaning for kind: {self.kind}; leave it out")
        if (self.granularity == "group") != (self.group_size is not None):
            raise ValueError("group_size goes with granularity: group, and only with it")
        if self.group_size is not None and self.group_size < 2:
            raise ValueError(f"group_size must be 2 or more, got {self.group_size}")
        if self.clip is not None and not 0 < self.clip < inf:
            raise ValueError(f"clip must be positive and finite, got {self.clip}; leave it out for none")
        if self.range == "static" and self.granularity == "token":
            raise ValueError("a static scale cannot be per token, since tokens change; use tensor or head")
        if self.storage == "base3" and self.kind != "ternary":
            raise ValueError("storage: base3 is for kind: ternary only")
        return self

    def __str__(self) -> str:
        name = self.kind if self.kind in FIXED_BITS else f"{self.kind} {self.bits}-bit"
        scheme = "" if self.scheme == "symmetric" else f" {self.scheme}"
        unit = f"group of {self.group_size}" if self.group_size else self.granularity
        static, base = ", static" if self.range == "static" else "", ", base 3" if self.storage == "base3" else ""
        clip = "" if self.clip is None else f", clip {self.clip:g}"
        return f"{name}{scheme} per {unit}{static}{clip}{base}"


class Rule(_Strict):
    """Formats for the modules that a glob and a set of roles select. A rule without formats keeps them in float.

    `weight` and `input` apply to layers (Linear, Conv2d, Embedding, Conv1D);
    `query`, `key`, `value` and `map` to the two matmuls of attention modules (role `attention`).
    """

    modules: str = "*"
    roles: Annotated[tuple[Role, ...], Strict(False)] = ()  # YAML has lists
    weight: Format | None = None
    input: Format | None = None
    query: Format | None = None
    key: Format | None = None
    value: Format | None = None
    map: Format | None = None

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.weight is not None and self.weight.granularity in ("token", "head"):
            raise ValueError(f"a weight has no {self.weight.granularity}s; use tensor, row or group")
        if self.input is not None and self.input.granularity in ("row", "group", "head"):
            raise ValueError(f"the input of a layer has no {self.input.granularity}s; use tensor or token")
        for operand, fmt in self.operands.items():
            if fmt.granularity in ("row", "group"):
                raise ValueError(f"{operand} has no {fmt.granularity}s; use tensor, token or head")
        for field, fmt in self.formats.items():
            if field != "weight" and fmt.kind in ("ternary", "binary"):
                raise ValueError(f"kind: {fmt.kind} is for weights; use uniform for {field}")
        if self.roles and self.for_attention and "attention" not in self.roles:
            raise ValueError("query, key, value and map are formats of the role attention; add it to roles")
        if self.roles == ("attention",) and self.for_layers:
            raise ValueError("attention has no weight and input; its projections have the roles qkv, attention_output")
        return self

    @property
    def is_float(self) -> bool:
        return not (self.for_layers or self.for_attention)

    @property
    def for_layers(self) -> bool:
        return self.weight is not None or self.input is not None

    @property
    def for_attention(self) -> bool:
        return bool(self.operands)

    @property
    def formats(self) -> dict[str, Format]:
        """Formats that are given, by field."""
        return {field: fmt for field in ("weight", "input", *OPERANDS) if (fmt := getattr(self, field)) is not None}

    @property
    def operands(self) -> dict[str, Format]:
        """Formats of the operands of attention that get one."""
        return {field: fmt for field, fmt in self.formats.items() if field in OPERANDS}

    def selects(self, name: str, role: Role) -> bool:
        """True if this rule decides over the module; the first rule that does wins."""
        if (self.roles and role not in self.roles) or not fnmatchcase(name, self.modules):
            return False
        return self.is_float or (self.for_attention if role == "attention" else self.for_layers)


class Recipe(_Strict):
    """An ordered list of rules; the first that selects a module decides, and what none selects stays float."""

    name: str
    rules: Annotated[tuple[Rule, ...], Strict(False)]

    @model_validator(mode="after")
    def _some(self) -> Self:
        if all(rule.is_float for rule in self.rules):
            raise ValueError("no rule has a format, so nothing would be quantized")
        return self

    def rule_for(self, name: str, role: Role) -> Rule:
        """The first rule that selects a module; one without formats if none does."""
        return next((rule for rule in self.rules if rule.selects(name, role)), Rule())

    def check_globs(self, modules: dict[str, Role]) -> None:
        """Every glob must select something. Raises RecipeError with the names that come nearest."""
        for rule in self.rules:
            if rule.modules == "*" or any(rule.selects(name, role) for name, role in modules.items()):
                continue
            if named := next((n for n in modules if fnmatchcase(n, rule.modules)), None):
                hint = f"{named} has the role {modules[named]}, which the rule does not address"
            else:
                near = get_close_matches(rule.modules, modules, n=3, cutoff=0.3) or list(modules)[:3]
                hint = f"the model has, for example, {', '.join(near)}"
            raise RecipeError(f"recipe {self.name}: rule modules={rule.modules!r} matches nothing; {hint}")

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json", exclude_defaults=True), sort_keys=False)

    @classmethod
    def from_yaml(cls, text: str, source: str = "recipe") -> Recipe:
        """Parse a recipe. Raises RecipeError with the place and the fix."""
        try:
            data = yaml.load(text, _StrictLoader)
        except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that is none, say
            raise RecipeError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from None
        if not isinstance(data, dict):
            raise RecipeError(f"{source}: expected `name:` and `rules:`, got {type(data).__name__}")
        return cls.from_dict(data, source)

    @classmethod
    def from_dict(cls, data: dict[str, Any], source: str = "recipe") -> Recipe:
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise RecipeError(f"{source}: {_explain(error)}") from None


def recipe_names() -> list[str]:
    """Names of the ready-made recipes."""
    names = (path.name for path in (files("bittern") / "recipes").iterdir())
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))


def load_recipe(name_or_path: str | Path | Recipe) -> Recipe:
    """A ready-made recipe by name, or one's own by path to its YAML file.

    >>> load_recipe("w8a8").rules[-1].roles
    ('attention',)
    """
    if isinstance(name_or_path, Recipe):
        return name_or_path
    if (name := str(name_or_path)) in recipe_names():
        return Recipe.from_yaml((files("bittern") / "recipes" / f"{name}.yaml").read_text(), name)
    if os.path.isfile(name):  # False, and no error, for what cannot be a path
        try:
            return Recipe.from_yaml(Path(name).read_text(encoding="utf-8"), name)
        except UnicodeDecodeError:
            raise RecipeError(f"{name}: not a text file; expected YAML") from None
        except OSError as error:
            raise RecipeError(f"{name} cannot be read: {error.strerror}") from None
    raise RecipeError(f"no recipe {name!r}: give one of {', '.join(recipe_names())}, or a path to a YAML file")


def _explain(error: ValidationError) -> str:
    """Pydantic's first complaint as one line with the place, what is allowed and what was given."""
    first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")  # a typo explains what is missing
    loc = [str(p) for p in first["loc"]]
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        key = loc.pop()
        model = Recipe if not loc else Format if loc[-1] in Rule.model_fields else Rule
        message = f"unknown key {key!r}; known: {', '.join(model.model_fields)}"
    elif first["type"] not in ("value_error", "missing"):
        message = f"{message}, got {first['input']!r}"
    return f"{'.'.join(loc) or 'recipe'}: {message.replace('valid tuple', 'valid list')}"


def with_bits(recipe: Recipe, bits: int, name: str) -> Recipe:
    """Give weights of 4 bits another width. Raises RecipeError if there are none."""
    if not any(rule.weight and rule.weight.bits == 4 for rule in recipe.rules):
        raise RecipeError(f"recipe {recipe.name} has no weights of 4 bits that could have {bits}")

    def change(rule: Rule) -> Rule:
        if rule.weight is None or rule.weight.bits != 4:
            return rule
        return rule.model_copy(update={"weight": rule.weight.model_copy(update={"bits": bits})})

    return Recipe(name=name, rules=tuple(map(change, recipe.rules)))


def keep_wide(recipe: Recipe, blocks: Iterable[str], name: str) -> Recipe:
    """Let the weights of some blocks have 8 bits."""
    rule = next(rule for rule in recipe.rules if "ffn" in rule.roles)
    assert rule.weight is not None
    wide = {"roles": ("qkv", "attention_output", "ffn"), "weight": rule.weight.model_copy(update={"bits": 8})}
    rules = [rule.model_copy(update=wide | {"modules": f"{block}.*"}) for block in blocks]
    return Recipe(name=name, rules=(*rules, *recipe.rules))
