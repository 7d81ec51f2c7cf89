"""Sequences as data: simulated ones against their own laws, the user's .npz and .csv, series in time."""

import csv
import time

import numpy as np
import pytest
import torch
from conftest import needed
from gaussian import linear_data

from pyro_vae import load_dataset


def test_the_papers_linear_sequences():
    """The draws of the paper's own code, and its third split of 50 steps."""
    dataset = load_dataset("linear_sequences")
    for split, (x, z) in zip((dataset.train, dataset.valid), linear_data(), strict=True):
        torch.testing.assert_close(split.x, x.float(), rtol=0, atol=0)
        torch.testing.assert_close(split.latents, z.float(), rtol=0, atol=0)
    assert dataset.test.x.shape == (500, 50, 1) and dataset.test.kwargs["lengths"].unique().tolist() == [50]
    assert dataset.event_shape == (1,) and dataset.location is None
    noise = dataset.train.x - 0.5 * dataset.train.latents
    assert float(noise.var()) == pytest.approx(20, rel=0.02) and float(noise.mean()) == pytest.approx(0, abs=0.05)


def test_the_nonlinear_sequences():
    z, x = (getattr(load_dataset("nonlinear_sequences").train, name).double() for name in ("latents", "x"))
    before, after = z[:, :-1], z[:, 1:]
    assert float((after - before - 2 * before.sin()).var()) == pytest.approx(5, rel=0.02)
    assert float(z[:, 0].var()) == pytest.approx(0.01, rel=0.1)
    assert float((x - 0.5 * z).var()) == pytest.approx(5, rel=0.02)


def test_the_pendulum_is_moved_by_its_inputs():
    """Its energy changes by damping and torque, as the equation says; x are sine and cosine."""
    train = load_dataset("pendulum").train
    z, u, x = train.latents.double(), train.kwargs["u"].double(), train.x.double()
    assert u.shape == (800, 100, 1) and float(u.abs().max()) <= 1
    torch.testing.assert_close(
        (x - torch.stack([z[..., 0].sin(), z[..., 0].cos()], -1)).std(), torch.tensor(0.05).double(), rtol=0.02, atol=0
    )
    energy = z[..., 1].square() / 2 - 9.81 * z[..., 0].cos()
    velocity = (z[:, 1:, 1] + z[:, :-1, 1]) / 2
    power = (5 * u[:, 1:, 0] - 0.3 * velocity) * velocity
    gained = energy.diff(dim=1) / 0.1
    slope = float((gained * power).sum() / power.square().sum())
    assert slope == pytest.approx(1, abs=0.1)
    late = (5 * u[:, :-1, 0] - 0.3 * velocity) * velocity
    assert float((gained - power).square().mean()) < float((gained - late).square().mean())


def test_the_volatility_is_stationary():
    train = load_dataset("stochastic_volatility").train
    z, x = train.latents.double(), train.x.double()
    variance = 0.04 / (1 - 0.97**2)
    assert float(z[:, 0].var()) == pytest.approx(variance, rel=0.25)
    assert float(z.var()) == pytest.approx(variance, rel=0.1)
    assert float((x / (z / 2).exp()).var()) == pytest.approx(1, rel=0.02)
    again = load_dataset("stochastic_volatility").train
    assert torch.equal(again.x, train.x)


def test_the_sp500_in_time(monkeypatch):
    root = needed("sp500/SP500.csv")
    dataset = load_dataset("sp500", root=root)
    with (root / "sp500" / "SP500.csv").open() as file:
        returns = torch.tensor([float(row["VALUE"]) for row in csv.DictReader(file)], dtype=torch.float64)
    parts = [split.values for split in (dataset.train, dataset.valid, dataset.test)]
    together = dataset.restore(torch.cat(parts).double())[:, 0]
    torch.testing.assert_close(together, returns, rtol=1e-5, atol=1e-5)
    assert [len(split) for split in (dataset.train, dataset.valid, dataset.test)] == [32, 4, 4]
    assert float(parts[0].mean()) == pytest.approx(0, abs=1e-6) and float(parts[0].std()) == pytest.approx(1, abs=1e-3)
    steps = dataset.test.kwargs["lengths"].double()
    torch.testing.assert_close(dataset.test.log_jacobian, -steps * dataset.scale.log())


def write(path, header, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def test_a_csv_with_ids_and_times(tmp_path):
    """Rows in any order; a sequence for each id; what is missing is masked; inputs are apart."""
    rng = np.random.default_rng(0)
    rows, truth = [], {}
    for i in range(20):
        T = int(rng.integers(3, 9))
        truth[f"p{i}"] = rng.normal(3, 2, (T, 2)), rng.normal(size=T)
        for t in range(T):
            x, u = truth[f"p{i}"][0][t], truth[f"p{i}"][1][t]
            rows.append([f"p{i}", f"2024-01-{t + 1:02}", x[0], "" if (i, t) == (3, 1) else x[1], u])
    rng.shuffle(rows)
    path = write(tmp_path / "ward.csv", ["patient", "day", "pulse", "pressure", "dose"], rows)
    dataset = load_dataset(path, id="patient", time="day", inputs=["dose"])
    assert dataset.columns == ("pulse", "pressure") and dataset.event_shape == (2,)
    seen = 0
    for split in (dataset.train, dataset.valid, dataset.test):
        for i, name in enumerate(split.ids):
            x, u = truth[name]
            T = int(split.kwargs["lengths"][i])
            assert len(x) == T
            mask = split.kwargs["mask"][i, :T]
            missing = torch.ones(T, 2, dtype=torch.bool)
            if name == "p3":
                missing[1, 1] = False
            assert torch.equal(mask, missing)
            found = dataset.restore(split.x[i, :T].double())
            torch.testing.assert_close(found[mask], torch.tensor(x)[mask], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(split.kwargs["u"][i, :T, 0], torch.tensor(u).float())
            seen += 1
    assert seen == 20
    values = dataset.train.values
    assert float(values.nanmean(0).abs().max()) < 1e-6
    (i,) = [i for split in (dataset.train,) for i, name in enumerate(split.ids) if name == "p3"] or [None]
    if i is not None:
        counts = dataset.train.kwargs["mask"][i, : int(dataset.train.kwargs["lengths"][i])].sum(0)
        torch.testing.assert_close(dataset.train.log_jacobian[i], -(counts * dataset.scale.log()).sum())


def test_one_series_in_pieces(tmp_path):
    series = np.random.default_rng(0).normal(size=205).cumsum()
    rows = [[t, value] for t, value in enumerate(series)]
    path = write(tmp_path / "series.csv", ["t", "level"], rows[::-1])
    dataset = load_dataset(path, time="t", window=10)
    parts = [dataset.restore(split.values.double()) for split in (dataset.train, dataset.valid, dataset.test)]
    torch.testing.assert_close(torch.cat(parts)[:, 0], torch.tensor(series), rtol=1e-5, atol=1e-4)
    assert dataset.test.kwargs["lengths"].tolist() == [10, 5]
    assert dataset.train.source["window"] == 10 and load_dataset(**dataset.train.source).train.x.shape == (17, 10, 1)


def test_times_are_those_written_wherever_one_is(tmp_path, monkeypatch):
    """Hours of the night in which the clocks of Berlin go forward."""
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    minutes = range(0, 45 * 40, 45)
    rows = [[f"2024-03-{30 + m // 1440} {m // 60 % 24:02}:{m % 60:02}", m] for m in minutes]
    try:
        dataset = load_dataset(write(tmp_path / "night.csv", ["t", "v"], rows), time="t", window=4)
    finally:
        monkeypatch.undo()
        time.tzset()
    values = torch.cat([s.values for s in (dataset.train, dataset.valid, dataset.test)]).double()
    torch.testing.assert_close(dataset.restore(values)[:, 0], torch.tensor(minutes).double(), rtol=1e-5, atol=1e-3)


def test_what_is_missing_everywhere(tmp_path):
    rows = [[f"n{t % 12}", t, t / 7, "" if t % 12 < 11 else t / 9] for t in range(60)]
    path = write(tmp_path / "x.csv", ["i", "t", "v", "late"], rows)
    with pytest.raises(ValueError, match="column 'late' has none in the training split"):
        for seed in range(40):
            load_dataset(path, id="i", time="t", seed=seed)
    rows[4][0] = ""
    with pytest.raises(ValueError, match=r"expected an id in every row .* the first in row 4"):
        load_dataset(write(path, ["i", "t", "v", "late"], rows), id="i", time="t")


def test_an_npz_of_sequences(tmp_path):
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 7, 30)
    x = rng.integers(0, 2, (30, 7, 4)).astype(np.uint8)
    mask = rng.random((30, 7)) < 0.8
    np.savez(tmp_path / "songs.npz", x=x, lengths=lengths, u=rng.normal(size=(30, 7, 2)), mask=mask)
    dataset = load_dataset(tmp_path / "songs.npz")
    for split in (dataset.train, dataset.valid, dataset.test):
        for i, row in enumerate(split.ids):
            T = lengths[row]
            where = mask[row, :T, None]
            assert np.array_equal(split.x[i, :T].numpy() * where, x[row, :T] * where)
            assert not split.x[i, T:].any() and split.kwargs["mask"].dtype == torch.bool
    assert sorted(dataset.train.kwargs) == ["lengths", "mask", "u"]
    np.savez(tmp_path / "numbers.npz", x=rng.normal(size=(30, 7)), lengths=lengths)
    assert load_dataset(tmp_path / "numbers.npz").event_shape == (1,)


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"x": np.zeros((12, 3, 2)), "lengths": np.full(12, 4)}, "12 whole numbers from 1 to 3"),
        ({"x": np.zeros((12, 3, 2)), "lengths": np.full(12, 2.0)}, "12 whole numbers from 1 to 3"),
        ({"x": np.zeros((12, 3, 2)), "lengths": np.full(11, 2)}, "12 whole numbers from 1 to 3"),
        ({"x": np.zeros((12, 3, 2, 2)), "lengths": np.full(12, 2)}, r"sequences x of shape \(N, T, D\)"),
        ({"x": np.zeros((12, 3, 2)), "u": np.zeros((12, 2, 1))}, r"expected u of shape \(N, T, C\)"),
        ({"x": np.zeros((12, 3, 2)), "mask": np.zeros((12, 3, 1))}, r"expected mask of shape"),
        ({"x": np.full((12, 3, 2), np.nan), "lengths": np.full(12, 2)}, "48 NaN, .* sequence 0, step 0"),
        ({"x": np.zeros((9, 3, 2)), "lengths": np.full(9, 2)}, "at least 10 sequences"),
    ],
)
def test_what_is_wrong_with_an_npz(arrays, said, tmp_path):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(ValueError, match=said):
        load_dataset(tmp_path / "x.npz")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"time": "t"}, "neither"),
        ({"time": "t", "id": "i", "window": 3}, "both"),
        ({"time": "t", "window": 0}, "window >= 1"),
        ({"time": "no"}, "expected time= to be one of the columns"),
        ({"id": "i", "inputs": ["v"]}, "expected time= beside inputs="),
        ({"window": 3}, "expected time= beside window="),
        ({"time": "t", "id": "i", "label": "v"}, "expected no time= beside label="),
        ({"time": "i", "window": 3}, "numbers or ISO dates in column 'i'"),
        ({"time": "twice", "id": "i"}, "distinct times"),
    ],
)
def test_what_is_wrong_with_a_csv(options, said, tmp_path):
    rows = [[f"n{t % 12}", t, t // 24, t % 7, t % 5] for t in range(60)]
    path = write(tmp_path / "x.csv", ["i", "t", "twice", "v", "w"], rows)
    with pytest.raises(ValueError, match=said):
        load_dataset(path, **options)
    with pytest.raises(ValueError, match=r"expected a \.csv file for time="):
        load_dataset("digits", time="t")
