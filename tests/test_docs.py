"""The code on the documentation's pages runs, and the worked examples of CONTRIBUTING.md pass the tests they name."""

import re
from pathlib import Path
from types import SimpleNamespace

import cases
import pytest
import test_guide
import test_matrix
import test_priors
import torch

from pyro_vae.guides import families
from pyro_vae.models import priors

ROOT = Path(__file__).parents[1]


def blocks(page):
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)


def add(monkeypatch, module, tables, code, row):
    """The page's class, in its module, and its row, in the tables; returns the row's name."""
    namespace = dict(vars(module))
    exec(code, namespace)
    short = module.__name__.rpartition(".")[2]
    ((name, value),) = eval("{" + row + "}", {short: SimpleNamespace(**namespace)}).items()
    monkeypatch.setattr(module, name, namespace[name], raising=False)
    for table in tables:
        monkeypatch.setitem(table, name, value)
    return name


def test_the_page_on_priors_runs():
    torch.manual_seed(0)
    exec("\n".join(blocks("docs/priors.md")), {"__name__": "docs"})


def test_the_page_on_estimators_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "docs"}
    exec("\n".join(blocks("docs/estimators.md")), names)
    dreg = []
    for estimator in (names["DReG"], names["DoublyReparameterised"]):
        torch.manual_seed(0)
        loss = estimator(num_particles=4).differentiable_loss(names["model"], names["guide"], names["x"])
        dreg.append(torch.autograd.grad(loss, [*names["guide"].parameters()]))
    for a, b in zip(*dreg, strict=True):
        torch.testing.assert_close(a, b)


def test_the_page_on_sequences_runs(tmp_path, monkeypatch, recorded):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "docs"}
    exec("\n".join(blocks("docs/sequences.md")), names)
    assert names["later"].shape == (200, 3, 30, 2) and names["physical"](u=names["u"]).shape == (3, 100, 2)
    assert names["by_guide"].shape == names["by_particles"].shape == (3,)


def test_the_page_on_data_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "docs"}
    exec("\n".join(blocks("docs/data.md")), names)
    assert names["codes"].mean.shape[0] == 1 and list(names["table"].columns) == ["id", "log_prob", "rank"]
    torch.testing.assert_close(names["run"].schema.restore(names["people"].x), torch.tensor([[1.62, 61.0]]))
    assert (tmp_path / "samples.csv").read_text().startswith("height,weight\n")


@pytest.mark.usefixtures("float64")
def test_the_worked_example_of_a_prior(monkeypatch, recorded, tmp_path):
    code, row, *_ = blocks("CONTRIBUTING.md")
    name = add(monkeypatch, priors, [cases.PRIORS], code, row)
    assert name == "Cauchy" and name in code
    test_priors.test_draws_have_a_density_that_moves_and_is_saved(name)
    test_matrix.check_pair((name, "IAF", "Poisson"), tmp_path)


@pytest.mark.usefixtures("float64")
def test_the_worked_example_of_a_family(monkeypatch, recorded, tmp_path):
    *_, code, row = blocks("CONTRIBUTING.md")
    name = add(monkeypatch, families, [cases.FAMILIES, test_matrix.FAMILIES], code, row)
    assert name == "Laplace" and name in code
    for model in test_guide.CONJUGATES:
        test_guide.test_mean_weight_is_the_evidence(model, name)
    test_matrix.check_pair(("GaussianMixture", name, "Normal"), tmp_path)
