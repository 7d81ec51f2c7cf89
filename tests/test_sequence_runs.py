"""A run on sequences, from a CSV to a forecast: the command line and the report."""

import csv
import json
import math

import numpy as np
import pytest
import torch
from conftest import needed

from pyro_vae import load_dataset, load_run
from pyro_vae.cli import main
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


def test_a_forecast_follows_each_sequence(here):
    command("forecast runs/latest --num_steps 4 --num_samples 200 --overwrite")
    with (here / "forecast.csv").open() as file:
        rows = list(csv.DictReader(file))
    test = load_dataset("beds.csv", id="hospital", time="day").test
    expected = [(i, str(int(T) + t)) for i, T in zip(test.ids, test.kwargs["lengths"], strict=True) for t in range(4)]
    assert [(row["id"], row["step"]) for row in rows] == expected
    for row in rows:
        assert float(row["beds_5%"]) < float(row["beds_50%"]) < float(row["beds_95%"])
        assert 20 < float(row["beds_mean"]) < 80
    assert (
        main(
            [
                "forecast",
                "runs/latest",
                "--num_steps",
                "4",
                "--num_samples",
                "200",
                "--out",
                "forecast.npz",
                "--overwrite",
            ]
        )
        == 0
    )
    assert np.load(here / "forecast.npz")["x_draws"].shape == (200, 3, 4, 2)


def test_inputs_of_a_table(here, capsys):
    """A column that acts on the latents; what is to come of it is not known to the commands."""
    arguments = [*DATA, "--data.inputs", '["staff"]', *TINY, "--out", "driven"]
    (here / "full.csv").write_text(
        (here / "beds.csv").read_text().replace(",\n", ",0.5\n").replace(",\r\n", ",0.5\r\n")
    )
    arguments[1] = "full.csv"
    assert main(["fit", *arguments]) == 0
    assert load_run("driven").model.num_inputs == 1
    for command in ("sample", "forecast"):
        assert main([command, "driven", "--out", "x.npz"]) == 2
        assert f"expected a model without inputs for {command}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (
            "fit --data beds.csv --data.id hospital --data.time day --model VAE",
            "expected a model of sequences for beds",
        ),
        ("fit --model DeepMarkovModel", "expected another model for digits"),
        ("fit --data beds.csv --data.time day", "neither"),
        ("forecast runs/latest --num_steps 0", "expected --num_steps and --num_samples >= 1"),
        ("forecast runs/latest --out x.txt", "expected --out to end in .npz or .csv"),
    ],
)
def test_bad_input(line, said, here, capsys):
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
