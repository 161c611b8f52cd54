"""Suggestions for misspelt names."""

from qwen_moe_jax.suggest import did_you_mean, similar

KNOWN = ("steps", "seed", "learning_rate")


def test_a_misspelt_name_is_answered_with_the_nearest_one():
    assert did_you_mean("stepz", KNOWN) == "did you mean 'steps'? "
    assert did_you_mean("learing_rate", iter(KNOWN)) == "did you mean 'learning_rate'? "


def test_nothing_is_suggested_where_nothing_is_similar():
    assert did_you_mean("xyz", KNOWN) == ""
    assert did_you_mean("steps", ()) == ""


def test_similar_names_come_most_similar_first():
    assert similar("step", ("seed", "stop", "steps"), count=2, cutoff=0.3) == ["steps", "stop"]
    assert similar("step", ("stop", "steps"), count=1) == ["steps"]
