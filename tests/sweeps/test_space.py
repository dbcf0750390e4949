"""A sweep file is checked against the config before any work, and says what is wrong in one line."""

import pytest

from sweeps.objective import objective_of
from sweeps.space_file import load_space, space_names
from wmdd.config.loading import load_config, preset_names
from wmdd.errors import InputError

HEAD = "[parameters]\n"


@pytest.mark.parametrize("name", space_names())
@pytest.mark.parametrize("preset", preset_names()[0])
def test_every_shipped_space_fits_every_preset(name, preset):
    config = load_config(preset)
    space = load_space(name, config)
    assert space.values_in(config)


def test_a_value_is_checked_under_the_condition_of_its_key(tmp_path):
    paper = load_config("digits+paper")  # its alternating weights refuse an entropy
    assert load_space("barycenter", paper).values_in(paper)["barycenter.weights"] == "alternating"
    path = tmp_path / "space.toml"
    path.write_text(HEAD + "barycenter.epsilon = { grid = [0.0, 0.1] }")
    with pytest.raises(InputError, match="alternating has exact plans"):
        load_space(str(path), paper)


def test_the_shipped_spaces_are_those_that_are_promised():
    assert space_names() == ["barycenter", "full", "regularization", "synthesis", "weights-and-lambda"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "synthesis.bn_wieght = { uniform = [1, 2] }",
            "unknown key 'synthesis.bn_wieght': did you mean 'synthesis.bn_weight'?",
        ),
        ("synthesis.lr = { uniform = [0, 1] }", "synthesis.lr = 0: expected a number above 0"),
        (
            "labels.crop_scale = { uniform = [0.5, 1.5] }",
            "labels.crop_scale = 1.5: expected 1 or less",
        ),
        ("synthesis.iterations = { uniform = [10, 20] }", "expected a whole number"),
        ("synthesis.start = { choice = ['noise', 'rael'] }", "synthesis.start = 'rael'"),
        ("synthesis.crop_scale = { choice = [[0.9, 0.1]] }", "the smallest crop 0.9 exceeds the largest 0.1"),
        ("method = { choice = ['wmdd', 'sre3l'] }", "no such method"),
        ("synthesis.lr = { loguniform = [0, 1] }", "must start above 0"),
        ("synthesis.lr = { uniform = [2, 1] }", "the first number must be below the second"),
        ("synthesis.lr = { choice = [] }", "expected a list that is not empty"),
        ("synthesis.lr = { unifrom = [1, 2] }", "expected one of loguniform, uniform, int, choice, grid"),
        ("synthesis.lr = { uniform = [1, 2], wen = { seed = [1] } }", "unknown option 'wen': did you mean 'when'?"),
        ("data.resolution = { choice = [8, 16] }", "a sweep cannot vary it: all trials are judged on the same images"),
        ("student.seeds = { choice = [1, 2] }", "a sweep cannot vary it: budget.student_seeds decides it"),
        ("synthesis.jitter = { int = [0, 2], when = { synthesis.start = ['real'] } }", "is not a key of the space"),
        (
            "synthesis.start = { choice = ['real'] }\n"
            "synthesis.jitter = { int = [0, 2], when = { synthesis.start = ['noise'] } }",
            "is not a value of that key",
        ),
        ("[budget]\niterations = 0.5", "[parameters] is empty"),
        (
            "synthesis.lr = { uniform = [1, 2] }\n[budgte]\niterations = 1",
            "unknown table 'budgte': did you mean 'budget'?",
        ),
        ("synthesis.lr = { uniform = [1, 2] }\n[budget]\niteration = 1", "unknown key budget.iteration: did you mean"),
        (
            "synthesis.lr = { uniform = [1, 2] }\n[budget]\niterations = 1.5",
            "a share of the config's value such as 0.5",
        ),
        ("synthesis.lr = { uniform = [1, 2] }\n[budget]\nholdout_per_class = 0", "held out of the training set"),
        ("synthesis.iterations = { int = [1, 9] }\n[budget]\niterations = 5", "is fixed by budget.iterations"),
    ],
)
def test_bad_spaces_get_one_clear_line(tmp_path, text, message):
    path = tmp_path / "space.toml"
    path.write_text(HEAD + text)
    with pytest.raises(InputError) as error:
        load_space(str(path), load_config("digits"))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_the_nearest_space_is_offered():
    with pytest.raises(InputError, match="did you mean 'regularization'"):
        load_space("regularisation", load_config("digits"))


def test_the_test_set_is_refused_as_an_objective():
    with pytest.raises(InputError, match="a recipe chosen on the test set proves nothing"):
        objective_of("test-top1")


def test_keys_may_be_written_in_any_way_toml_has(tmp_path):
    config = load_config("digits")
    spellings = [
        "synthesis.lr = { uniform = [0.1, 1] }",
        '"synthesis.lr" = { uniform = [0.1, 1] }',
        "[parameters.synthesis]\nlr.uniform = [0.1, 1]",
    ]
    found = []
    for text in spellings:
        path = tmp_path / "space.toml"
        path.write_text(HEAD + text)
        found.append(load_space(str(path), config).parameters)
    assert found[0] == found[1] == found[2]


def test_a_conditional_key_is_there_only_under_its_condition(tmp_path):
    path = tmp_path / "space.toml"
    # The dependent key stands in a section that TOML reads first: order in the file does not matter.
    path.write_text(
        HEAD
        + "synthesis.jitter = { grid = [0, 1], when = { barycenter.weights = ['free'] } }\n"
        + "barycenter.weights = { choice = ['uniform', 'free'] }"
    )
    grid = load_space(str(path), load_config("digits")).grid()
    assert grid == [
        {"barycenter.weights": "uniform"},
        {"barycenter.weights": "free", "synthesis.jitter": 0},
        {"barycenter.weights": "free", "synthesis.jitter": 1},
    ]


def test_conditions_that_lead_back_to_themselves_are_refused(tmp_path):
    path = tmp_path / "space.toml"
    path.write_text(
        HEAD
        + "synthesis.start = { choice = ['real'], when = { barycenter.weights = ['free'] } }\n"
        + "barycenter.weights = { choice = ['free'], when = { synthesis.start = ['real'] } }"
    )
    with pytest.raises(InputError, match="form a cycle"):
        load_space(str(path), load_config("digits"))


def test_a_grid_takes_evenly_spaced_values_between_the_bounds(tmp_path):
    path = tmp_path / "space.toml"
    path.write_text(HEAD + "synthesis.bn_weight = { loguniform = [0.1, 1000.0], points = 5 }")
    values = [one["synthesis.bn_weight"] for one in load_space(str(path), load_config("digits")).grid()]
    assert values == pytest.approx([0.1, 1, 10, 100, 1000])
    assert values[0] == 0.1 and values[-1] == 1000.0
