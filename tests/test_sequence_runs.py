"""A run on sequences, from a CSV to a forecast: the command line and the report."""

import csv
import json
import math
import re

import numpy as np
import pandas
import pytest
import torch
from conftest import needed

from pyro_vae import data, forecast, load_dataset, load_run
from pyro_vae.cli import main
from pyro_vae.data import joined
from pyro_vae.guides import StateSpaceGuide
from pyro_vae.models import DeepMarkovModel, likelihoods
from pyro_vae.prediction import sample
from pyro_vae.report import independent_baseline

TINY = [
    *("--epochs", "2", "--evaluate.num_samples", "5"),
    *("--model.latent_dim", "2", "--model.transition_hidden", "5", "--guide.hidden", "5"),
]
DATA = ["--data", "beds.csv", "--data.id", "hospital", "--data.time", "day"]


def command(line):
    assert main(line.split()) == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working directory with a table and a run on it."""
    folder = tmp_path_factory.mktemp("sequences")
    rng = np.random.default_rng(0)
    with (folder / "beds.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["hospital", "day", "beds", "staff"])
        for i in range(30):
            for t in range(int(rng.integers(6, 12))):
                rows.writerow([f"h{i:02}", t, 50 + 5 * math.sin(t / 2) + rng.normal(), "" if t == 3 else rng.normal()])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["fit", *DATA, *TINY]) == 0
    return folder


@pytest.fixture
def here(folder, monkeypatch):
    monkeypatch.chdir(folder)
    return folder


def test_a_model_of_sequences_is_the_default(here):
    run = load_run("runs/latest")
    assert type(run.model).__name__ == "DeepMarkovModel" and type(run.guide).__name__ == "StateSpaceGuide"
    assert run.guide.missing == "entries" and run.model.event_dim == 2
    assert (here / "runs/latest/report.html").read_text().count("<img") == 5
    again = load_dataset(**run.config["data"])
    assert again.train.kwargs.keys() == {"lengths", "mask"}


def test_scores_are_per_step_too(here):
    command("evaluate runs/latest --num_samples 5 --out scores.json --overwrite")
    scores = json.loads((here / "scores.json").read_text())
    lengths = load_dataset("beds.csv", id="hospital", time="day").test.kwargs["lengths"].double()
    assert scores["elbo_per_step"]["value"] == pytest.approx(scores["elbo"]["value"] / float(lengths.mean()), rel=1e-6)
    command("evaluate runs/latest --split all --num_samples 2")


def test_draws_and_codes_of_steps(here):
    command("sample runs/latest --num 3 --num_steps 7 --out draws.csv --overwrite")
    with (here / "draws.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["id"], row["step"]) for row in rows] == [(str(i), str(t)) for i in range(3) for t in range(7)]
    assert set(rows[0]) == {"id", "step", "beds", "staff"}
    assert 20 < np.mean([float(row["beds"]) for row in rows]) < 80  # in original units
    command("encode runs/latest --split all --out codes.csv --overwrite")
    with (here / "codes.csv").open() as file:
        rows = list(csv.DictReader(file))
    with (here / "beds.csv").open() as file:
        assert len(rows) == len(list(csv.DictReader(file)))
    assert {"id", "step", "z_mean_0", "z_scale_1"} <= set(rows[0])
    command("encode runs/latest --num_samples 2 --out codes.npz --overwrite")
    codes = np.load(here / "codes.npz")
    assert codes["z_draws"].shape[0] == 2 and codes["lengths"].shape == (3,)


def read(path):
    with open(path) as file:
        return list(csv.DictReader(file))


def test_a_forecast_follows_each_sequence(here, capsys):
    """Every one of the data, unless a split is named; its times go on where they ended."""
    command("forecast runs/latest --split test --num_steps 4 --num_samples 200 --overwrite")
    assert "4 steps after 3 sequences of the test split" in capsys.readouterr().out
    rows = read("forecast.csv")
    dataset = load_dataset("beds.csv", id="hospital", time="day")
    test = dataset.test
    expected = [(i, str(int(T) + t)) for i, T in zip(test.ids, test.kwargs["lengths"], strict=True) for t in range(4)]
    assert [(row["id"], row["step"]) for row in rows] == expected
    assert all(float(row["day"]) == float(row["step"]) for row in rows)
    for row in rows:
        assert float(row["beds_5%"]) < float(row["beds_50%"]) < float(row["beds_95%"])
        assert 20 < float(row["beds_mean"]) < 80
        assert len(row["beds_mean"]) < 12  # no digits that nobody computed
    command("forecast runs/latest --num_samples 20 --out forecast.npz --overwrite")
    assert "10 steps after 30 sequences of the data" in capsys.readouterr().out
    found = np.load(here / "forecast.npz")
    assert found["x_draws"].shape == (20, 30, 10, 2)
    ids = sorted(name for split in (dataset.train, dataset.valid, dataset.test) for name in split.ids)
    assert found["ids"].tolist() == ids and found["times"].shape == (30, 10)


def test_the_forecast_is_the_models_own(here):
    run = load_run("runs/latest")
    test = load_dataset("beds.csv", id="hospital", time="day").test
    found = forecast(run.model, run.guide, test, num_steps=3, num_samples=50, seed=3)
    torch.manual_seed(3)
    expected = run.model.forecast(run.guide, test.x, **test.kwargs, num_steps=3, num_samples=50)
    torch.testing.assert_close(found.draws, expected, rtol=0, atol=0)
    assert found.split is test


def test_a_series_in_pieces_is_forecast_from_its_end(here, capsys):
    """With its last `window` steps in view, whatever the last piece has; absent days are steps, if asked for."""
    days = np.arange("2024-01-01", "2024-04-13", dtype="datetime64[D]")
    with open("series.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["day", "level"])
        rows.writerows([day, math.sin(t / 3) + t / 50] for t, day in enumerate(days) if t != 40)
    line = "fit --data series.csv --data.time day --data.window 8 --out series --overwrite"
    assert main([*line.split(), *TINY]) == 0
    out = capsys.readouterr().out
    assert "1 gap in 'day' closed up" in out and "± nan" not in out
    command("forecast series --num_steps 2 --overwrite")
    out = capsys.readouterr().out
    assert "2 steps after 1 sequence of the data" in out and "--data.every D (h, MS, 2) does" in out
    assert [row["step"] for row in read("forecast.csv")] == ["102", "103"] and "day" not in read("forecast.csv")[0]
    command("forecast series --num_steps 2 --overwrite --data.every D")
    assert [row["day"] for row in read("forecast.csv")] == ["2024-04-13", "2024-04-14"]

    run, dataset = load_run("series"), load_dataset("series.csv", time="day", window=8, every="D")
    whole = joined([dataset.train, dataset.valid, dataset.test])
    found = forecast(run.model, run.guide, whole, num_steps=2, num_samples=30)
    assert whole.kwargs["lengths"][-1] == 7 and found.split.kwargs["lengths"].tolist() == [8]
    together = torch.cat([x[:T] for x, T in zip(whole.x, whole.kwargs["lengths"], strict=True)])
    torch.testing.assert_close(found.split.x[0], together[-8:], rtol=0, atol=0)
    assert found.split.times[0, -1] == np.datetime64("2024-04-12")


@pytest.fixture(scope="module")
def driven(folder):
    """A run whose staff acts on its beds."""
    with (folder / "beds.csv").open() as file:
        rows = [{**row, "staff": row["staff"] or "0.5"} for row in csv.DictReader(file)]
    with (folder / "full.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        line = "fit --data full.csv --data.id hospital --data.time day --data.inputs staff --data.every 1 --out driven"
        assert main([*line.split(), *TINY]) == 0
    return load_run(folder / "driven")


def plan(path, *lines):
    path.write_text("\n".join(["hospital,day,staff,beds", *lines, ""]))


def test_a_forecast_with_inputs_to_come(here, driven, capsys):
    """A table of them chooses the sequences, in any order; what they are is what moves the forecast."""
    assert driven.model.num_inputs == 1
    dataset = load_dataset("full.csv", id="hospital", time="day", inputs=["staff"])
    whole = joined([dataset.train, dataset.valid, dataset.test])
    T = dict(zip(whole.ids.tolist(), whole.kwargs["lengths"].tolist(), strict=True))
    to_come = {"h07": [1.0, 2.0, 3.0], "h02": [-1.0, 0.0, 4.0]}
    rows = [f"{i},{T[i] + t},{u}," for i, us in to_come.items() for t, u in enumerate(us)]
    plan(here / "plan.csv", *rows[::-1])
    command("forecast driven --inputs plan.csv --num_samples 40 --overwrite")
    assert "3 steps after 2 sequences of the data" in capsys.readouterr().out
    rows = read("forecast.csv")
    assert {row["id"] for row in rows} == {"h02", "h07"}
    assert all(float(row["day"]) == float(row["step"]) for row in rows)

    found = forecast(driven.model, driven.guide, whole, inputs="plan.csv", num_steps=2, num_samples=40)
    of_frame = driven.forecast(whole, inputs=pandas.read_csv("plan.csv"), num_steps=2, num_samples=40)
    assert torch.equal(of_frame.draws, found.draws) and np.array_equal(of_frame.times, found.times)
    x, u = torch.zeros(3, 4, 1), torch.zeros(3, 4, 1)
    command("scores driven --num_samples 3 --overwrite")
    assert "sequences have different lengths: log_prob and rank are of what is there" in capsys.readouterr().err
    assert set(read("scores.csv")[0]) == {"id", "log_prob", "rank", "begin"} and read("scores.csv")[0]["begin"] == "0"
    for wrong in (x, (x, {"u": u[:, :3]}), (torch.zeros(3, 4, 2), {"u": u}), torch.zeros(3, 4)):
        with pytest.raises(ValueError, match=r"expected data of shape \(N, T, 1\), as in the training"):
            driven.encode(wrong)
    with pytest.raises(ValueError, match="in inputs, got some that are infinite or missing"):
        forecast(driven.model, driven.guide, whole, inputs=torch.full((len(whole), 3, 1), torch.inf))
    u = torch.tensor([to_come[name][:2] for name in found.split.ids])[..., None]
    part, rows = found.split, [whole.ids.tolist().index(name) for name in found.split.ids]
    torch.manual_seed(0)
    expected = driven.model.forecast(
        driven.guide, whole.x[rows], whole.kwargs["u"][rows], u, lengths=whole.kwargs["lengths"][rows], num_samples=40
    )
    torch.testing.assert_close(found.draws, expected, rtol=0, atol=0)
    assert torch.equal(part.x, whole.x[rows])


def test_inputs_to_come_of_arrays(tmp_path):
    """In the split's order, where there is no table."""
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "x.npz", x=rng.normal(size=(20, 6, 2)), u=rng.normal(size=(20, 6, 1)))
    test = load_dataset(tmp_path / "x.npz").test
    torch.manual_seed(0)
    model = DeepMarkovModel((2,), 2, 5, likelihood=likelihoods.Normal(), num_inputs=1)
    guide = StateSpaceGuide(model, hidden=5)
    u = rng.normal(size=(2, 4, 1))
    np.save(tmp_path / "u.npy", u)
    found = forecast(model, guide, test, inputs=tmp_path / "u.npy", num_samples=7)
    torch.manual_seed(0)
    given = (test.x, test.kwargs["u"], torch.tensor(u).float())
    expected = model.forecast(guide, *given, lengths=test.kwargs["lengths"], num_samples=7)
    torch.testing.assert_close(found.draws, expected, rtol=0, atol=0)
    assert found.times is None
    np.save(tmp_path / "u.npy", u[:1])
    with pytest.raises(ValueError, match=r"finite numbers of shape \(2, H, 1\) in .*u.npy, got shape \(1, 4, 1\)"):
        forecast(model, guide, test, inputs=tmp_path / "u.npy")
    np.save(tmp_path / "u.npy", np.where(u > 0, u, np.nan))
    with pytest.raises(ValueError, match=r"finite numbers of shape"):
        forecast(model, guide, test, inputs=tmp_path / "u.npy")


def test_draws_with_a_row_of_inputs_each_or_one_for_all():
    torch.manual_seed(0)
    model = DeepMarkovModel((2,), 2, 5, likelihood=likelihoods.Normal(), num_inputs=1)
    u = torch.randn(1, 4, 1)
    torch.testing.assert_close(sample(model, 3, u=u), sample(model, 3, u=u.expand(3, -1, -1)), rtol=0, atol=0)
    with pytest.raises(ValueError, match="expected one row of u for each of 3 draws, or one for all, got 2"):
        sample(model, 3, u=u.expand(2, -1, -1))


@pytest.mark.parametrize(
    ("lines", "options", "said"),
    [
        ((), "", "expected a row for each step in plan.csv, got the header alone"),
        (("h02,0,1,",), "", r"expected times after \d+ for 'h02' in plan.csv, got 0: leave out what has been"),
        (("h02,40,1,",), "", r"expected a row for 'h02' at \d+ in plan.csv, got 40: give one every 1"),
        (
            ("h02,40,1,", "h03,40,1,", "h03,41,1,"),
            "",
            "expected as many rows for each id in plan.csv, got 1 for 'h02' and 2",
        ),
        (
            ("h02,40,1,", "nowhere,40,1,"),
            "",
            "expected ids of the split 'all', such as 'h00', in plan.csv, got 'nowhere'",
        ),
        (("h02,2024-01-01,1,",), "", "expected times in plan.csv as in the data, got 2024-01-01"),
        (
            ("h02,40,,",),
            "",
            "expected inputs in every row of plan.csv, got 1 missing or infinite, the first in line 2, column 'staff'",
        ),
        (("h02,{T},1,",), "--num_steps 2", "expected inputs of 2 steps in plan.csv, got 1"),
        (None, "", r"expected inputs= \(--inputs\), a file of the inputs of each step to come"),
        (None, "--inputs absent.csv", "expected to read and write at absent.csv"),
        (None, "--inputs scores.json", r"expected id= \(--data.id\) to be one of the columns .* of scores.json"),
    ],
)
def test_what_is_wrong_with_inputs_to_come(lines, options, said, here, driven, capsys):
    (here / "scores.json").write_text('{"a": 1}')
    if lines is not None:
        T = sum(row["hospital"] == "h02" for row in read("beds.csv"))
        plan(here / "plan.csv", *(line.format(T=T) for line in lines))
        options += " --inputs plan.csv"
    assert main(["forecast", "driven", "--overwrite", *options.split()]) == 2
    assert re.search(said, capsys.readouterr().err)


def test_draws_with_inputs(here, driven):
    """x ~ p(x | u), u of training sequences that are long enough; both are in the table."""
    command("sample driven --num 5 --num_steps 6 --out draws.csv --overwrite")
    rows = read("draws.csv")
    assert len(rows) == 30 and set(rows[0]) == {"id", "step", "beds", "staff"}
    train = load_dataset("full.csv", id="hospital", time="day", inputs=["staff"]).train
    known = {tuple(np.float32(u[:6, 0]).tolist()) for u in train.kwargs["u"].numpy()}
    for i in range(5):
        assert tuple(float(np.float32(row["staff"])) for row in rows[6 * i : 6 * i + 6]) in known
    assert main(["sample", "driven", "--num_steps", "99", "--overwrite"]) == 2


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (
            "fit --data beds.csv --data.id hospital --data.time day --model VAE",
            "expected a model of sequences for beds",
        ),
        ("fit --model DeepMarkovModel", "expected another model for digits"),
        ("fit --data beds.csv --data.time day", "neither"),
        ("forecast runs/latest --overwrite --num_steps 0", "expected --num_steps >= 1, got 0"),
        ("forecast runs/latest --overwrite --num_samples 0", "expected --num_samples >= 1, got 0"),
        (
            "forecast runs/latest --overwrite --inputs beds.csv",
            "expected no inputs= (--inputs) for a model without inputs",
        ),
        (
            "evaluate runs/latest --data narrow.csv",
            "expected the columns of the training, beds, staff, in narrow.csv, got none called 'staff' among",
        ),
        ("forecast runs/latest --out x.txt", "expected --out to end in .npz or .csv"),
    ],
)
def test_bad_input(line, said, here, capsys):
    with open("beds.csv") as source, open("narrow.csv", "w", newline="") as file:
        csv.writer(file).writerows([row[:-1] for row in csv.reader(source)])
    assert main(line.split()) == 2
    assert said in capsys.readouterr().err


def test_few_sequences_and_columns_that_are_never_seen_together(here, capsys):
    """Fewer than a batch has by default; and a page at the end."""
    rows = [f"h{i},{t},{'' if t % 2 else t + 0.5},{t * i if t % 2 else ''}" for i in range(12) for t in range(6)]
    (here / "few.csv").write_text("\n".join(["i,t,a,b", *rows]))
    assert main(["fit", "--data", "few.csv", "--data.id", "i", "--data.time", "t", *TINY, "--out", "few"]) == 0
    assert (here / "few/report.html").exists()
    assert load_run("few").config["batch_size"] == 10
    assert main(["sample", "few", "--num_steps", "0"]) == 2
    assert "expected --num_steps >= 1" in capsys.readouterr().err


def test_the_baseline_of_steps():
    """Each column by itself: of JSB chorales, the published 11.060 nats per frame is that of independent notes."""
    root = needed("jsb_chorales/jsb_chorales.pickle")
    dataset = load_dataset("jsb_chorales", root=root)
    from pyro_vae.models import DeepMarkovModel

    baseline = independent_baseline(DeepMarkovModel((88,), 2, 5), dataset)
    train, test = (
        torch.cat([s.x[i, :T] for i, T in enumerate(s.kwargs["lengths"])]).double()
        for s in (dataset.train, dataset.test)
    )
    share = (train.sum(0) + train.mean()) / (len(train) + 1)
    frames = torch.distributions.Bernoulli(share).log_prob(test).sum(-1)
    assert baseline.value == pytest.approx(float(frames.mean()), rel=1e-9)
    assert baseline.value == pytest.approx(-11.06, abs=0.05)


def test_each_series_in_pieces_is_forecast_from_its_own_end(tmp_path):
    """Two series of one file: the last steps of each, in the order of their times, and the times after them."""
    lengths = {"b": 31, "a": 27}
    rows = [(name, 10 * t, t + 1000 * (name == "a")) for t in range(31) for name, T in lengths.items() if t < T]
    path = tmp_path / "two.csv"
    path.write_text("\n".join(["name,t,v", *(",".join(map(str, row)) for row in rows)]))
    dataset = load_dataset(path, id="name", time="t", window=6)
    model = DeepMarkovModel((1,), 2, 4, likelihood=likelihoods.Normal())
    for whole in (joined([dataset.train, dataset.valid, dataset.test]), data.read(dataset.schema, path)):
        found = forecast(model, StateSpaceGuide(model), whole, num_steps=3, num_samples=5)
        values = dataset.restore(found.split.x.double())[..., 0]
        for i, name in enumerate(found.split.ids):
            T = lengths[name]
            expected = torch.arange(T - 6.0, T, dtype=torch.double) + 1000 * (name == "a")
            torch.testing.assert_close(values[i], expected, atol=1e-3, rtol=0)
            assert found.num_before[i] == T and found.times[i].tolist() == [10.0 * (T + h) for h in range(3)]
        assert sorted(found.split.ids) == ["a", "b"] and found.draws.shape == (5, 2, 3, 1)
    given = found.split.x[:, :, 0]
    again = forecast(model, StateSpaceGuide(model), given[..., None].numpy(), num_steps=3, num_samples=5)
    assert torch.equal(again.num_before, torch.tensor([6, 6])) and again.times is None
