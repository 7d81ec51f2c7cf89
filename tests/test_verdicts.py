"""What `compare_estimators` says of its numbers: no trend off a line, no winner within errors."""

import json
import math

import numpy as np
import pandas
import pytest
from scipy import stats

from pyro_vae.comparison import Comparison
from pyro_vae.comparison.figures import _front
from pyro_vae.comparison.gradients import BLOCKS, line_through, slopes_of
from pyro_vae.comparison.steps import ROUNDS, _error_of_median
from pyro_vae.evaluation import Estimate

SETTINGS = {"num_data": 6, "batch_size": 6, "num_gradients": 100, "num_references": 0, "device": "cpu", "threads": 1}


def comparison(signal, error=0.02, K=(1, 4, 16), untrained=None, **columns):
    """One estimator, IWAE, whose signals of the model are these; of the guide they are 1 with large errors."""
    table = pandas.DataFrame({"estimator": "IWAE", "K": K, "seconds": 0.01, "seconds_standard_error": 0.001})
    for part, ratio, noise in (("model", signal, error), ("guide", 1.0, 0.5)):
        table[f"{part}_snr"], table[f"{part}_snr_whole"] = ratio, ratio
        table[f"{part}_snr_standard_error"] = table[f"{part}_snr_whole_standard_error"] = noise
        table[f"{part}_bias_z"] = math.nan
    for name in ("bound", "gap", "megabytes"):
        table[name] = 1.0
    for name in ("trained", "trained_standard_error", "trained_low", "trained_high", "trained_seconds"):
        table[name] = math.nan
    table["failed"] = 0
    table = table.assign(**columns)
    return Comparison(table, slopes_of(table), Estimate(0.0, 0.0), "exact", {}, SETTINGS | {"untrained": untrained})


TRENDS = {  # signals at K = 1, 4, 16: what is said, and how the text tells of it
    "falls as 1/2": ([1.0, 0.5, 0.25], "drowns with K, from 1 to 16", "K^(-0.50"),
    "falls and flattens": ([1.04, 0.62, 0.58], None, "no power of K for the model"),
    "falls and rises": ([1.0, 0.3, 0.9], None, "no power of K for the model"),
    "rises": ([1.0, 2.0, 4.0], None, "K^(0.50"),
    "falls little": ([1.0, 0.95, 0.9], None, "K^(-0.0"),
    "is all noise": ([1.0, 0.99, 1.02], None, "no power of K that is sure for the model"),
}


@pytest.mark.parametrize("name", TRENDS)
def test_a_trend_is_told_of_points_on_a_line(name):
    signal, sentence, text = TRENDS[name]
    found = comparison(signal)
    said = [each for each in found.verdict if "drowns" in each]
    assert said == ([] if sentence is None else [f"IWAE: the signal of the model's gradient {sentence}"])
    assert text in str(found)


def test_two_points_tell_of_no_trend():
    """A line always leads through them: the text names the range."""
    found = comparison([1.0, 0.5], K=(1, 4))
    assert found.verdict == []
    assert "for the model from K = 1 to 4" in str(found)
    assert comparison([1.0], K=(1,)).verdict == []
    assert "SNR ~" not in str(comparison([1.0], K=(1,)))


def test_the_test_of_a_line_keeps_its_level():
    """Points on lines, with errors from `BLOCKS` blocks: few are told to lie on none, curves all are."""
    draws = np.random.default_rng(0)
    K = np.array([1, 4, 16, 64])
    rejected = []
    for _ in range(4_000):
        exact = K**-0.5
        blocks = exact * np.exp(0.05 * draws.normal(size=(BLOCKS, 4)) * math.sqrt(BLOCKS))
        error = exact * np.log(blocks).std(0, ddof=1) / math.sqrt(BLOCKS)
        ratio = exact * np.exp(np.log(blocks / exact).mean(0))
        rejected.append(line_through(K, ratio, error).fit < 0.01)
    assert 0.005 < np.mean(rejected) < 0.05  # the errors have errors
    curved = line_through(K, np.array([1.0, 0.6, 0.6, 0.9]), 0.02 * np.ones(4))
    assert curved.fit < 1e-4
    assert math.isnan(line_through(K[:2], K[:2], 0.1 * K[:2]).fit)
    assert math.isnan(line_through(K[:1], K[:1], 0.1 * K[:1]).slope)
    by_scipy = stats.linregress(np.log(K), np.log([1.0, 0.6, 0.4, 0.2]))
    assert line_through(K, [1.0, 0.6, 0.4, 0.2], 0.1 * np.array([1.0, 0.6, 0.4, 0.2])).slope == pytest.approx(
        by_scipy.slope
    )


def trained(*intervals, untrained=None, failed=0):
    """Contestants with these 95 % intervals of log p(x)."""
    low, high = np.array(intervals).T
    columns = {"trained": (low + high) / 2, "trained_low": low, "trained_high": high, "failed": failed}
    K = tuple(range(1, len(intervals) + 1))
    return comparison([1.0] * len(K), error=0.5, K=K, untrained=untrained, **columns).verdict


def test_a_winner_leads_by_more_than_the_errors():
    assert trained((-3.0, -2.0), (-1.5, -1.0)) == ["IWAE, K = 2 trains best, log p(x) = -1.25"]
    (text,) = trained((-3.0, -1.4), (-1.5, -1.0))
    assert text.startswith("which trains best cannot be told: IWAE, K = 2 has log p(x) = -1.25; within the 95 %")
    assert "IWAE, K = 1;" in text
    (text,) = trained(*[(-2.0, -1.0)] * 7)
    assert "6 others" in text
    assert trained((-2.0, -1.0)) == ["IWAE, K = 1 trains to log p(x) = -1.50"]
    assert trained((math.nan, math.nan)) == []
    one_seed = comparison([1.0, 1.0], 0.5, (1, 2), trained=[-1.0, -2.0]).verdict
    assert one_seed == ["which trains best cannot be told where a single seed has been trained: name more --seeds"]


def test_a_winner_that_is_no_better_than_before_training():
    said = trained((-3.0, -2.0), (-1.5, -1.0), untrained=-1.4)
    assert said[1:] == ["no pair is surely better than before training, -1.40: train longer"]
    assert len(trained((-3.0, -2.0), (-1.5, -1.0), untrained=-5.0)) == 1


def test_failed_seeds_are_told():
    said = trained((-3.0, -2.0), (-1.5, -1.0), failed=[0, 2])
    assert said[1:] == ["seeds that ended in a loss that is not finite are left out: IWAE, K = 2: 2"]


FRONTS = {  # (time, its error, quality, its error) of each: which are best for their time
    "apart": ([(1, 0.1, 1, 0.1), (2, 0.1, 2, 0.1), (3, 0.1, 1.5, 0.1)], [0, 1]),
    "quality within errors": ([(1, 0.1, 1, 0.6), (2, 0.1, 2, 0.6)], [0]),
    "time within errors": ([(1, 0.6, 1, 0.1), (2, 0.6, 2, 0.1)], [1]),
    "both within errors": ([(1, 0.6, 1, 0.6), (2, 0.6, 2, 0.6)], []),
    "unknown errors": ([(1, math.inf, 1, math.inf), (2, math.inf, 2, math.inf)], []),
}


@pytest.mark.parametrize("name", FRONTS)
def test_the_best_for_their_time(name):
    points, expected = FRONTS[name]
    time, of_time, quality, of_quality = (pandas.Series(each) for each in zip(*points, strict=True))
    assert _front(time, quality, of_time, of_quality) == expected


def test_the_error_of_a_median_time():
    draws = np.random.default_rng(0).normal(1.0, 0.1, size=(4_000, ROUNDS))
    told = np.mean([_error_of_median([*each]) for each in draws])
    assert told == pytest.approx(np.median(draws, axis=1).std(), rel=0.15)


def test_files_without_errors_of_times_are_read(tmp_path):
    whole = comparison([1.0, 0.62, 0.58])
    lacking = {"seconds_standard_error", "points", "fit"}
    whole.to_json(tmp_path / "new.json")
    content = json.loads((tmp_path / "new.json").read_text())
    for frame in ("table", "slopes"):
        content[frame] = [{key: each for key, each in row.items() if key not in lacking} for row in content[frame]]
    (tmp_path / "old.json").write_text(json.dumps(content))
    assert "no power of K for the model" in str(Comparison.from_json(tmp_path / "old.json"))
