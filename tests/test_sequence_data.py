"""Sequences as data: simulated ones against their own laws, the user's .npz and .csv, series in time."""

import csv
import time

import numpy as np
import pandas
import pytest
import torch
from conftest import needed
from gaussian import linear_data

from pyro_vae import load_dataset
from pyro_vae.data import joined
from pyro_vae.sources.times import after, late, on_grid, spacing


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
    with pytest.raises(ValueError, match=r"expected an id in every row .* the first in line 6"):
        load_dataset(write(path, ["i", "t", "v", "late"], rows), id="i", time="t")


def test_days_without_a_row(tmp_path):
    """They are closed up, and counted in the description; with `every` they are steps without values."""
    days = np.arange("2024-02-20", "2024-04-20", dtype="datetime64[D]")
    absent = {5, 6, 17}
    rows = [[day, value] for i, (day, value) in enumerate(zip(days, range(60), strict=True)) if i not in absent]
    path = write(tmp_path / "beds.csv", ["day", "beds"], rows)
    closed = load_dataset(path, time="day", window=5)
    assert closed.description.endswith(", 2 gaps in 'day' closed up, as absent times are no missing steps")
    assert "mask" not in closed.train.kwargs
    dataset = load_dataset(path, time="day", window=5, every="D")
    assert dataset.description.endswith(", 3 times without a row")
    parts = (dataset.train, dataset.valid, dataset.test)
    seen = torch.cat([split.kwargs["mask"].flatten() for split in parts])
    assert set((~seen).nonzero().flatten().tolist()) == absent and len(seen) == 60
    x = torch.cat([dataset.restore(split.x.double()).flatten() for split in parts])
    torch.testing.assert_close(x[seen], torch.arange(60.0).double()[seen], rtol=1e-5, atol=1e-4)
    assert np.array_equal(np.concatenate([split.times.flatten() for split in parts]), days.astype("datetime64[us]"))
    again = load_dataset(**dataset.train.source)
    assert again.train.source["every"] == "D" and torch.equal(again.train.kwargs["mask"], dataset.train.kwargs["mask"])


def test_times_of_sequences_of_different_lengths(tmp_path):
    rows = [[f"n{i}", 2 * t + i, t / 7] for i in range(12) for t in range(3 + i % 4) if (i, t) != (5, 1)]
    path = write(tmp_path / "x.csv", ["i", "t", "v"], rows[::-1])
    every = load_dataset(path, id="i", time="t", every="2")
    for split in (every.train, every.valid, every.test, joined([every.train, every.valid, every.test])):
        for name, times, T in zip(split.ids, split.times, split.kwargs["lengths"], strict=True):
            i = int(name[1:])
            assert np.array_equal(times[:T], 2 * np.arange(3 + i % 4) + i) and np.isnan(times[T:]).all()


@pytest.mark.parametrize(
    ("times", "every", "then"),
    [
        (["2024-01-31", "2024-02-29", "2024-03-31"], "ME", ["2024-04-30", "2024-05-31"]),
        (["2023-11-01", "2023-12-01", "2024-01-01"], "MS", ["2024-02-01", "2024-03-01"]),
        (["2024-05-02", "2024-05-03", "2024-05-06", "2024-05-07", "2024-05-08", "2024-05-09", "2024-05-10"], "B",
         ["2024-05-13", "2024-05-14"]),
        (["2024-01-01T23:30", "2024-01-01T23:45", "2024-01-02T00:00"], "15min",
         ["2024-01-02T00:15", "2024-01-02T00:30"]),
        ([1990.0, 1990.5, 1991.0], "0.5", [1991.5, 1992.0]),
    ],
)  # fmt: skip
def test_how_times_go_on(times, every, then):
    kind = float if isinstance(times[0], float) else "datetime64[us]"
    times, then = np.array(times, kind), np.array(then, kind)
    assert spacing([times, times[:2]]) == every
    assert np.array_equal(after(times[-1], every, 2), then)
    grid, places = on_grid(np.delete(times, 1), every, "")
    assert np.array_equal(grid, times) and places.tolist() == [0, *range(2, len(times))]
    assert spacing([np.delete(times, 1)]) != every
    assert late([times]) == 0 and late([np.delete(times, 1)]) <= 1


def test_times_that_do_not_tell_how_they_go_on():
    days = np.array(["2024-01-01", "2024-01-02", "2024-01-05", "2024-01-06"], "datetime64[us]")
    assert spacing([days]) is None and spacing([days[:1]]) is None and spacing([np.array([0.0, 1.0, 3.0])]) is None
    assert spacing([days[:2]]) == "1D"
    hours = np.array([f"2024-01-0{d}T{h:02}" for d in (2, 3) for h in range(8, 16)], "datetime64[us]")
    assert spacing([hours]) is None
    weeks = 7 * np.arange(6) * np.timedelta64(1, "D")
    assert spacing([np.datetime64(f"2024-01-0{d}", "us") + weeks for d in (7, 8)]) == "7D"


@pytest.mark.parametrize(
    ("every", "said"),
    [
        ("ms", "expected at most 100 steps for each row of .*x.csv, got 4,665,600,001 from 2024-01-01 to 2024-02-24"),
        ("0D", "expected a step of dates as every= .*, got '0D'"),
        ("-1D", "expected a step of dates as every= .*, got '-1D'"),
        ("1", "expected a step of dates as every= .*, got '1'"),
        ("fortnight", "expected a step of dates as every= .*, got 'fortnight'"),
        ("2D", "expected times every 2D from 2024-01-01 on in .*x.csv, got 2024-01-02"),
        ("MS", "expected times every MS from 2024-01-01 on in .*x.csv, got 2024-01-02"),
    ],
)
def test_steps_that_dates_do_not_have(every, said, tmp_path):
    days = np.arange("2024-01-01", "2024-02-25", dtype="datetime64[D]")
    path = write(tmp_path / "x.csv", ["day", "beds"], [[day, i] for i, day in enumerate(days)])
    with pytest.raises(ValueError, match=said):
        load_dataset(path, time="day", window=3, every=every)


def test_what_is_wrong_with_a_series(tmp_path):
    path = write(tmp_path / "x.csv", ["t", "half", "v"], [[t, t // 2, t / 7] for t in range(60)])
    with pytest.raises(
        ValueError, match=r"'0' twice .to the microsecond., the second in line 3: name the column of ids with id="
    ):
        load_dataset(path, time="half", window=3)
    with pytest.raises(
        ValueError, match=r"at least 10 sequences .* got 5: a window= \(--data.window\) of at most 6 of"
    ):
        load_dataset(path, time="t", window=12)
    assert len(load_dataset(path, time="t", window=6).train) == 8


MONTHS = pandas.date_range("2015-10-01", periods=60, freq="MS")
DAYS = pandas.date_range("2015-10-01", periods=60)


@pytest.mark.parametrize(
    "cells",
    [
        MONTHS.strftime("%m.%Y"),
        [f"{month.month}.{month.year}" for month in MONTHS],
        MONTHS.strftime("%Y.%m"),
        DAYS.strftime("%d%m%Y"),
        DAYS.strftime("%m%d%Y"),
        [f"{day.day}{day.month:02d}{day.year}" for day in DAYS],
        DAYS.strftime("%d.%m"),
        DAYS.strftime("%d%m%y"),
        pandas.date_range("2015-12-15", periods=60).strftime("%m%d%y"),
        [f"{day.day}.{day.month}" for day in DAYS],
        MONTHS.strftime("%m/%Y"),
        [*range(59), "inf"],
    ],
    ids=lambda cells: f"{cells[0]}-{cells[-1]}",
)
def test_dates_are_not_taken_for_numbers(cells, tmp_path):
    """Whose order is another."""
    path = write(tmp_path / "x.csv", ["t", "v"], [[t, i % 7] for i, t in enumerate(cells)])
    with pytest.raises(
        ValueError, match=r"expected numbers or ISO dates in column 't' of .*, got .*: write (them|dates) as"
    ):
        load_dataset(path, time="t", window=5)


@pytest.mark.parametrize(
    ("cells", "first"),
    [
        (MONTHS.strftime("%Y%m"), np.datetime64("2015-10-01", "us")),
        (DAYS.strftime("%Y%m%d"), np.datetime64("2015-10-01", "us")),
        ([f"{1974 + i // 4}Q{i % 4 + 1}" for i in range(60)], np.datetime64("1974-01-01", "us")),
        ([f"{1974 + i // 4}-Q{i % 4 + 1}" for i in range(60)], np.datetime64("1974-01-01", "us")),
        ([f"{i:03d}" for i in range(60)], 0.0),
        ([f"{i:06d}" for i in range(60)], 0.0),
        ([f"{i / 10:.1f}" for i in range(125, 11, -2)], 1.3),
        (["3.5", "1.5", "2.5", *[f"{i}.{m}" for m in (6, 7) for i in range(1, 31)]], 1.5),
        ([f"{i / 2:06.2f}" for i in range(60)], 0.0),
        ([f"{1 + i / 100:.2f}" for i in range(12)] * 5, None),
        ([f"{1990 + i / 12:.2f}" for i in range(60)], 1990.0),
        ([f"{i / 100:.2f}" for i in range(60)], 0.0),
        ([150001 + i for i in range(60)], 150001.0),
        ([10112015 + 7 * i for i in range(60)], 10112015.0),
    ],
    ids=lambda cells: f"{cells[0]}" if hasattr(cells, "__len__") else "",
)
def test_numbers_are_not_taken_for_dates(cells, first, tmp_path):
    path = write(tmp_path / "x.csv", ["t", "v", "i"], [[t, i % 7, i // 12] for i, t in enumerate(cells)])
    if first is None:  # of several series
        assert load_dataset(path, time="t", id="i", window=3).train.times[0, 0] == 1
    else:
        assert load_dataset(path, time="t", window=5, drop=["i"]).train.times[0, 0] == first


def test_times_with_decimal_commas_and_thousands(tmp_path):
    text = "t;v\n" + "".join(f"{i // 2},{5 * (i % 2)};{i % 7},5\n" for i in range(60))
    (tmp_path / "x.csv").write_text(text)
    assert load_dataset(tmp_path / "x.csv", time="t", window=5).train.times[0, :3].tolist() == [0.0, 0.5, 1.0]
    (tmp_path / "y.csv").write_text("t;v\n" + "".join(f"{i + 990:,};{i % 7}\n" for i in range(60)))
    found = load_dataset(tmp_path / "y.csv", time="t", window=6, thousands=",", separator=";")
    assert found.test.times.tolist() == [[1044.0, 1045.0, 1046.0, 1047.0, 1048.0, 1049.0]]


def test_steps_of_dates_are_told_by_what_they_seem(tmp_path, recwarn):
    fridays = pandas.date_range("2020-01-03", periods=60, freq="W-FRI")
    path = write(tmp_path / "x.csv", ["t", "v"], [[t, i % 7] for i, t in enumerate(fridays.strftime("%Y-%m-%d"))])
    with pytest.raises(ValueError, match=r"times every W in .*, got 2020-01-03: .* which seems W-FRI"):
        load_dataset(path, time="t", window=5, every="W")
    days = write(tmp_path / "y.csv", ["t", "v"], [[t, i % 7] for i, t in enumerate(DAYS.strftime("%Y-%m-%d"))])
    assert len(load_dataset(days, time="t", window=5, every="d").train) == 10 and not recwarn
    counts = write(tmp_path / "z.csv", ["t", "v"], [[t, t % 7] for t in range(60)])
    with pytest.raises(ValueError, match="expected a step of numbers as every= .* got 'inf'"):
        load_dataset(counts, time="t", window=5, every="inf")
    short = [[20 + t // 12, 1 + t % 12, t % 7] for t in range(60)]
    with pytest.raises(ValueError, match="expected dates in the columns .* in line 2 .a year of four digits"):
        load_dataset(write(tmp_path / "u.csv", ["year", "month", "v"], short), time="year,month", window=5)


def test_missing_values_of_steps_are_told(tmp_path):
    rows = [[t, "" if t in (3, 7) else t % 7, "" if t == 9 else t % 5] for t in range(60)]
    data = load_dataset(write(tmp_path / "x.csv", ["t", "v", "w"], rows), time="t", window=5)
    assert "3 missing values" in data.description


def test_every_row_has_a_time(tmp_path):
    for cells in ([*range(59), ""], [*MONTHS.strftime("%Y-%m-%d")[:-1], "NA"]):
        path = write(tmp_path / "x.csv", ["t", "v"], [[t, i % 7] for i, t in enumerate(cells)])
        message = "expected a time in every row of column 't' of .*, got 1 missing, the first in line 61: fill in"
        with pytest.raises(ValueError, match=message):
            load_dataset(path, time="t", window=5)
    frame = pandas.DataFrame({"t": [*MONTHS[:-1], None], "v": np.arange(60) % 7})
    with pytest.raises(ValueError, match="expected a time in every row of column 't' of the frame, got 1 missing"):
        load_dataset(frame, time="t", window=5)
    path = write(tmp_path / "x.csv", ["year", "yearday", "v"], [[2000, i, i % 7] for i in range(60)])
    with pytest.raises(ValueError, match="got 'yearday', as is year by another"):
        load_dataset(path, time="year,yearday", window=5)


def test_zones(tmp_path):
    """One at all times, which are UTC then, or none."""
    rows = [[f"2024-10-27T0{h}:00+0{2 - (h > 2)}:00", h] for h in range(1, 7)]
    rows = [[f"n{i}", *row] for i in range(10) for row in rows]
    path = write(tmp_path / "x.csv", ["i", "t", "v"], rows)
    with pytest.raises(ValueError, match="expected times every 2h from 2024-10-26 23:00:00 on in .* for 'n"):
        load_dataset(path, id="i", time="t", every="2h")
    assert load_dataset(path, id="i", time="t").train.times[0, 0] == np.datetime64("2024-10-26T23:00")
    rows[7][1] = "2024-10-27T02:00"
    with pytest.raises(ValueError, match="expected a zone at all times or at none in column 't'"):
        load_dataset(write(path, ["i", "t", "v"], rows), id="i", time="t")


@pytest.mark.parametrize("every", ["h", "15min", "D", "MS", 2.0])
def test_gaps_name_the_step(every, tmp_path):
    days = np.arange(70) * every if every == 2.0 else pandas.date_range("2020-01-01", periods=70, freq=every)
    kept = [str(t) for i, t in enumerate(days) if i not in (20, 21, 22, 40)]
    path = write(tmp_path / "x.csv", ["t", "v"], [[t, i % 7] for i, t in enumerate(kept)])
    (choice,) = [each for each in load_dataset(path, time="t", window=5).schema.choices if "gap" in each.what]
    assert choice.option == f"data.every {2 if every == 2.0 else 'D' if every == 'MS' else every}"


def test_working_days_have_no_gaps(tmp_path):
    days = np.busday_offset("2024-01-01", np.arange(100))
    path = write(tmp_path / "x.csv", ["day", "price"], [[day, i] for i, day in enumerate(days)])
    assert "gap" not in load_dataset(path, time="day", window=5).description
    path = write(tmp_path / "x.csv", ["day", "price"], [[day, i] for i, day in enumerate(days) if i != 50])
    assert "gaps in 'day'" in load_dataset(path, time="day", window=5).description


def test_a_date_that_is_no_feature(tmp_path):
    rows = [[f"2024-01-{t + 1:02}", t] for t in range(20)]
    path = write(tmp_path / "x.csv", ["day", "beds"], rows)
    with pytest.raises(ValueError, match=r"'2024-01-01' in line 2: .* of dates with time= \(--data.time\)"):
        load_dataset(path)
    with pytest.raises(ValueError, match=r"expected a row for each step in .* got the header alone"):
        load_dataset(write(tmp_path / "y.csv", ["day", "beds"], []), time="day", window=3)
    (tmp_path / "z.csv").write_text("a,b\n\n1,2\n\n3\n")
    with pytest.raises(ValueError, match=r"expected 2 cells in line 5 of .* got 1"):
        load_dataset(tmp_path / "z.csv")
    rows = [[i, t, t, "" if (i, t) == (3, 2) else 1] for i in range(12) for t in range(4)]
    path = write(tmp_path / "u.csv", ["i", "t", "v", "dose"], rows)
    with pytest.raises(ValueError, match=r"got 1 missing or infinite, the first in line 16, column 'dose'"):
        load_dataset(path, id="i", time="t", inputs=["dose"])


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
        ({"time": "t", "window": 0}, "window >= 1"),
        ({"time": "no"}, r"expected time= \(--data.time\) to be one of the columns"),
        ({"id": "i", "inputs": ["v"]}, r"expected time= \(--data.time\) beside inputs="),
        ({"window": 3}, r"expected time= \(--data.time\) beside window="),
        ({"every": "1"}, r"expected time= \(--data.time\) beside every="),
        ({"time": "t", "id": "i", "label": "v"}, r"expected no time= \(--data.time\) beside label="),
        ({"time": "i", "window": 3}, "numbers or ISO dates in column 'i'"),
        (
            {"time": "twice", "id": "i"},
            "distinct times in .*, got .0. twice for .n0. .to the microsecond., the second in line 14: mend",
        ),
        (
            {"time": "t", "id": "i", "inputs": ["twice", "v", "w"]},
            "a column to model .*, got 'i', 't', 'twice', 'v', 'w' alone",
        ),
        ({"time": "t", "id": "i", "every": 5}, "expected times every 5 from 0 on in .* for 'n0', got 12"),
        ({"time": "t", "id": "i", "every": "D"}, "expected a step of numbers as every= .* got 'D'"),
        ({"time": "t", "id": "i", "every": "0"}, "expected a step of numbers as every= .* got '0'"),
        (
            {"time": "t", "id": "i", "every": "0.001"},
            "expected at most 100 steps for each row of .*, got 48,001 from 0",
        ),
        (
            {"time": "t", "id": "i", "every": "6", "inputs": ["v"]},
            "inputs at every time of .* for 'n0', got no row at 6",
        ),
    ],
)
def test_what_is_wrong_with_a_csv(options, said, tmp_path):
    rows = [[f"n{t % 12}", t, t // 24, t % 7, t % 5] for t in range(60)]
    path = write(tmp_path / "x.csv", ["i", "t", "twice", "v", "w"], rows)
    with pytest.raises(ValueError, match=said):
        load_dataset(path, **options)
    with pytest.raises(ValueError, match=r"expected a \.csv file for time="):
        load_dataset("digits", time="t")
