"""The parallelism block: what is accepted, and that every mistake is named."""

import numpy as np
import pytest

from credit_mesh import ParallelismConfig, dp_world_size, parse_parallelism_conf

FULL = {"data": "fsdp2", "tensor": 2, "domain": 4}


@pytest.mark.parametrize(
    "conf",
    [
        {"trainer": {"parallelism": FULL, "epochs": 3}, "model": {}},
        {"parallelism": FULL, "epochs": 3},
    ],
    ids=["whole configuration", "trainer section"],
)
def test_the_block_is_found_and_copied(conf: dict) -> None:
    parsed = parse_parallelism_conf(conf)
    assert parsed == FULL
    assert parsed is not FULL


def test_keys_left_out_take_their_defaults() -> None:
    assert parse_parallelism_conf({"parallelism": {}}) == {"data": "none", "tensor": 1, "domain": 1}
    assert parse_parallelism_conf({"parallelism": {"domain": 2}}) == {
        "data": "none",
        "tensor": 1,
        "domain": 2,
    }


def test_integers_of_other_types_become_int() -> None:
    parsed = parse_parallelism_conf({"parallelism": {"tensor": np.int64(2)}})
    assert type(parsed["tensor"]) is int


@pytest.mark.parametrize(
    ("conf", "message"),
    [
        ({}, "no parallelism block"),
        (None, "conf must be a mapping; got None"),
        ({"trainer": {}}, "no trainer.parallelism block"),
        ({"trainer": None}, "no trainer.parallelism block"),
        (FULL, "looks like the block itself"),
        ({"parallelism": None}, "must be a mapping .* got None"),
        ({"parallelism": {"tensors": 2}}, "unknown key .*'tensors': 2; the keys are data, tensor, domain"),
        (
            {"parallelism": {"data": "fsdp"}},
            "parallelism.data must be one of 'fsdp2', 'ddp', 'none'; got 'fsdp'",
        ),
        ({"parallelism": {"data": None}}, "parallelism.data .* got None"),
        ({"parallelism": {"tensor": 0}}, "parallelism.tensor must be an integer >= 1; got 0"),
        ({"parallelism": {"domain": -2}}, "parallelism.domain must be an integer >= 1; got -2"),
        ({"parallelism": {"tensor": True}}, r"parallelism.tensor .* got True \(bool\)"),
        ({"parallelism": {"tensor": 2.0}}, r"parallelism.tensor .* got 2.0 \(float\)"),
        ({"parallelism": {"domain": "2"}}, r"parallelism.domain .* got '2' \(str\)"),
        ({"parallelism": {"domain": None}}, r"parallelism.domain .* got None \(NoneType\)"),
    ],
)
def test_mistakes_are_named(conf: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_parallelism_conf(conf)  # type: ignore[arg-type]


def test_dp_size_is_what_tensor_and_domain_leave() -> None:
    assert dp_world_size(FULL, 8) == 1
    assert dp_world_size(FULL, 64) == 8
    assert dp_world_size(ParallelismConfig(tensor=3), 9) == 3
    assert dp_world_size({}, 7) == 7


def test_a_world_that_does_not_divide_says_which_degrees_fit() -> None:
    with pytest.raises(
        ValueError, match=r"world_size=12 .*= 8; tensor \* domain must be one of 1, 2, 3, 4, 6, 12; "
    ) as info:
        dp_world_size(FULL, 12)
    assert "with tensor=2, domain may be 1, 2, 3, 6" in str(info.value)
    assert "with domain=4, tensor may be 1, 3" in str(info.value)


@pytest.mark.parametrize("world_size", [0, -1, True, 2.0, "8", None])
def test_a_bad_world_size_is_refused(world_size: object) -> None:
    with pytest.raises(ValueError, match="world_size must be an integer >= 1"):
        dp_world_size({}, world_size)  # type: ignore[arg-type]


def test_a_config_is_frozen_and_comparable() -> None:
    config = ParallelismConfig.from_block(FULL)
    assert config == ParallelismConfig("fsdp2", 2, 4)
    assert config.to_dict() == FULL
    with pytest.raises(AttributeError):
        config.tensor = 3  # type: ignore[misc]
