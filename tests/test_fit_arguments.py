"""What `fit` takes as learning rate, KL weight, loss and optimiser, from Python and from the command line."""

import collections
import enum
import functools
import math
from fractions import Fraction

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.optim
import pytest
import torch
from pyro.infer import RenyiELBO, Trace_ELBO, TraceMeanField_ELBO
from torch import nn

from pyro_vae import fit, load_run
from pyro_vae.cli import main
from pyro_vae.config import Configured, build, describe
from pyro_vae.estimators import ELBO, BetaELBO, FreeBits, Renyi
from pyro_vae.guides import AmortizedGuide
from pyro_vae.models import VAE
from pyro_vae.schedules import Exponential, Warmup

few = {"epochs": 2, "batch_size": 20, "progress": False}


def trained(path, **options):
    torch.manual_seed(0)
    model = VAE((4,), latent_dim=2)
    guide = AmortizedGuide(model)
    x = torch.rand(40, 4, generator=torch.Generator().manual_seed(0)).round()
    return fit(model, guide, x, **{**few, "out": path, "overwrite": True, **options})


def weights(run):
    return torch.cat([p.detach().flatten() for p in (*run.model.parameters(), *run.guide.parameters())])


def adam(rate):
    return functools.partial(torch.optim.Adam, lr=rate, fused=True)


EQUALS = {
    "a rate is Adam's": ({"learning_rate": 0.01}, {"optimizer": adam(0.01)}),
    "a rate takes the place of the optimiser's": (
        {"optimizer": adam(0.5), "learning_rate": 0.01},
        {"optimizer": adam(0.01)},
    ),
    "a rate of a Pyro optimiser": (
        {"optimizer": pyro.optim.Adam({"lr": 0.5}), "learning_rate": 0.01},
        {"optimizer": pyro.optim.Adam({"lr": 0.01})},
    ),
    "a schedule is a factor": (
        {"optimizer": adam(0.5), "learning_rate": lambda epoch: 0.02},
        {"optimizer": adam(0.01)},
    ),
    "a weight is constant": ({"kl_weight": 0.5}, {"kl_weight": lambda epoch: 0.5}),
    "a weight of one": ({"kl_weight": 1}, {}),
    "a loss's class": ({"loss": TraceMeanField_ELBO}, {"loss": TraceMeanField_ELBO()}),
    "an estimator's class": ({"loss": ELBO}, {"loss": ELBO()}),
    "numbers of NumPy": (
        {
            **{"epochs": np.int64(2), "batch_size": np.int64(20), "seed": np.uint8(3), "clip_norm": np.float32(0.5)},
            **{
                "kl_weight": np.float32(0.5),
                "learning_rate": np.float64(0.01),
                "loss": Renyi(np.float32(0.5), np.int64(2)),
            },
        },
        {"seed": 3, "clip_norm": 0.5, "kl_weight": 0.5, "learning_rate": 0.01, "loss": Renyi(0.5, 2)},
    ),
    "an optimiser's class": ({"optimizer": torch.optim.Adam}, {"optimizer": adam(1e-3)}),
}


@pytest.mark.parametrize("name", EQUALS)
def test_a_number_or_a_class_is_what_it_stands_for(name, tmp_path):
    given, meant = EQUALS[name]
    ours, theirs = trained(tmp_path / "a", **given), trained(tmp_path / "b", **meant)
    torch.testing.assert_close(weights(ours), weights(theirs), rtol=1e-6, atol=1e-7)
    assert ours.history[-1]["bound"] == pytest.approx(theirs.history[-1]["bound"], abs=1e-4)


REFUSED = {
    "learning_rate": (
        {"learning_rate": each}
        for each in (0, 0.0, -1e-3, math.nan, math.inf, "1e-3", True, Warmup, torch.tensor([1.0]))
    ),
    "kl_weight": ({"kl_weight": each} for each in (0, -0.5, math.nan, math.inf, "0.5", False, Exponential, [1.0])),
    "loss": ({"loss": each} for each in ("ELBO", 1, 0, False, dict, int)),
    "optimiser": (
        {"optimizer": each}
        for each in ("Adam", 1e-3, 0, torch.optim.Adam([torch.zeros(1)]), pyro.optim.PyroOptim, lambda p: p)
    ),
}
CASES = [(name, options) for name, all_options in REFUSED.items() for options in all_options]


@pytest.mark.parametrize(("name", "options"), CASES, ids=[f"{name} {i}" for i, (name, _) in enumerate(CASES)])
def test_what_is_none_of_them_is_refused_in_one_line(name, options, tmp_path):
    with pytest.raises(ValueError, match="expected .*, got .*: ") as raised:
        trained(tmp_path / "run", **options)
    assert name in str(raised.value) and "\n" not in str(raised.value)
    assert not (tmp_path / "run").exists()


def test_numbers_are_kept_and_gone_on_with(tmp_path):
    numbers = {"learning_rate": 0.01, "kl_weight": 0.5, "loss": Trace_ELBO}
    with pytest.raises(ValueError, match="expected a loss that is linear in the KL term beside kl_weight, got Renyi"):
        trained(tmp_path / "run", **numbers | {"loss": RenyiELBO})
    whole = trained(tmp_path / "whole", **numbers)
    trained(tmp_path / "part", **{**numbers, "epochs": 1})
    again = trained(tmp_path / "part", **numbers, out=None, overwrite=False, resume=tmp_path / "part")
    assert torch.equal(weights(whole), weights(again))
    assert [record["learning_rate"] for record in again.history] == [0.01, 0.01]
    assert [record["kl_weight"] for record in again.history] == [0.5, 0.5]
    config = load_run(again.path).config
    assert (config["learning_rate"], config["kl_weight"]) == (0.01, 0.5)


def test_the_command_line_takes_numbers(tmp_path, capsys):
    path = tmp_path / "run"
    few = [
        "--epochs",
        "1",
        "--model.decoder.hidden",
        "[8]",
        "--guide.encoder.hidden",
        "[8]",
        "--evaluate.num_samples",
        "2",
    ]
    assert (
        main(["fit", "--data", "digits", "--out", str(path), "--learning_rate", "1e-2", "--kl_weight", "0.5", *few])
        == 0
    )
    run = load_run(path)
    assert run.config["learning_rate"] == 0.01 and run.history[0]["learning_rate"] == 0.01
    assert main(["fit", "--resume", str(path), "--epochs", "2"]) == 0
    assert [record["kl_weight"] for record in load_run(path).history] == [0.5, 0.5]
    capsys.readouterr()
    assert main(["fit", "--data", "digits", "--out", str(tmp_path / "not"), "--learning_rate", "-1", *few]) == 2
    assert "expected learning_rate to be a positive number" in capsys.readouterr().err


class Positional:
    """A loss whose settings have no names."""

    def __init__(self, *nats):
        self.total = sum(nats)


class Renamed:
    """One that keeps its setting under another name."""

    def __init__(self, nats=1.0):
        self.total = nats


def test_a_configuration_holds_numbers_or_says_that_it_does_not(tmp_path):
    """What is written without its value would be another when the run is loaded."""
    given = {"of": {"a": np.float32(0.5), "b": np.int64(3), "c": np.bool_(True)}}
    assert describe(given) == {"of": {"a": 0.5, "b": 3, "c": True}}
    assert describe({"x": FreeBits(np.float32(0.5))})["x"]["init_args"] == {"nats": 0.5}
    for unnamed in (Positional(0.5), Renamed(0.5), torch.ones(2), np.ones(2), {1, 2}, Fraction(1, 2)):
        assert list(describe({"x": unnamed})["x"]) == ["object"]
    several = dist.StudentT(torch.ones(3), torch.zeros(3), 1.0)
    assert describe({"x": several})["x"]["init_args"]["loc"] == {"object": "a tensor of shape (3,)"}
    tensors = {}
    told = describe({"x": several}, tensors)["x"]["init_args"]
    assert told["loc"] == {"tensor": "x.loc"} and torch.equal(tensors["x.loc"], several.loc)
    run = trained(tmp_path / "run", loss=FreeBits(np.float32(0.5)), clip_norm=np.float32(0.5))
    assert load_run(run.path).config["clip_norm"] == 0.5


class Gain(Configured):
    """One whose setting may be None, though that is not its default."""

    def __init__(self, gain=3.0, table=None, *more):
        self.gain, self.table = gain, table


class Level(enum.StrEnum):
    HIGH = "high"


def changed(thing, **settings):
    for name, value in settings.items():
        setattr(thing, name, value)
    return thing


def test_what_a_file_would_bring_back_otherwise_is_an_object_without_a_path():
    for lossy in (
        nn.Sequential(nn.Tanh(), nn.ReLU()),
        changed(BetaELBO(beta=4.0), beta=9.0),
        Gain(2.0, None, 5.0),
        Level.HIGH,
        collections.namedtuple("Pair", "a b")(1, 2),
    ):
        assert list(describe({"x": lossy})["x"]) == ["object"], lossy
    for of_another, name in ((Gain(None), "gain"), (Gain(table={1: 5.0}), "table")):
        assert list(describe({"x": of_another})["x"]["init_args"][name]) == ["object"]
    assert describe({"x": Gain(table={"a": None})})["x"]["init_args"] == {"table": {"a": {"object": "None"}}}
    assert describe({"x": Gain()})["x"]["init_args"] == {}
    assert describe({"x": Gain(table=None)})["x"]["init_args"] == {}
    assert describe({"x": nn.Identity()})["x"]["init_args"] == {}
    for nesting in (0, 1, 2):
        loss = Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=nesting)
        for _ in range(3):  # Pyro adds the particles' plate to what it is given
            loss = build(describe({"x": loss}))["x"]
            assert loss.max_plate_nesting == nesting + 1


def test_a_pair_with_nothing_to_train_is_refused(tmp_path):
    def program(x, obs=None):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            if obs is not None:
                pyro.sample("x", dist.Normal(z, 1.0), obs=obs)

    with pytest.raises(ValueError, match="expected parameters to optimise, got none in model, guide and loss"):
        fit(lambda x: program(x, x), program, torch.zeros(5), out=tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()
