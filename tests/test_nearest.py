from debiformer.nearest import did_you_mean


def test_near_names_are_offered_nearest_first():
    assert did_you_mean("debiformer_tinny", ["resnet50", "debiformer_small", "debiformer_tiny"]).startswith(
        "did you mean debiformer_tiny or"
    )


def test_far_names_are_answered_with_all_of_a_short_list_and_none_of_a_long_one():
    assert did_you_mean("zzz", ["fit", "test"]) == "choose from fit, test"
    assert "name17" not in did_you_mean("zzz", [f"name{i}" for i in range(100)])
