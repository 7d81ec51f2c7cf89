"""Stochastic volatility on daily returns of the S&P 500, 2006 to 2016: predictive log-density of days held out.

    z_1 ~ N(m, v),  z_t ~ N(a z_{t-1} + b, s^2),  x_t ~ N(mu, e^{z_t}) or a Student t of that scale

learned with `StateSpaceGuide`. The days are split in time: 32 quarters of 63 days to train, 4 to choose by, 4 to test,
the last a part of one. Each model is scored on the test days one after the other, given all days before: the particle
filter's ``ln p(x_t | x_<t)``, 5,000 particles, with the parameters of the training days, in nats per day. Beside it a
constant variance, normal and Student t, and an exponentially weighted one, whose decay the validation days choose.
Standard errors are of the difference to the constant variance, over blocks of 21 days.

``--nuts`` holds the parameters of the first 250 days against Pyro's NUTS on the same model.

    python benchmarks/volatility.py
    python benchmarks/volatility.py --nuts
"""

from __future__ import annotations

import argparse
import math
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from common import record, recorded
from pyro.infer import MCMC, NUTS, TraceMeanField_ELBO
from torch import Tensor, nn

from pyro_vae import fit, load_dataset
from pyro_vae.guides import StateSpaceGuide
from pyro_vae.models import StateSpaceModel
from pyro_vae.models.transitions import Initial, LinearTransition
from pyro_vae.schedules import Cosine

HERE = Path(__file__).parent


class Volatility(nn.Module):
    """x_t ~ N(mu, e^{z_t}), or a Student t of scale e^{z_t / 2} with learned degrees of freedom."""

    def __init__(self, heavy: bool) -> None:
        super().__init__()
        self.mu = nn.Parameter(torch.zeros(()))
        self.log_freedom = nn.Parameter(torch.tensor(math.log(8.0))) if heavy else None

    def forward(self, z: Tensor) -> dist.Distribution:
        if self.log_freedom is None:
            return dist.Normal(self.mu, (z / 2).exp()).to_event(1)
        return dist.StudentT(2 + self.log_freedom.exp(), self.mu, (z / 2).exp()).to_event(1)


def model_of(heavy: bool) -> StateSpaceModel:
    transition = LinearTransition(1)
    with torch.no_grad():
        transition.mean.function.weight.fill_(0.95)
        transition.log_scale.fill_(math.log(0.2))
    return StateSpaceModel(Initial(1), transition, Volatility(heavy))


def trained(heavy: bool, train: Any, epochs: int, seed: int) -> StateSpaceModel:
    torch.manual_seed(seed)
    model = model_of(heavy)
    guide = StateSpaceGuide(model, "ST-LR", hidden=32)
    fit(
        model,
        guide,
        train,
        loss=TraceMeanField_ELBO(num_particles=4, vectorize_particles=True),
        optimizer=partial(torch.optim.Adam, lr=5e-3),
        learning_rate=Cosine(epochs),
        epochs=epochs,
        batch_size=8,
        clip_norm=100.0,
        seed=seed,
        out=tempfile.mkdtemp(),
        compile=True,
    )
    return model


def sequential(model: StateSpaceModel, x: Tensor, last: int, seed: int = 0) -> Tensor:
    """``ln p(x_t | x_<t)`` of the last days of a series (T,)."""
    torch.manual_seed(seed)
    return model.filter(x[None, :, None], num_particles=5_000).per_step[0, -last:].double()


def weighted(x: Tensor, decay: float) -> Tensor:
    """``ln N(x_t; 0, v_t)`` with v_t = decay v_{t-1} + (1 - decay) x_{t-1}^2, for all t."""
    v, found = x[:63].square().mean(), []
    for value in x:
        found.append(dist.Normal(0.0, v.sqrt()).log_prob(value))
        v = decay * v + (1 - decay) * value.square()
    return torch.stack(found)


def compared(scores: Tensor, baseline: Tensor) -> dict[str, float]:
    difference = (scores - baseline).split(21)
    means = torch.stack([each.mean() for each in difference if len(each) == 21])
    return {
        "nats_per_day": float(scores.mean()),
        "above_constant": float((scores - baseline).mean()),
        "standard_error": float(means.std() / len(means) ** 0.5),
    }


def held_out(root: str | None, epochs: int, seeds: list[int]) -> dict[str, Any]:
    dataset = load_dataset("sp500", root=root)
    assert dataset.scale is not None
    train, valid, test = (split.values[:, 0].double() for split in (dataset.train, dataset.valid, dataset.test))
    before, units = torch.cat([train, valid]), -float(dataset.scale.log())  # scores in percent
    x = torch.cat([before, test])
    constant = dist.Normal(train.mean(), train.std()).log_prob(test)
    freedom, _, scale = student(train)
    decays = [0.9, 0.92, 0.94, 0.95, 0.96, 0.97, 0.98, 0.99]
    of_valid = {decay: float(weighted(before, decay)[-len(valid) :].mean()) for decay in decays}
    decay = max(of_valid, key=of_valid.__getitem__)
    rows: dict[str, Any] = {"constant": compared(constant, constant)}
    rows["constant, Student t"] = compared(dist.StudentT(freedom, train.mean(), scale).log_prob(test), constant)
    rows[f"exponentially weighted, {decay}"] = compared(weighted(x, decay)[-len(test) :], constant)
    for name, heavy in (("stochastic volatility", False), ("stochastic volatility, Student t", True)):
        for seed in seeds:
            model = trained(heavy, dataset.train, epochs, seed)
            scores = sequential(model, x.float(), len(test))
            linear = model.transition.mean.function
            rows[f"{name}, seed {seed}"] = compared(scores, constant) | {
                "a": linear.weight.item(), "b": linear.bias.item(), "s": model.transition.log_scale.exp().item(),
                "noise_of_particles": float((scores - sequential(model, x.float(), len(test), 1)).abs().mean()),
            }  # fmt: skip
    for row in rows.values():
        row["nats_per_day"] += units
    return {"days": [len(train), len(valid), len(test)], "rows": rows}


def student(x: Tensor) -> tuple[float, float, float]:
    """Degrees of freedom, location and scale, by maximum likelihood."""
    from scipy import stats

    return stats.t.fit(x.numpy())


def against_nuts(root: str | None, epochs: int, days: int = 250) -> dict[str, Any]:
    """Posterior of the parameters by NUTS, with priors, and the guide's maximum of the bound; E[z_t | x] of both."""
    dataset = load_dataset("sp500", root=root)
    x = dataset.train.values[:days, 0]
    ages = (torch.arange(days)[:, None] - torch.arange(days)).clamp(min=0)

    def model() -> None:
        a = 2 * pyro.sample("a", dist.Beta(20.0, 1.5)) - 1
        level = pyro.sample("level", dist.Normal(0.0, 2.0))
        s = pyro.sample("s", dist.HalfNormal(0.5))
        noise = pyro.sample("noise", dist.Normal(0.0, 1.0).expand([days]).to_event(1))
        first = noise[:1] / (1 - a.square()).sqrt()  # of the stationary law
        z = pyro.deterministic("z", level + s * (a**ages).tril() @ torch.cat([first, noise[1:]]))
        pyro.sample("x", dist.Normal(0.0, (z / 2).exp()).to_event(1), obs=x)

    pyro.set_rng_seed(0)
    kernel = NUTS(model, jit_compile=True, ignore_jit_warnings=True, max_tree_depth=8)
    mcmc = MCMC(kernel, num_samples=500, warmup_steps=500)
    mcmc.run()
    samples = mcmc.get_samples()
    with torch.no_grad():
        z = pyro.infer.Predictive(model, samples, return_sites=("z",))()["z"]
    ours = trained_once(x, epochs)
    smooth = ours[0].smooth(ours[1], x[None, :, None], num_samples=1000)[:, 0, :, 0]
    filtered_by = torch.stack([z.mean(0), smooth.mean(0)])
    return {
        "days": days,
        "nuts": {
            "a": float((2 * samples["a"] - 1).mean()), "a_sd": float((2 * samples["a"] - 1).std()),
            "s": float(samples["s"].mean()), "s_sd": float(samples["s"].std()),
        },
        "ours": {"a": ours[0].transition.mean.function.weight.item(), "s": ours[0].transition.log_scale.exp().item()},
        "correlation_of_smoothed_means": float(torch.corrcoef(filtered_by)[0, 1]),
        "root_mean_square_difference": float((z.mean(0) - smooth.mean(0)).square().mean().sqrt()),
        "posterior_standard_deviation": float(z.std(0).mean()),
        "ours_standard_deviation": float(smooth.std(0).mean()),
    }  # fmt: skip


def trained_once(x: Tensor, epochs: int) -> tuple[StateSpaceModel, StateSpaceGuide]:
    torch.manual_seed(0)
    model = model_of(heavy=False)
    guide = StateSpaceGuide(model, "ST-LR", hidden=32)
    fit(
        model,
        guide,
        x[None, :, None],
        loss=TraceMeanField_ELBO(num_particles=8, vectorize_particles=True),
        optimizer=partial(torch.optim.Adam, lr=5e-3),
        learning_rate=Cosine(10 * epochs),
        epochs=10 * epochs,
        batch_size=1,
        clip_norm=100.0,
        compile=True,
        out=tempfile.mkdtemp(),
    )
    return model, guide


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--nuts", action="store_true")
    parser.add_argument("--root", default=None, help="folder of the data (default: PYRO_VAE_DATA)")
    arguments = parser.parse_args()
    target = HERE / "volatility.json"
    if arguments.nuts:
        found = {"nuts": against_nuts(arguments.root, arguments.epochs)}
    else:
        found = held_out(arguments.root, arguments.epochs, arguments.seeds)
    results = recorded(target) | found
    if not arguments.nuts:
        for name, row in results["rows"].items():
            print(f"{name:>42}  {row['nats_per_day']:.4f}  {row['above_constant']:+.4f} ± {row['standard_error']:.4f}")
    record(target, results)


if __name__ == "__main__":
    main()
