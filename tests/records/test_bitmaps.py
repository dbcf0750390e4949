import numpy as np
import pytest
from pydantic import ValidationError
from report_runs import make_students
from scipy import stats

from wmdd.records.correct_bitmaps import by_class, mcnemar, pack, two_way, unpack
from wmdd.records.intervals import welch


def test_bits_come_back_and_a_test_set_of_355_images_takes_60_characters() -> None:
    correct = np.random.default_rng(0).random(355) < 0.9

    assert (unpack(pack(correct.tolist()), 355) == correct).all()
    assert len(pack(correct.tolist())) == 60
    with pytest.raises(ValueError, match="not one bit for each"):
        unpack(pack([True] * 9), 17)


def test_a_record_whose_bitmap_does_not_fit_its_test_images_is_refused() -> None:
    text = pack([True, False, True])

    assert make_students("wmdd", {"a": [0.9]}, correct=text, test_images=(2, 1))[0].correct == text
    with pytest.raises(ValidationError, match="correct needs test_images"):
        make_students("wmdd", {"a": [0.9]}, correct=text)
    with pytest.raises(ValidationError, match="not one bit for each of 12 test images"):
        make_students("wmdd", {"a": [0.9]}, correct=text, test_images=(2, 10))


def test_the_accuracy_of_a_class_is_that_of_its_own_images() -> None:
    assert by_class(np.array([True, False, True, True, True, False]), [2, 4]) == [0.5, 0.75]


def test_mcnemar_counts_what_only_one_got_right() -> None:
    one, other = np.array([1, 1, 1, 1, 0, 1, 0] * 3, bool), np.array([1, 0, 0, 1, 1, 0, 0] * 3, bool)

    assert mcnemar(one, other) == (9, 3, pytest.approx(stats.binomtest(9, 12).pvalue))
    assert mcnemar(one, one) == (0, 0, 1.0)


def test_an_interval_over_test_images_covers_what_other_test_images_would_show() -> None:
    random = np.random.default_rng(3)
    images, sets, covered, plain, draws = 100, 4, 0, 0, 300
    for _ in range(draws):
        # Each test image has a difficulty of its own; both methods are equally good on the population of images.
        chance = [np.clip(random.normal(0.7, 0.25, images), 0, 1) for _ in range(2)]
        sides = [
            np.array([random.random(images) < np.clip(own + random.normal(0, 0.01), 0, 1) for _ in range(sets)], float)
            for own in chance
        ]
        low, high = two_way(sides[0], sides[1], draws=150).bounds()  # type: ignore[arg-type]
        covered += low <= 0 <= high
        low, high = welch(*(side.mean(1).tolist() for side in sides)).bounds()
        plain += low <= 0 <= high

    assert covered / draws >= 0.93
    assert plain / draws < 0.9, "sets alone do not tell how other images would decide"
