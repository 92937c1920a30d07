import pytest

from equalize.commands.compare.arms import ARMS, Arm, baselines, read_arm, read_arms
from equalize.errors import InputError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("none", Arm(name="none")),
        ("redrawn", Arm(name="redrawn", redrawn=True)),
        (" migrate ", Arm(name="migrate", strategy="migrate")),
        ("preserve+folded", Arm(name="preserve+folded", strategy="preserve", train_as="folded")),
        (
            "rescale+explicit+keep-norm",
            Arm(name="rescale+keep-norm+explicit", strategy="rescale", keep_norm=True, train_as="explicit"),
        ),
    ],
)
def test_names_of_arms(text, expected):
    assert read_arm(text) == expected


def test_every_arm_is_read_by_its_name():
    assert [read_arm(arm.name) for arm in ARMS] == list(ARMS)
    assert len({arm.name for arm in ARMS}) == len(ARMS)


@pytest.mark.parametrize(
    "text",
    [
        *("", "nothing", "rescale+", "rescale+fast", "none+keep-norm", "redrawn+explicit"),
        *("rescale+explicit+folded", "rescale+keep-norm+keep-norm", "keep-norm"),
    ],
)
def test_what_is_no_arm(text):
    with pytest.raises(InputError, match="--arms"):
        read_arm(text)


@pytest.mark.parametrize(
    "texts", [["none"], ["none", "none"], ["rescale+explicit+keep-norm", "rescale+keep-norm+explicit"]]
)
def test_two_different_arms_are_needed(texts):
    with pytest.raises(InputError, match="no two different arms"):
        read_arms(texts)


def test_redrawing_is_not_mistaken_for_equalizing():
    arms = read_arms(["reinit", "none", "redrawn", "rescale", "reinit+keep-norm"])
    assert baselines(arms) == [
        ("reinit", "none"),
        ("redrawn", "none"),
        ("rescale", "none"),
        ("reinit+keep-norm", "none"),
        ("reinit", "redrawn"),
        ("reinit+keep-norm", "redrawn"),
    ]


def test_without_none_the_first_arm_is_the_baseline():
    assert baselines(read_arms(["redrawn", "reinit"])) == [("reinit", "redrawn")]
    assert baselines(read_arms(["rescale", "migrate"])) == [("migrate", "rescale")]
