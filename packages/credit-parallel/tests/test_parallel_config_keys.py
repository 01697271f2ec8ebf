"""Every key of a configuration: what it takes, what is said of the rest, and that the JSON schema agrees."""

from __future__ import annotations

import math

import pytest
import yaml
from hypothesis import assume, given
from hypothesis import strategies as st

from credit_parallel.app.config import ConfigError, RunConfig

SCHEMA = RunConfig.json_schema()


def number(value, least=-math.inf, most=math.inf):
    return type(value) in (int, float) and least <= value <= most


def whole(value, least):
    return type(value) is int and value >= least


def listed(value, fits):
    return isinstance(value, list) and all(map(fits, value))


def text(value):
    return isinstance(value, str)


def pair(value, fits):
    return listed(value, lambda end: end is None or fits(end)) and len(value) == 2


# By key: values that it takes, and whether it takes a value.
TEXT = (st.text(min_size=1), lambda value: text(value) and value != "")
FLAG = (st.booleans(), lambda value: isinstance(value, bool))
WHOLE = (st.integers(0, 10**6), lambda value: whole(value, 0))
COUNT = (st.integers(1, 10**6), lambda value: whole(value, 1))
NUMBER = (st.floats(0, 10) | st.integers(0, 3), lambda value: number(value, 0))
POSITIVE = (st.floats(1e-9, 10), lambda value: number(value, 0) and value > 0)
SECONDS = (st.floats(1, 1e8), lambda value: number(value, 0, 1e8) and value > 0)
NAMES = (
    st.none() | st.text() | st.lists(st.text(), max_size=3),
    lambda value: value is None or text(value) or listed(value, text),
)
LEVELS = (
    st.none() | st.floats(1, 1000) | st.lists(st.floats(1, 1000), max_size=3),
    lambda value: value is None or number(value) or listed(value, number),
)
TWO = {"min_size": 2, "max_size": 2}
TIMES = (
    st.none() | st.lists(st.none() | st.floats(0, 1), **TWO) | st.lists(st.none() | st.dates() | st.text(), **TWO),
    lambda value: value is None or pair(value, lambda end: number(end, 0, 1)) or pair(value, text),
)
LEAD = (st.integers(1, 99) | st.text(), lambda value: text(value) or whole(value, 1))
BETAS = (
    st.lists(st.floats(0, 0.99), **TWO),
    lambda value: listed(value, lambda beta: number(beta, 0) and beta < 1) and len(value) == 2,
)
OPTIONS = (
    st.none() | st.dictionaries(st.text(), st.integers()),
    lambda value: value is None or isinstance(value, dict),
)


def choice(*values):
    return st.sampled_from(values), lambda value: (value is None or text(value)) and value in values


NORM = (st.none() | POSITIVE[0], lambda value: value is None or POSITIVE[1](value))
KEYS = {
    "folder": TEXT,
    "data.source": TEXT,
    "data.variables": NAMES,
    "data.levels": LEVELS,
    "data.lead": LEAD,
    "data.history": COUNT,
    "data.forcings": NAMES,
    "data.train": TIMES,
    "data.valid": TIMES,
    "data.workers": WHOLE,
    "data.options": OPTIONS,
    "model.name": TEXT,
    "trainer.parallelism.data": choice("fsdp2", "ddp", "none"),
    "trainer.parallelism.tensor": COUNT,
    "trainer.parallelism.domain": COUNT,
    "trainer.parallelism.partition": choice("auto", "modules", "graph"),
    "trainer.steps": COUNT,
    "trainer.epochs": (st.none(), lambda value: value is None),  # beside steps
    "trainer.max_grad_norm": NORM,
    "trainer.betas": BETAS,
    "trainer.fsdp2_blocks": NAMES,
    "trainer.latitude_weights": choice("cos", "cell", None),
    "trainer.device": choice("auto", "cpu", "cuda"),
    "trainer.dtype": choice("float32", "float64"),
    **dict.fromkeys((f"trainer.{key}" for key in ("batch_size", "grad_accum_steps", "rollout", "keep")), COUNT),
    **dict.fromkeys((f"trainer.{key}" for key in ("warmup", "seed", "valid_every", "checkpoint_every")), WHOLE),
    **dict.fromkeys((f"trainer.{key}" for key in ("activation_checkpoint", "find_unused_parameters")), FLAG),
    **dict.fromkeys((f"trainer.{key}" for key in ("amp", "trial", "compile", "tensorboard")), FLAG),
    **dict.fromkeys((f"trainer.{key}" for key in ("timeout", "startup_timeout")), SECONDS),
    **dict.fromkeys((f"trainer.{key}" for key in ("weight_decay", "final_lr")), NUMBER),
    "trainer.log_every": COUNT,
    "trainer.lr": POSITIVE,
}
BLOCKS = ("data", "model", "trainer", "trainer.parallelism")
SCALARS = st.one_of(
    *(st.none(), st.booleans(), st.integers(-2, 3), st.floats(-2, 2), st.text(max_size=3)),
    st.sampled_from([1.0, 1e8, 2e8, 10**400, "cos", "float64", "ddp", "2019-03-01", "1e-3", "3"]),
)
VALUES = (
    SCALARS | st.lists(SCALARS, max_size=3) | st.lists(st.floats(0, 1), **TWO) | st.dictionaries(st.text(), SCALARS)
)


def block_at(conf, path):
    for key in path.split(".") if path else ():
        conf = conf.setdefault(key, {})
    return conf


def put(conf, path, value):
    block, _, key = path.rpartition(".")
    block_at(conf, block)[key] = value


def leaves(conf, path=""):
    for key, value in conf.items():
        at = f"{path}{key}"
        yield from leaves(value, f"{at}.") if at in BLOCKS else [at]


@st.composite
def configurations(draw):
    """Those that are right, with any of the keys."""
    conf = {"trainer": {"steps": 1}}
    for path in draw(st.lists(st.sampled_from(sorted(KEYS)), unique=True)):
        put(conf, path, draw(KEYS[path][0]))
    if conf["trainer"].get("amp"):
        conf["trainer"].pop("dtype", None)
    for key, value in draw(st.dictionaries(st.text(), SCALARS, max_size=2)).items():
        conf.setdefault("model", {}).setdefault(key, value)  # an option
    return conf


def fits(schema, value):
    """Whether a value is as a JSON schema has it, as far as the schema of a configuration goes."""
    kinds = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None)}

    def type_is(kind):
        if kind in ("integer", "number"):
            return number(value) and (kind == "number" or value == math.floor(value))
        return isinstance(value, kinds[kind])

    def keys_fit(properties):
        extra = schema.get("additionalProperties", True)
        return not isinstance(value, dict) or all(
            fits(properties[key], inner) if key in properties else extra for key, inner in value.items()
        )

    rules = {
        "$ref": lambda ref: fits(SCHEMA["$defs"][ref.removeprefix("#/$defs/")], value),
        "anyOf": lambda options: any(fits(option, value) for option in options),
        "oneOf": lambda options: sum(fits(option, value) for option in options) == 1,
        "type": type_is,
        "enum": lambda values: value in values,
        "properties": keys_fit,
        "required": lambda keys: not isinstance(value, dict) or set(keys) <= set(value),
        "items": lambda item: all(fits(item, each) for each in value),
        "prefixItems": lambda items: all(fits(item, each) for item, each in zip(items, value, strict=False)),
        "minItems": lambda least: len(value) >= least,
        "maxItems": lambda most: len(value) <= most,
        "minLength": lambda least: len(value) >= least,
        "minimum": lambda least: value >= least,
        "exclusiveMinimum": lambda bound: value > bound,
        "maximum": lambda most: value <= most,
        "exclusiveMaximum": lambda bound: value < bound,
    }
    said = ("$schema", "$defs", "title", "description", "default", "deprecated", "additionalProperties")
    first = ("type",) if "type" in schema else ()  # the other rules are of that type
    return all(rules[key](schema[key]) for key in (*first, *schema) if key not in said)


def mistakes(conf):
    try:
        RunConfig.from_dict(conf)
    except ConfigError as error:
        return str(error).split("\n")
    return []


def test_all_keys_are_here():
    whole_one = RunConfig.from_dict({"trainer": {"steps": 1}}).to_dict()
    assert set(leaves(whole_one)) == set(KEYS)


@given(configurations())
def test_what_is_right_survives_a_file(tmp_path_factory, conf):
    path = tmp_path_factory.getbasetemp() / "right.yml"
    path.write_text(yaml.safe_dump(conf))
    run = RunConfig.from_file(path)
    path.write_text(run.to_yaml())
    assert RunConfig.from_file(path) == run
    assert RunConfig.from_dict(run.to_dict()) == run
    assert fits(SCHEMA, run.to_dict())


@given(st.sampled_from(sorted(KEYS)), VALUES)
def test_a_value_is_taken_or_told_in_a_line(path, value):
    conf = {"trainer": {"steps": 1}}
    put(conf, path, value)
    right = KEYS[path][1](value)
    told = mistakes(conf)
    assert len(told) == (0 if right else 1)
    for line in told:
        assert len(line.splitlines()) == 1
        assert line.startswith(f"{path} must be ") or (path, line[:10]) == ("trainer.epochs", "trainer: s")
    # JSON has one kind of number: 1.0 is whole.
    assert fits(SCHEMA, conf) == right or isinstance(value, float)


@given(st.sampled_from(["", "data", "trainer", "trainer.parallelism"]), st.text(), SCALARS)
def test_an_unknown_key_is_told_in_a_line(block, key, value):
    path = f"{block}.{key}" if block else key
    assume(path not in (*KEYS, *BLOCKS, "trainer.clip", "trainer.accumulate"))
    conf = {"trainer": {"steps": 1}}
    block_at(conf, block)[key] = value
    (line,) = mistakes(conf)
    assert len(line.splitlines()) == 1
    shown = key if key.isprintable() else repr(key)
    assert line.startswith(f"unknown key {block}{'.' if block else ''}{shown}: {value!r}; ")
    assert not fits(SCHEMA, conf)


@pytest.mark.parametrize("path", [key for key in (*KEYS, *BLOCKS) if key != "model.name"])
def test_a_misspelt_key_is_recognised(path):
    block, _, key = path.rpartition(".")
    conf = {"trainer": {"steps": 1}} if path != "trainer" else {}
    block_at(conf, block)[key[:2] + key[3:] if len(key) > 4 else f"{key}s"] = 1
    (line,) = mistakes(conf)
    assert line.endswith(f"; did you mean {key}?")


def test_the_words_for_choices_are_the_choices():
    seen = 0
    for block in SCHEMA["$defs"].values():
        for about in block["properties"].values():
            options = about.get("anyOf", [about])
            for option in options:
                if "enum" in option:
                    words = [*option["enum"], *(["null"] if {"type": "null"} in options else [])]
                    assert about["title"] == "one of " + ", ".join(words)
                    seen += 1
    assert seen == 5
