"""CompiledSVI gives SVI's numbers, for every kind of program, or says why it runs eagerly."""

import argparse
import array
import collections
import contextlib
import copy
import dataclasses
import functools
import inspect
import logging
import math
import os
import pickle
import random
import re
import subprocess
import sys
import types
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import CASES
from effects import COMPILED, EAGER
from programs import PROGRAMS, SemiSupervised, X
from pyro import poutine
from pyro.infer import (
    SVI,
    RenyiELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    TraceTailAdaptive_ELBO,
    config_enumerate,
)
from pyro.nn import PyroModule, PyroParam
from torch import nn
from torch._inductor.utils import clear_caches

import pyro_vae.compiled
import pyro_vae.optim
import pyro_vae.svi
from pyro_vae import CompiledSVI, checkpoint, evaluate, fit
from pyro_vae.compiled import Compiled, FallbackWarning
from pyro_vae.svi import NonFiniteLossError

ELBO = Trace_ELBO()


pytestmark = pytest.mark.usefixtures("float64")


def adam(**arguments):
    return pyro.optim.Adam({"lr": 0.05, **arguments})


def trajectory(svi_class, make, loss, args=(X,), steps=5, optim=adam, after_step=lambda svi: None):
    """The losses of some steps from a seed, and the parameters and buffers that they end in."""
    pyro.clear_param_store()
    torch.manual_seed(0)
    model, guide = make()
    svi = svi_class(model, guide, optim(), loss)
    losses = []
    for _ in range(steps):
        losses.append(svi.step(*args))
        after_step(svi)
    return losses, values(model, guide), svi


def graphs(svi):
    parts = (svi._whole, svi._gradients)
    return [recording for part in parts for variants in part._recordings.values() for recording in variants]


def values(*programs):
    store = pyro.get_param_store()
    found = {name: store[name].detach().clone() for name in store}
    for program in programs:
        owner = getattr(program, "__self__", program)
        if isinstance(owner, nn.Module):
            found |= {name: value.clone() for name, value in owner.state_dict().items()}
    return found


def left_gradients():
    """What steps leave in the gradients of the store's parameters."""
    return {name: None if p.grad is None else p.grad.clone() for name, p in pyro.get_param_store().named_parameters()}


def assert_equal(found, expected, tolerance=1e-10):
    assert found.keys() == expected.keys() and len(found) > 0
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=tolerance, atol=tolerance), name


def assert_same_trajectory(make, loss, args=(X,), **arguments):
    expected_losses, expected, _ = trajectory(SVI, make, loss, args, **arguments)
    expected_gradients = left_gradients()
    losses, found, svi = trajectory(CompiledSVI, make, loss, args, **arguments)
    assert losses == pytest.approx(expected_losses, rel=1e-10)
    assert_equal(found, expected)
    assert str(left_gradients()) == str(expected_gradients)
    return svi


def beside(make, svi_class, steps):
    """The losses, the parameters and their gradients, and what the user's objects hold after steps of a row."""
    pyro.clear_param_store()
    torch.manual_seed(0)
    random.seed(0)
    model, guide, step, left = make()
    svi = svi_class(model, guide, adam(), ELBO)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        losses = [step(svi, i) for i in range(steps)]
    gradients = {name: None if g is None else g.tolist() for name, g in left_gradients().items()}
    return losses, values(), gradients, left(), svi


@pytest.mark.parametrize("name", [*COMPILED, *EAGER])
def test_what_a_step_leaves_in_the_objects_of_a_user(name, recorded):
    """After 7 steps, of which the last is no audit: the same as SVI, compiled or for the reason that is true."""
    make, expectation = {**COMPILED, **EAGER}[name]
    losses, parameters, gradients, left, _ = beside(make, SVI, 7)
    found = beside(make, CompiledSVI, 7)
    assert found[0] == pytest.approx(losses, rel=1e-10)
    assert_equal(found[1], parameters)
    assert found[2] == gradients
    assert str(found[3]) == str(left) or found[3] == pytest.approx(left, rel=1e-10)
    if name in COMPILED:
        assert found[4].compiled and len(graphs(found[4])) <= expectation
    else:
        assert not found[4].compiled and re.search(expectation, found[4].fallback_reason)


HOST = {"_local_scalar_dense", "item", "nonzero", "masked_select", "unique", "is_nonzero", "equal"}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_has_the_same_trajectory(name, recorded):
    """And a step does what a CUDA graph can, as far as a CPU tells: no host read, no copy, no shape that moves."""
    svi = assert_same_trajectory(*PROGRAMS[name])
    assert svi.compiled and svi.fallback_reason is None
    (recording,) = graphs(svi)
    nodes = [node for node in recording.graph.graph.nodes if node.op == "call_function"]
    assert len(nodes) > 5
    for node in nodes:
        assert node.target.__name__.partition(".")[0] not in HOST
        assert node.kwargs.get("device") in (None, torch.device("cpu"))
        assert all(isinstance(size, int) for size in getattr(node.meta.get("tensor_meta"), "shape", ()))


LOSSES = {
    "Trace_ELBO": Trace_ELBO,
    "TraceMeanField_ELBO": TraceMeanField_ELBO,
    "TraceEnum_ELBO": lambda: TraceEnum_ELBO(max_plate_nesting=1, strict_enumeration_warning=False),
    "particles": lambda: TraceMeanField_ELBO(num_particles=2),
    "vectorised": lambda: Trace_ELBO(num_particles=2, vectorize_particles=True, max_plate_nesting=1),
}


TABLE = [(case, loss) for case in CASES if "_prior" not in case.name for loss in LOSSES]  # priors: test_matrix.py


@pytest.mark.parametrize(("case", "loss"), TABLE, ids=[f"{case.name}-{loss}" for case, loss in TABLE])
def test_the_graph_gives_the_eager_loss_and_gradients(case, loss, recorded_once):
    """Of both, from the same draws: the loss, and each gradient relative to its own norm, to 1e-10 in float64."""
    model, guide = (program.double() for program in case.pair())
    x = case.data().double()
    svi = CompiledSVI(model, guide, pyro.optim.SGD({"lr": 0.01}), LOSSES[loss]())
    results = []
    for backward in (super(CompiledSVI, svi)._backward, svi._backward):
        torch.manual_seed(1)
        svi.initialize(x)
        for parameter in svi.parameters.values():
            parameter.grad = None
        torch.manual_seed(1)
        results.append([backward(x)[0], *(p.grad for p in svi.parameters.values() if p.grad is not None)])
    assert svi.compiled and len(results[0]) == len(results[1]) > 1
    for eager, compiled in zip(*results, strict=True):
        assert (eager - compiled).norm() <= 1e-10 * eager.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["bernoulli", pytest.param("convolutional", marks=pytest.mark.slow)])
def test_inductor_gives_the_eager_loss_and_gradients(name, dtype):
    """With eager's random numbers."""
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-10}[dtype]
    case = next(case for case in CASES if case.name == name)
    model, guide = (program.to(dtype) for program in case.pair())
    x = case.data().to(dtype)
    torch.set_default_dtype(dtype)
    svi = CompiledSVI(model, guide, pyro.optim.SGD({"lr": 0.01}), TraceMeanField_ELBO())
    svi.initialize(x)
    results = []
    for backward in (super(CompiledSVI, svi)._backward, svi._backward):
        torch.manual_seed(1)
        results.append([backward(x)[0], *(p.grad.clone() for p in svi.parameters.values())])
        for parameter in svi.parameters.values():
            parameter.grad = None
    assert svi.compiled
    for eager, compiled in zip(*results, strict=True):
        assert (eager - compiled).norm() <= tolerance * eager.norm()


@pytest.mark.parametrize("optimizer", ["Adam", "AdamW"])
def test_inductor_takes_the_same_steps(optimizer):
    """With the update inside the graph, and a learning rate that changes without another graph."""

    def after_step(svi):
        for optimizer in svi.optim.optim_objs.values():
            optimizer.param_groups[0]["lr"] *= 0.9

    optim = functools.partial(getattr(pyro.optim, optimizer), {"lr": 0.05, "weight_decay": 0.1})
    svi = assert_same_trajectory(*PROGRAMS["AutoNormal"], optim=optim, after_step=after_step)
    assert svi._whole.compiled and len(graphs(svi)) == 1


def test_the_semi_supervised_example_with_one_name_changed(recorded):
    """Two SVIs over one module and one optimiser, on labelled and unlabelled batches in turn."""
    labels = torch.eye(3)[torch.arange(6) % 3]
    found = []
    for svi_class in (SVI, CompiledSVI):
        pyro.clear_param_store()
        torch.manual_seed(0)
        m2 = SemiSupervised()
        optim = pyro.optim.Adam({"lr": 0.01, "betas": (0.9, 0.99)})
        guide = config_enumerate(m2.guide, "parallel", expand=True)
        loss = TraceEnum_ELBO(max_plate_nesting=1, strict_enumeration_warning=False)
        main = svi_class(m2.model, guide, optim, loss)
        auxiliary = svi_class(m2.classify, lambda x, y: None, optim, ELBO)
        losses = []
        for step in range(6):
            if step % 2:
                losses.append(main.step(X))
            else:
                losses += [main.step(X, labels), auxiliary.step(X, labels)]
        found.append((losses, values(m2)))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-10)
    assert_equal(found[1][1], found[0][1])
    assert main.compiled and auxiliary.compiled


class TestOptimisers:
    OPTIMISERS = {
        "Adam": adam,
        "AdamW": lambda: pyro.optim.AdamW({"lr": 0.05, "weight_decay": 0.1}),
        "SGD": lambda: pyro.optim.SGD({"lr": 0.001, "momentum": 0.9}),
        "Adagrad": lambda: pyro.optim.Adagrad({"lr": 0.05}),
        "RMSprop": lambda: pyro.optim.RMSprop({"lr": 0.01}),
        "ClippedAdam": lambda: pyro.optim.ClippedAdam({"lr": 0.05, "clip_norm": 0.5, "lrd": 0.9, "weight_decay": 0.1}),
        "centred ClippedAdam": lambda: pyro.optim.ClippedAdam({"lr": 0.05, "centered_variance": True}),
        "AdagradRMSProp": lambda: pyro.optim.AdagradRMSProp({"eta": 0.1}),
        "per parameter": lambda: pyro.optim.Adam(lambda name: {"lr": 0.1 if "scale" in name else 0.01}),
        "clip_norm": lambda: pyro.optim.Adam({"lr": 0.05}, {"clip_norm": 0.5}),
        "clip_value": lambda: pyro.optim.SGD({"lr": 0.01}, {"clip_value": 0.2}),
    }

    @pytest.mark.parametrize("name", OPTIMISERS)
    def test_the_updates_are_those_of_one_optimiser_per_parameter(self, name, recorded):
        svi = assert_same_trajectory(*PROGRAMS["AutoNormal"], optim=self.OPTIMISERS[name])
        assert svi.compiled
        kernel = [group.get("fused") for group in svi.update._joint.param_groups]
        assert len(kernel) == (2 if name == "per parameter" else 1)
        assert all(kernel) == (name in ("Adam", "AdamW", "SGD", "Adagrad", "per parameter", "clip_norm", "clip_value"))

    def test_adam_on_many_parameters_acts_beside_the_graph(self, recorded, monkeypatch):
        monkeypatch.setattr(pyro_vae.optim, "MAX_IN_GRAPH", 3)
        svi = assert_same_trajectory(*PROGRAMS["AutoNormal"])
        assert svi.compiled and svi._gradients.compiled and not svi._whole.compiled

    @pytest.mark.parametrize("schedule", ["ExponentialLR", "ReduceLROnPlateau"])
    def test_a_scheduler_is_stepped_through_its_own_object(self, schedule, recorded):
        arguments = {"gamma": 0.5} if schedule == "ExponentialLR" else {"patience": 0, "factor": 0.1}

        def optim():
            adam = {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}}
            return getattr(pyro.optim, schedule)({**adam, **arguments})

        def after_step(svi):
            svi.optim.step() if schedule == "ExponentialLR" else svi.optim.step(1.0)

        svi = assert_same_trajectory(*PROGRAMS["AutoNormal"], optim=optim, after_step=after_step)
        rates = [group["lr"] for group in svi.update.groups]
        assert rates == pytest.approx([0.1 * 0.5**5 if schedule == "ExponentialLR" else 1e-5] * len(rates))

    @pytest.mark.parametrize("pair", ["to stock", "from stock"])
    def test_the_state_is_exchanged_with_stock_svi(self, pair, recorded, tmp_path):
        """Save after three steps in one, load and go on for three in the other: as six steps in stock."""
        classes = {"to stock": (CompiledSVI, SVI), "from stock": (SVI, CompiledSVI)}[pair]
        clipped = functools.partial(pyro.optim.ClippedAdam, {"lr": 0.05, "lrd": 0.9})
        for make_optim in (adam, clipped):
            _, expected, _ = trajectory(SVI, *PROGRAMS["AutoDelta"], steps=6, optim=make_optim)
            _, _, svi = trajectory(classes[0], *PROGRAMS["AutoDelta"], steps=3, optim=make_optim)
            svi.optim.save(tmp_path / "optim")
            optim = make_optim()
            optim.load(tmp_path / "optim")
            second = classes[1](svi.model, svi.guide, optim, ELBO)
            for _ in range(3):
                second.step(X)
            assert_equal(values(svi.guide), expected)
            assert optim.get_state().keys() == svi.optim.get_state().keys()

    def test_a_learning_rate_changed_by_hand_takes_effect(self, recorded):
        def after_step(svi):
            for optimizer in svi.optim.optim_objs.values():
                optimizer.param_groups[0]["lr"] *= 0.5

        assert_same_trajectory(*PROGRAMS["AutoNormal"], after_step=after_step)

    def test_a_torch_optimiser_is_one_over_all_parameters(self, recorded):
        made = []

        def optim(parameters):
            made.append(torch.optim.Adam(parameters, lr=0.05))
            return made[-1]

        _, expected, _ = trajectory(SVI, *PROGRAMS["AutoNormal"])
        _, found, svi = trajectory(CompiledSVI, *PROGRAMS["AutoNormal"], optim=lambda: optim)
        assert_equal(found, expected)
        assert svi.update.optimizers == made and made[0].param_groups[0]["fused"]

    def test_an_optimiser_of_an_unknown_kind_is_one_for_each_parameter(self, recorded):
        class Normalised(torch.optim.SGD):
            """Divides by the norm over its group, and counts."""

            def step(self, closure=None):
                for group in self.param_groups:
                    group["count"] = group.get("count", 0) + 1
                    norm = sum(p.grad.square().sum() for p in group["params"]).sqrt()
                    for p in group["params"]:
                        p.data -= group["lr"] * p.grad / (norm * group["count"])

        optim = functools.partial(pyro.optim.PyroOptim, Normalised, {"lr": 0.05})
        svi = assert_same_trajectory(*PROGRAMS["AutoNormal"], optim=optim)
        assert {o.param_groups[0]["count"] for o in svi.optim.optim_objs.values()} == {5}

    @pytest.mark.parametrize("edit", ["replaced", "cleared"])
    def test_a_state_that_is_edited_by_hand(self, edit, recorded):
        def after_step(svi):
            for optimizer in svi.optim.optim_objs.values():
                for p, state in list(optimizer.state.items()):
                    if edit == "replaced":
                        state["exp_avg"] = 2 * state["exp_avg"]
                    else:
                        del optimizer.state[p]

        assert_same_trajectory(*PROGRAMS["AutoNormal"], after_step=after_step)

    def test_numbers_changed_by_hand_take_effect(self, recorded):
        def after_step(svi):
            for optimizer in svi.optim.optim_objs.values():
                group = optimizer.param_groups[0]
                group["betas"] = (group["betas"][0] * 0.9, group["betas"][1] * 0.99)
                group["eps"] *= 3
                group["weight_decay"] *= 2

        assert_same_trajectory(
            *PROGRAMS["AutoNormal"], after_step=after_step, optim=lambda: adam(eps=0.01, weight_decay=0.1)
        )

    def test_gradients_that_share_memory_are_clipped_once(self, recorded):
        def model(x):
            a, b = (pyro.param(name, torch.zeros(2)) for name in "ab")
            pyro.sample("x", dist.Normal(a + b, 1.0).expand(x.shape).to_event(2), obs=x)

        found = []
        for svi_class in (pyro_vae.svi.SVI, CompiledSVI):
            pyro.clear_param_store()
            svi = svi_class(model, lambda x: None, functools.partial(torch.optim.SGD, lr=0.1), ELBO, clip_norm=0.5)
            for _ in range(3):
                svi.step(X)
            found.append(values())
        assert svi.compiled
        assert_equal(found[1], found[0])

    def test_gradients_come_in_the_layout_of_their_parameters(self, recorded):
        """Fused optimisers take their numbers in the order of memory."""

        def model(x):
            w = pyro.param("w", torch.arange(6.0).reshape(3, 2))
            pyro.sample("x", dist.Normal(w.T.contiguous().square().flatten(), 1.0).to_event(1), obs=torch.ones(6))

        found = []
        for svi_class in (SVI, CompiledSVI):
            pyro.clear_param_store()
            svi = svi_class(model, lambda x: None, pyro.optim.Adam({"lr": 0.1}, {"clip_norm": 1e9}), ELBO)
            for _ in range(3):
                svi.step(X)
            found.append(values())
        assert svi.compiled and svi._gradients.compiled
        assert_equal(found[1], found[0])

    def test_settings_of_the_user_stand(self, recorded):
        svi = assert_same_trajectory(*PROGRAMS["AutoNormal"], optim=lambda: adam(foreach=True))
        assert [group["fused"] for group in svi.update._joint.param_groups] == [None]


def eager_steps(make, args=(X,), loss=ELBO, steps=4):
    """The steps of a program that falls back are those of stock SVI; returns the one warning's reason."""
    expected = trajectory(SVI, make, loss, args, steps=steps)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        losses, found, svi = trajectory(CompiledSVI, make, loss, args, steps=steps)
    assert losses == pytest.approx(expected[0], rel=1e-12)
    assert_equal(found, expected[1], 1e-12)
    said = [w for w in caught if issubclass(w.category, FallbackWarning)]
    assert not svi.compiled and len(said) == 1 and svi.fallback_reason in str(said[0].message)
    assert said[0].filename == __file__
    assert "Mend: " in svi.fallback_reason
    return svi.fallback_reason


def location_guide(x):
    location = pyro.param("location", torch.zeros(()))
    pyro.sample("m", dist.Normal(location, 1.0))


def location_model(x, weight=1.0):
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)), poutine.scale(scale=weight):
        pyro.sample("x", dist.Normal(m, 1.0).expand([2]).to_event(1), obs=x)


class TestFallBacks:
    def test_control_flow_on_a_drawn_value(self, recorded):
        def model(x):
            m = pyro.sample("m", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(m if m > 0 else 2 * m, 1.0), obs=x[0, 0])

        assert "m if m > 0 else 2 * m" in eager_steps(lambda: (model, location_guide))

    @pytest.mark.parametrize(
        "read", [lambda m: float(m.detach()), lambda m: m.detach().numpy().item(), lambda m: m.detach().tolist()]
    )
    def test_a_value_read_on_the_host(self, read, recorded):
        def model(x):
            m = pyro.sample("m", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(read(m), 1.0), obs=x[0, 0])

        assert "on the host" in eager_steps(lambda: (model, location_guide))

    def test_a_structure_that_changes(self, recorded):
        def make():
            runs = []

            def model(x):
                runs.append(None)
                m = pyro.sample("m", dist.Normal(0.0, 1.0))
                for i in range(1 + len(runs) % 2):
                    pyro.sample(f"x{i}", dist.Normal(m, 1.0), obs=x[i, 0])

            return model, location_guide

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            svi = trajectory(CompiledSVI, make, ELBO)[2]
        assert not svi.compiled and "Mend: " in svi.fallback_reason and len(caught) == 1

    @pytest.mark.parametrize("kind", ["number", "buffer", "two numbers"])
    def test_a_counter_of_the_program_counts_its_own_runs_alone(self, kind, recorded):
        class Annealed(nn.Module):
            def __init__(self):
                super().__init__()
                self.calls, self.others = 0, 0
                self.register_buffer("average", torch.zeros(()))

            def forward(self, x):
                if kind == "buffer":
                    self.average = 0.9 * self.average + x.mean()
                else:
                    self.calls += 1
                    self.others += kind == "two numbers"
                location_model(x, weight=1 / (1 + self.calls + 2 * self.others + self.average.detach()))

        reason = eager_steps(lambda: (Annealed(), location_guide))
        expected = "a constant of the program is" if kind == "buffer" else "'calls' changes as the program runs"
        assert expected in reason

    def test_numbers_from_elsewhere(self, recorded):
        def model(x):
            location_model(x, weight=0.5 + random.random() + np.random.rand())

        def make():
            random.seed(0)
            np.random.seed(0)
            return model, location_guide

        assert "two runs of the program differ" in eager_steps(make)

    def test_gradients_that_are_not_those_of_the_differentiable_loss(self, recorded):
        class Scaled(Trace_ELBO):
            def loss_and_grads(self, model, guide, *args, **kwargs):
                loss = 0.1 * self.differentiable_loss(model, guide, *args, **kwargs)
                loss.backward()
                return loss.item()

        assert "its loss_and_grads replaces" in eager_steps(lambda: (location_model, location_guide), loss=Scaled())

    def test_a_tensor_argument_that_requires_gradients(self, recorded):
        x = X.clone().requires_grad_()
        assert "requires gradients" in eager_steps(lambda: (location_model, location_guide), (x,))

    def test_an_argument_that_is_new_each_time(self, recorded, monkeypatch):
        monkeypatch.setattr(pyro_vae.compiled, "MAX_SEEN_ONCE", 3)
        svi = CompiledSVI(lambda x, i: location_model(x), lambda x, i: location_guide(x), adam(), ELBO)
        with pytest.warns(FallbackWarning, match="3 signatures have come"):
            for i in range(5):
                svi.step(X, i)

    def test_objects_that_cannot_be_walked(self, recorded):
        class Link:
            def __init__(self, next):
                self.next = next

        def make():
            link = None
            for _ in range(600):
                link = Link(link)

            def model(x):
                location_model(x, 1.0 if link.next is not None else 0.5)

            return model, location_guide

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FallbackWarning)
            expected, found = (trajectory(svi_class, make, ELBO) for svi_class in (SVI, CompiledSVI))
        assert found[0] == pytest.approx(expected[0], rel=1e-10)

    def test_an_error_of_the_program_is_its_own(self, recorded):
        svi = CompiledSVI(location_model, location_guide, adam(), ELBO)
        svi.step(X)
        for _ in range(2):
            with pytest.raises(TypeError, match="len"):
                svi.step(torch.zeros(()))
        svi.step(X)
        assert svi.compiled

    def test_what_no_compiled_step_can_run(self, monkeypatch):
        """An error after the recording leads to eager steps, not out of the loop."""
        monkeypatch.setattr(pyro_vae.compiled, "_compile", lambda graph, tensors: lambda *tensors: 1 / 0)
        assert "ZeroDivisionError" in eager_steps(lambda: (location_model, location_guide))

    def test_a_loss_that_is_a_pair(self):
        def model(x):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[0, 0])

        def guide(x):
            pyro.sample("z", dist.Normal(pyro.param("location", torch.zeros(())), 1.0))

        loss = pyro.infer.ReweightedWakeSleep(num_particles=2, vectorize_particles=False)
        with pytest.warns(FallbackWarning, match="ReweightedWakeSleep has no differentiable_loss"):
            svi = CompiledSVI(model, guide, adam(), loss)
        assert len(svi.evaluate_loss(X)) == 2
        losses, found, _ = trajectory(pyro_vae.svi.SVI, lambda: (model, guide), loss)
        expected, after, _ = trajectory(SVI, lambda: (model, guide), loss)
        assert losses == expected and len(losses[0]) == 2
        assert_equal(found, after)

    def test_gradients_of_the_users_own(self):
        def loss_and_grads(model, guide, x):
            loss = ELBO.differentiable_loss(model, guide, x)
            (2 * loss).backward()
            return loss.item()

        results = []
        for kind in (SVI, CompiledSVI):
            pyro.clear_param_store()
            torch.manual_seed(0)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FallbackWarning)
                svi = kind(location_model, location_guide, adam(), ELBO.loss, loss_and_grads)
            losses = [svi.step(X) for _ in range(3)]
            results.append([*losses, *(p.tolist() for p in pyro.get_param_store().values())])
        assert results[0] == results[1] and "loss_and_grads was given" in svi.fallback_reason

    def test_an_argument_that_cannot_be_compared(self, recorded):
        programs = (lambda x, o: location_model(x), lambda x, o: location_guide(x))
        reason = eager_steps(lambda: programs, (X, {1, 2}))
        assert "an argument is a set" in reason

    @pytest.mark.parametrize("loss", [TraceGraph_ELBO(), RenyiELBO(num_particles=2)], ids=lambda x: type(x).__name__)
    def test_a_loss_that_is_no_differentiable_function(self, loss, recorded):
        assert type(loss).__name__ in eager_steps(lambda: (location_model, location_guide), loss=loss)

    def test_a_handler_that_would_see_no_sites(self, recorded):
        svi = CompiledSVI(location_model, location_guide, adam(), ELBO)
        seen = []
        around = poutine.infer_config(config_fn=lambda site: seen.append(site["name"]) or {})
        with pytest.warns(FallbackWarning, match="InferConfigMessenger around the step"), around:
            svi.step(X)
        assert "m" in seen and not svi.compiled

    def test_more_signatures_than_are_bounded(self, recorded, monkeypatch):
        monkeypatch.setattr(pyro_vae.compiled, "MAX_VARIANTS", 2)
        svi = CompiledSVI(location_model, location_guide, adam(), ELBO)
        svi.step(X)
        for rows in (6, 5, 5):
            svi.step(X[:rows])
        assert svi.compiled
        with pytest.warns(FallbackWarning, match="2 graphs have been compiled, and another signature came"):
            for _ in range(2):
                svi.step(X[:4])

    def test_more_numbers_than_are_bounded(self, recorded, monkeypatch):
        monkeypatch.setattr(pyro_vae.compiled, "MAX_VARIANTS", 2)
        weights = {"kl": 1}

        def model(x):
            with poutine.scale(scale=weights["kl"]):
                location_model(x)

        svi = CompiledSVI(model, location_guide, adam(), ELBO)
        svi.step(X)
        with pytest.warns(FallbackWarning, match="2 graphs have been compiled, and 'kl' is now 3, not 2"):
            for weights["kl"] in (2, 3):
                svi.step(X)

    def test_no_working_compiler(self, monkeypatch):
        pyro_vae.compiled._compiler_works.cache_clear()
        monkeypatch.setattr(torch._inductor, "standalone_compile", lambda *a, **k: 1 / 0)
        assert "torch finds no working C++ compiler" in eager_steps(lambda: (location_model, location_guide))
        pyro_vae.compiled._compiler_works.cache_clear()

    def test_half_written_files_of_a_killed_process_are_built_anew(self, tmp_path, monkeypatch):
        for folder in (tmp_path / "whole", tmp_path / "cut"):
            monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder))
            clear_caches()
            for file in (tmp_path / "whole").rglob("*.main.so"):
                cut = folder / file.relative_to(tmp_path / "whole")
                cut.parent.mkdir(parents=True)
                cut.touch()
            svi = CompiledSVI(location_model, location_guide, adam(), ELBO)
            for _ in range(2):
                svi.step(X)
            assert svi.compiled
        assert cut.exists()
        clear_caches()

    def test_a_graph_that_the_compiler_cannot_take(self, monkeypatch):
        real = torch._inductor.standalone_compile

        def small_graphs_only(graph, *args, **kwargs):
            return real(graph, *args, **kwargs) if len(graph.graph.nodes) < 5 else 1 / 0

        monkeypatch.setattr(torch._inductor, "standalone_compile", small_graphs_only)
        assert "cannot compile the program's graph: ZeroDiv" in eager_steps(lambda: (location_model, location_guide))


class Switch:
    """A model that reads a number from where the test puts it."""

    weight = 1.0


SWITCH = Switch()
GLOBAL_WEIGHT = 1.0


def global_model(x):
    location_model(x, GLOBAL_WEIGHT)


def package_model(x):
    location_model(x, package.inner.weight)  # noqa: F821


class PropertySwitch:
    @property
    def weight(self):
        return GLOBAL_WEIGHT


def module_model(net, x):
    pyro.module("net", net)
    location_model(net(x))


class TestGuards:
    """A number of Python that changes between steps leads to a new graph, not to old numbers."""

    def assert_same_steps(self, step, make=lambda: (location_model, location_guide), steps=7, tolerance=1e-10):
        """`step(svi, i)` for i = 0, 1, ...: of stock SVI and CompiledSVI the same losses, parameters and buffers."""
        found = []
        for svi_class in (SVI, CompiledSVI):
            pyro.clear_param_store()
            torch.manual_seed(0)
            svi = svi_class(*make(), adam(), ELBO)
            losses = [step(svi, i) for i in range(steps)]
            found.append((losses, values(svi.model, svi.guide)))
        assert found[1][0] == pytest.approx(found[0][0], rel=tolerance) and svi.compiled
        assert_equal(found[1][1], found[0][1], tolerance)
        return svi

    def assert_same(self, model, change, num_graphs=2):
        def step(svi, i):
            change(1.0 if i < 3 else 0.25)
            return svi.step(X)

        assert len(graphs(self.assert_same_steps(step, lambda: (model, location_guide)))) == num_graphs

    def test_an_attribute(self, recorded):
        self.assert_same(lambda x: location_model(x, SWITCH.weight), lambda w: setattr(SWITCH, "weight", w))

    @pytest.mark.parametrize(
        "keep",
        [
            lambda self, i, loss: self.losses.append(loss),
            lambda self, i, loss: setattr(self, "last", loss),
            lambda self, i, loss: setattr(self, f"loss{i}", loss),
            lambda self, i, loss: self.history.update({i: loss}),
            lambda self, i, loss: globals().update(mean=loss),
        ],
    )
    def test_what_a_training_loop_keeps_beside_costs_no_graph(self, keep, recorded):
        class Trainer:
            """Its methods are model, guide and training loop."""

            def __init__(self, svi_class):
                self.losses, self.history, self.last, self.weight = [], {}, 0.0, 1.0
                self.svi = svi_class(self.model, self.guide, adam(), ELBO)

            def model(self, x):
                location_model(x - x.mean(), self.weight)

            def guide(self, x):
                location_guide(x)

            def train(self, i):
                loss = self.svi.step(X)
                keep(self, i, loss)
                return loss + 0 * (self.last + len(self.losses) + len(self.history))

        losses = []
        for svi_class in (SVI, CompiledSVI):
            pyro.clear_param_store()
            torch.manual_seed(0)
            trainer = Trainer(svi_class)
            losses.append([trainer.train(i) for i in range(6)])
        assert len(graphs(trainer.svi)) == 1
        assert losses[1] == pytest.approx(losses[0], rel=1e-10)

    def test_a_list_among_the_attributes_that_grows(self, recorded):
        switch = Switch()
        switch.weights = []
        change = lambda w: switch.weights.__setitem__(slice(None), [w] if w != 1 else [])  # noqa: E731
        self.assert_same(lambda x: location_model(x, math.prod(switch.weights[:1])), change)

    def test_a_default_dictionary_gets_no_entries(self, recorded):
        options = collections.defaultdict(lambda: 1.0, weight=1.0)
        change = lambda w: options.clear() if w != 1 else options.update(weight=w)  # noqa: E731
        self.assert_same(lambda x: location_model(x, 1.0 if "weight" in options else 0.25), change)
        assert not options

    def test_a_setting_of_a_loss_of_the_users_own(self, recorded):
        class Own(Trace_ELBO):
            pass

        def step(svi, i):
            svi.objective.num_particles = 1 if i < 3 else 2
            return svi.step(X)

        losses = []
        for svi_class in (pyro_vae.svi.SVI, CompiledSVI):
            pyro.clear_param_store()
            torch.manual_seed(0)
            svi = svi_class(location_model, location_guide, adam(), Own())
            losses.append([step(svi, i) for i in range(7)])
        assert losses[1] == pytest.approx(losses[0], rel=1e-10) and svi.compiled

    def test_a_global(self, recorded, monkeypatch):
        self.assert_same(global_model, lambda w: monkeypatch.setitem(globals(), "GLOBAL_WEIGHT", w))

    def test_a_closure(self, recorded):
        weight = 1.0

        def change(value):
            nonlocal weight
            weight = value

        self.assert_same(lambda x: location_model(x, weight), change)

    @pytest.mark.parametrize("kind", [argparse.Namespace, types.SimpleNamespace])
    def test_a_namespace(self, kind, recorded):
        options = kind(weight=1.0)
        self.assert_same(lambda x: location_model(x, options.weight), lambda w: setattr(options, "weight", w))

    def test_an_attribute_of_a_class(self, recorded, monkeypatch):
        self.assert_same(lambda x: location_model(x, Switch.weight), lambda w: monkeypatch.setattr(Switch, "weight", w))

    def test_an_attribute_of_a_class_that_its_instance_gets(self, recorded):
        switch = Switch()
        change = lambda w: setattr(switch, "weight", w) if w != 1 else vars(switch).clear()  # noqa: E731
        self.assert_same(lambda x: location_model(x, switch.weight), change)

    def test_an_attribute_of_a_function(self, recorded):
        def model(x):
            location_model(x, model.weight)

        self.assert_same(model, lambda w: setattr(model, "weight", w))

    def test_a_global_that_a_property_reads(self, recorded, monkeypatch):
        switch = PropertySwitch()
        self.assert_same(
            lambda x: location_model(x, switch.weight), lambda w: monkeypatch.setitem(globals(), "GLOBAL_WEIGHT", w)
        )

    def test_an_attribute_of_a_module_in_a_package(self, recorded, monkeypatch):
        package = types.ModuleType("package")
        package.inner = types.ModuleType("package.inner")
        monkeypatch.setitem(globals(), "package", package)
        self.assert_same(package_model, lambda w: setattr(package.inner, "weight", w))

    def test_a_list_that_grows(self, recorded):
        weights = []
        change = lambda w: weights.__setitem__(slice(None), [w] if w != 1 else [])  # noqa: E731
        self.assert_same(lambda x: location_model(x, math.prod(weights[:1])), change)

    def test_a_key_that_appears(self, recorded):
        options = {}
        change = lambda w: options.clear() if w == 1 else options.update(weight=w)  # noqa: E731
        self.assert_same(lambda x: location_model(x, options.get("weight", 1.0)), change)

    def test_a_handler_as_model(self, recorded):
        options = {"weight": 1.0}
        model = poutine.trace(lambda x: location_model(x, options["weight"]))
        self.assert_same(model, lambda w: options.update(weight=w))

    def test_values_that_a_handler_conditions_on(self, recorded):
        data, values = {}, {w: torch.tensor(w) for w in (1.0, 0.25)}

        def model(x):
            location_model(x)
            pyro.sample("y", dist.Normal(pyro.param("location"), 1.0))

        conditioned = poutine.condition(model, data=data)
        self.assert_same(conditioned, lambda w: data.update(y=values[w]), num_graphs=1)  # which takes y as an argument

    def test_an_object_as_argument(self, recorded):
        switch = Switch()

        def step(svi, i):
            switch.weight = 1.0 if i < 3 else 0.25
            return svi.step(X, switch)

        programs = (lambda x, s: location_model(x, s.weight), lambda x, s: location_guide(x))
        self.assert_same_steps(step, lambda: programs)

    def test_another_model_of_the_svi(self, recorded):
        def step(svi, i):
            if i == 3:
                svi.model = functools.partial(location_model, weight=0.25)
            return svi.step(X)

        self.assert_same_steps(step)

    def test_one_tensor_twice_and_then_two(self, recorded):
        programs = (lambda x, y: location_model(x + 2 * y), lambda x, y: location_guide(x))
        self.assert_same_steps(lambda svi, i: svi.step(X if i < 3 else X + 1, X), lambda: programs)

    def test_an_argument_that_the_program_reads_elsewhere_too(self, recorded):
        programs = (lambda x: location_model(x + 2 * X), location_guide)
        self.assert_same_steps(lambda svi, i: svi.step(X if i < 3 else X + 1), lambda: programs)

    @pytest.mark.filterwarnings("ignore:weight was not registered")
    @pytest.mark.parametrize("frozen_first", [True, False])
    def test_a_parameter_that_is_frozen_or_set_free(self, frozen_first, recorded):
        def make():
            net = nn.Linear(2, 2)
            return functools.partial(module_model, net), location_guide

        def step(svi, i):
            svi.model.args[0].weight.requires_grad_((i < 3) != frozen_first)
            return svi.step(X)

        self.assert_same_steps(step, make)

    def test_a_hook_on_a_gradient(self, recorded):
        def make():
            net = nn.Linear(2, 2)
            return functools.partial(module_model, net), location_guide

        def step(svi, i):
            if i == 3:
                svi.model.args[0].weight.register_hook(lambda gradient: 0 * gradient)
            return svi.step(X)

        self.assert_same_steps(step, make)

    def test_autocast(self, recorded):
        def make():
            torch.set_default_dtype(torch.float32)
            torch.manual_seed(0)
            net = nn.Linear(2, 2)
            return functools.partial(module_model, net), location_guide

        def step(svi, i):
            with torch.autocast("cpu", torch.bfloat16, enabled=i >= 3):
                return svi.step(X.float())

        self.assert_same_steps(step, make, tolerance=1e-6)

    def test_an_item_of_a_dictionary(self, recorded):
        settings = {"weight": 1.0}
        self.assert_same(lambda x: location_model(x, settings["weight"]), lambda w: settings.update(weight=w))

    def test_a_handler_around_the_step(self, recorded):
        def step(svi, i):
            with poutine.scale(scale=1.0 if i < 3 else 0.25):
                return svi.step(X)

        self.assert_same_steps(step)

    def test_train_and_eval_mode(self, recorded):
        class Guide(nn.Module):
            def __init__(self):
                super().__init__()
                parts = nn.Linear(2, 4, bias=False), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1)
                self.net = nn.Sequential(*parts)

            def forward(self, x):
                pyro.module("net", self.net)
                pyro.sample("m", dist.Normal(self.net(x).mean(), 1.0))

        def step(svi, i):
            svi.guide.train(i < 3)
            return svi.step(X)

        self.assert_same_steps(step, lambda: (location_model, Guide()))

    def test_a_change_that_no_guard_sees_is_found_by_the_audit(self, recorded):
        """The numbers inside an array are no Python state that is compared at every step."""
        hidden = array.array("d", [1.0])
        svi = CompiledSVI(lambda x: location_model(x, hidden[0]), location_guide, adam(), ELBO)
        for _ in range(3):
            svi.step(X)
        hidden[0] = 0.25
        with pytest.warns(FallbackWarning, match="at call 4 .* the program gives other numbers than the graph"):
            for _ in range(3):
                svi.step(X)

    def test_a_float_argument_enters_as_a_tensor(self, recorded):
        def guide(x, weight):
            location_guide(x)

        svi = self.assert_same_steps(lambda svi, i: svi.step(X, 0.1 * (i + 1)), lambda: (location_model, guide))
        assert len(graphs(svi)) == 1

    def test_batches_of_two_shapes_have_a_graph_each(self, recorded):
        svi = self.assert_same_steps(lambda svi, i: svi.step(X[: 6 if i % 2 else 4]), steps=8)
        assert len(graphs(svi)) == 2

    def test_a_cleared_parameter_store(self, recorded):
        """The parameters are made anew, and trained from there."""

        def step(svi, i):
            if i == 3:
                pyro.clear_param_store()
            return svi.step(X)

        self.assert_same_steps(step)

    def test_parameters_that_appear_later(self, recorded):
        def guide(x):
            location = pyro.param("location", torch.zeros(()))
            scale = pyro.param("late", torch.ones(())) if SWITCH.weight < 1 else 1.0
            pyro.sample("m", dist.Normal(location, scale))

        def step(svi, i):
            SWITCH.weight = 1.0 if i < 3 else 0.5
            return svi.step(X)

        self.assert_same_steps(step, lambda: (location_model, guide))
        assert "late" in pyro.get_param_store()


@pytest.mark.parametrize(("factor", "known"), [(1.0, True), (3.0, False)])
def test_what_rounding_decides_is_no_difference(factor, known, recorded):
    """At a kink two ways of computing the same number come to different sides: here the graph's is put on the other."""
    weight = nn.Parameter(torch.ones(()))
    compiled = Compiled(lambda x: x * (weight > 1))
    compiled(X)
    ((recording,),) = compiled._recordings.values()
    recording.compute = lambda x, *live: [factor * x]
    if known:
        assert torch.equal(compiled(X), X) and compiled.compiled
    else:
        with pytest.warns(FallbackWarning, match="other numbers"):
            assert torch.equal(compiled(X), 0 * X)
    assert weight == 1


def test_a_recording_leaves_random_state_buffers_store_and_modules_as_they_were(recorded):
    model, guide = PROGRAMS["pyro.module, batch norm, dropout"][0]()
    svi = CompiledSVI(model, guide, adam(), ELBO)
    super(CompiledSVI, svi).initialize(X)
    before, state = values(guide.__closure__[0].cell_contents), torch.get_rng_state()
    svi._prepare((X,), {})
    after = values(guide.__closure__[0].cell_contents)
    assert svi.compiled and torch.equal(state, torch.get_rng_state())
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert all(parameter.grad is None for parameter in svi.parameters.values())
    assert poutine.runtime._PYRO_STACK == []


@pytest.mark.parametrize("write", [lambda b: torch.mul(b, 0.9, out=b), lambda b: torch._foreach_mul_([b], 0.9)])
def test_a_buffer_that_is_written_in_unusual_ways(write, recorded):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("weight", torch.ones(()))

        def forward(self, x):
            write(self.weight)
            location_model(x, self.weight.clone())

    assert assert_same_trajectory(lambda: (Model(), location_guide), ELBO).compiled


def test_a_recurrent_network_in_single_precision(recorded):
    torch.set_default_dtype(torch.float32)

    def make():
        net = nn.LSTM(2, 3, batch_first=True)

        def model(x):
            pyro.module("net", net)
            location_model(x + net(x[None])[0][0, :, :2])

        return model, location_guide

    expected = trajectory(SVI, make, ELBO, (X.float(),))
    losses, found, svi = trajectory(CompiledSVI, make, ELBO, (X.float(),))
    assert svi.compiled and losses == pytest.approx(expected[0], rel=1e-5)
    assert_equal(found, expected[1], 1e-4)


def test_convolutions_that_mkldnn_takes():
    torch.set_default_dtype(torch.float32)
    x = torch.rand(100, 1, 16, 16, generator=torch.Generator().manual_seed(0))

    def make():
        network = nn.Sequential(nn.Conv2d(1, 16, 4, 2, 1), nn.ReLU(), nn.Conv2d(16, 8, 4, 2, 1))

        def model(x):
            pyro.module("network", network)
            pyro.sample("x", dist.Normal(network(x), 1.0).to_event(), obs=x[..., :4, :4].expand(-1, 8, -1, -1))

        return model, lambda x: None

    expected, after, _ = trajectory(SVI, make, ELBO, (x,))
    losses, found, svi = trajectory(CompiledSVI, make, ELBO, (x,))
    assert svi.compiled and losses == pytest.approx(expected, rel=1e-5)
    assert_equal(found, after, 1e-3)


def test_evaluate_loss_is_compiled_apart(recorded):
    _, _, svi = trajectory(CompiledSVI, *PROGRAMS["AutoNormal"])
    for _ in range(3):
        torch.manual_seed(5)
        expected = SVI.evaluate_loss(svi, X)
        torch.manual_seed(5)
        assert svi.evaluate_loss(X) == pytest.approx(expected, rel=1e-12)
    assert svi._bound.compiled


def test_a_step_that_is_not_finite_raises_and_changes_nothing(recorded):
    make, loss = PROGRAMS["AutoNormal"]
    _, before, svi = trajectory(CompiledSVI, make, loss)
    with pytest.raises(pyro_vae.svi.NonFiniteLossError, match='step 6: the loss is nan; first at site "x"'):
        svi.step(X * float("nan"))
    assert svi.compiled
    assert_equal(values(svi.guide), before, 0.0)


@pytest.mark.parametrize("case", [CASES[0], *(c for c in CASES if c.name == "two_sites")], ids=lambda case: case.name)
def test_compiled_scores_are_the_eager_ones(case, recorded):
    """Eleven data in rows of equal number, the last filled up."""
    model, guide = case.pair()
    x = case.data(11).double()
    eager, compiled = (evaluate(model, guide, x, num_samples=600, compile=c, progress=False) for c in (False, True))
    for name, scores in eager.per_datum.items():
        assert torch.allclose(scores, compiled.per_datum[name], rtol=1e-9, atol=1e-9), name
    assert torch.allclose(eager.kl_per_dim, compiled.kl_per_dim, rtol=1e-10, atol=1e-10)


def test_fit_compiles_by_one_argument_and_resumes_to_the_same_bits(recorded, tmp_path):
    """Cut inside the second epoch; the checkpoint knows the mode; the eager run has the same bounds."""
    x = CASES[0].data(20).double()

    def train(path, compile=None, epochs=4, **arguments):
        model, guide = CASES[0].pair()
        return fit(model, guide, x, epochs=epochs, batch_size=8, progress=False, compile=compile, **arguments, **path)

    bounds = {}
    for mode in (True, False):
        run = train({"out": tmp_path / str(mode)}, mode)
        bounds[mode] = [record["bound"] for record in run.history]
    assert bounds[True] == pytest.approx(bounds[False], rel=1e-10)

    def interrupt(run):
        if len(run.history) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train({"out": tmp_path / "cut"}, True, callbacks=[interrupt])
    state = checkpoint.load(tmp_path / "cut" / "checkpoints" / "last.safetensors")
    assert state["execution"]["compiled"] is True
    resumed = train({"resume": tmp_path / "cut"})
    assert [record["bound"] for record in resumed.history] == bounds[True]


@pytest.mark.cuda
class TestCuda:
    @pytest.fixture(autouse=True)
    def device(self):
        torch.set_default_device("cuda")
        yield
        torch.set_default_device("cpu")

    @pytest.mark.parametrize("name", ["AutoNormal", "mask, scale, constraint", "tutorial's VAE", "deep Markov model"])
    def test_the_replayed_steps_are_those_of_stock_svi(self, name):
        make, loss, *args = PROGRAMS[name]
        args = [value.cuda() if isinstance(value, torch.Tensor) else value for value in (args[0] if args else (X,))]
        svi = assert_same_trajectory(make, loss, args)
        assert svi.compiled and all(parameter.is_cuda for parameter in svi.parameters.values())

    def test_no_step_waits_for_the_device_and_each_draws_afresh(self):
        x = X.cuda()
        make, loss = PROGRAMS["tutorial's VAE"]
        svi = trajectory(CompiledSVI, make, loss, (x,), steps=10)[2]
        torch.cuda.set_sync_debug_mode("error")
        try:
            losses = [svi.step_async(x) for _ in range(6)]  # steps 11 to 16: no audit among them
        finally:
            torch.cuda.set_sync_debug_mode("default")
        svi.settle()
        assert len({loss.item() for loss in losses}) == 6 and all(loss.is_cuda for loss in losses)

    def test_after_a_step_that_is_not_finite_no_other_acts(self):
        x = X.cuda()
        make, loss = PROGRAMS["AutoNormal"]
        _, before, svi = trajectory(CompiledSVI, make, loss, (x,))
        with pytest.raises(pyro_vae.svi.NonFiniteLossError, match='step 6: the loss is nan; first at site "x"'):
            for batch in (x * float("nan"), x, x):
                svi.step_async(batch)
            svi.settle()
        assert svi.steps == 5
        assert_equal(values(svi.guide), before, 0.0)
        svi.step(x)
        assert any(not torch.equal(value, before[name]) for name, value in values(svi.guide).items())


class Settings:
    """What a program reads, and its tests change."""

    def __init__(self):
        self.nested = {"list": [1.0], "dict": {"x": 1.0}}
        self.module = types.ModuleType("settings")
        self.module.a, self.module.b = 1.0, 1.0
        self.prior = dist.Normal(torch.zeros(2), 1.0)

    def method(self):
        return 1.0


class Derived(Settings):
    pass


def settings_programs(settings):
    def scale(x, default=[1.0], *, keyword=1.0):  # noqa: B006
        nested, module = settings.nested, settings.module
        lengths = len(nested["list"]), len(nested["dict"]), len(default)
        return settings.method() * keyword * math.prod(lengths) * module.a + second()

    def second():
        return settings.module.b

    def model(x):
        with poutine.scale(scale=scale(x)):
            m = pyro.sample("m", settings.prior.to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(m, 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.sample("m", dist.Normal(pyro.param("location", torch.zeros(2)), 1.0).to_event(1))

    settings.scale = scale
    return model, guide


def optimiser_of(svi, name="location"):
    return svi.optim.optim_objs[pyro.get_param_store()._params[name]]


def zero_gradient(optimizer, args, kwargs):
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.data.zero_()


def forget_gradient(parameter):
    parameter.grad.zero_()


class TestChangesBetweenSteps:
    """Each is made after the fifth step of SVI and of CompiledSVI."""

    OF_PROGRAMS = {
        "list in a dictionary": lambda s: s.nested["list"].append(1.0),
        "dictionary in a dictionary": lambda s: s.nested["dict"].update(y=1.0),
        "default's item": lambda s: s.scale.__defaults__[0].append(1.0),
        "defaults": lambda s: setattr(s.scale, "__defaults__", ([1.0, 1.0],)),
        "keyword defaults": lambda s: setattr(s.scale, "__kwdefaults__", {"keyword": 3.0}),
        "module's attribute": lambda s: setattr(s.module, "a", 3.0),
        "module's attribute in another function": lambda s: setattr(s.module, "b", 3.0),
        "method of the instance": lambda s: setattr(s, "method", lambda: 3.0),
        "dictionary of the instance": lambda s: setattr(s, "__dict__", {**vars(s), "nested": {"list": [], "dict": {}}}),
        "method of the derived class": lambda s: setattr(Derived, "method", lambda self: 3.0),
        "attribute of a distribution": lambda s: setattr(s.prior, "loc", torch.ones(2)),
    }
    OF_OPTIMISERS = {
        "hook on one": lambda svi: optimiser_of(svi).register_step_post_hook(zero_gradient),
        "betas": lambda svi: optimiser_of(svi).param_groups[0].update(betas=(0.1, 0.9)),
        "optim_objs cleared": lambda svi: svi.optim.optim_objs.clear(),
        "optimiser": lambda svi: setattr(svi, "optim", pyro.optim.SGD({"lr": 0.01})),
        "clipping": lambda svi: svi.optim.grad_clip.update(
            dict.fromkeys(svi.optim.grad_clip, lambda p: p.grad.clamp_(-0.1, 0.1))
        ),
        "gradients": lambda svi: setattr(svi, "loss_and_grads", TraceMeanField_ELBO(num_particles=2).loss_and_grads),
        "new memory": lambda svi: setattr(pyro.get_param_store()._params["location"], "data", torch.ones(())),
    }

    def trajectories(self, make, change, **arguments):
        results = []
        for kind in (SVI, CompiledSVI):
            count, made = [], []

            def programs(made=made):
                made.append(make())
                return made[0][:2]

            def after_step(svi, count=count, made=made):
                count.append(svi)
                if len(count) == 5:
                    change(svi, *made[0][2:])

            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FallbackWarning)
                results.append(trajectory(kind, programs, ELBO, steps=10, after_step=after_step, **arguments))
        (expected_losses, expected, _), (losses, found, svi) = results
        assert losses == pytest.approx(expected_losses, rel=1e-10)
        assert_equal(found, expected)
        return svi

    @pytest.mark.parametrize("change", OF_PROGRAMS)
    def test_of_what_programs_read(self, change, recorded, monkeypatch):
        monkeypatch.setattr(Derived, "method", Settings.method, raising=False)
        monkeypatch.delattr(Derived, "method")

        def make():
            if "method" in vars(Derived):
                del Derived.method
            settings = Derived()
            return *settings_programs(settings), settings

        svi = self.trajectories(make, lambda svi, settings: self.OF_PROGRAMS[change](settings))
        assert svi.compiled and len(graphs(svi)) == (1 if change == "attribute of a distribution" else 2)
        if "method" in vars(Derived):
            del Derived.method

    @pytest.mark.parametrize("change", OF_OPTIMISERS)
    def test_of_optimisers(self, change, recorded):
        svi = self.trajectories(
            lambda: (location_model, location_guide),
            lambda svi: self.OF_OPTIMISERS[change](svi),
        )
        assert svi.compiled == (change != "gradients")

    @pytest.mark.parametrize("hook", ["removed", "second", "after accumulation", "of a module", "forward"])
    def test_of_hooks(self, hook, recorded):
        def make():
            network = nn.Linear(2, 2)
            handle = network.weight.register_hook(lambda gradient: 2 * gradient)

            def model(x):
                pyro.module("network", network)
                with pyro.plate("data", len(x)):
                    pyro.sample("x", dist.Normal(network(x), 1.0).to_event(1), obs=x)

            return model, lambda x: None, network, handle

        def change(svi, network, handle):
            if hook == "removed":
                handle.remove()
            elif hook == "second":
                network.weight.register_hook(lambda gradient: gradient + 1)
            elif hook == "after accumulation":
                network.weight.register_post_accumulate_grad_hook(forget_gradient)
            elif hook == "of a module":
                network.register_forward_hook(lambda module, given, result: 2 * result)
            else:
                network.forward = lambda x: 3 * nn.functional.linear(x, network.weight, network.bias)

        assert self.trajectories(make, change).compiled == (hook != "after accumulation")


class TestParametersOfSomeSteps:
    """A parameter that only some signatures use, or make."""

    OPTIMISERS = {
        "Adam": lambda: pyro.optim.Adam({"lr": 0.05, "weight_decay": 0.5}),
        "AdamW": lambda: pyro.optim.AdamW({"lr": 0.05, "weight_decay": 0.5}),
        "ClippedAdam": lambda: pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.5}),
        "SGD": lambda: pyro.optim.SGD({"lr": 0.001, "momentum": 0.9}),
        "NAdam": lambda: pyro.optim.NAdam({"lr": 0.05}),
    }

    @pytest.mark.parametrize("optimiser", OPTIMISERS)
    @pytest.mark.parametrize("kind", ["made later", "on some steps"])
    def test_the_numbers_are_those_of_svi(self, kind, optimiser, recorded):
        def model(x):
            shift = pyro.param("shift", torch.zeros(2)) if len(x) == 3 else 0.0
            location_model(x + shift)

        results = []
        for svi_class in (SVI, CompiledSVI):
            pyro.clear_param_store()
            torch.manual_seed(0)
            svi = svi_class(model, location_guide, self.OPTIMISERS[optimiser](), ELBO)
            rows = [5, 5, 5, 3, 3, 3, 5, 3] if kind == "made later" else [3, 5, 3, 5, 5, 3, 3, 5]
            losses = [svi.step(X[:count]) for count in rows]
            results.append((losses, values()))
        assert results[0][0] == pytest.approx(results[1][0], rel=1e-10)
        assert_equal(results[1][1], results[0][1])

    @pytest.mark.filterwarnings("ignore::pyro_vae.compiled.FallbackWarning")
    @pytest.mark.parametrize("loss", [Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO, RenyiELBO])
    @pytest.mark.parametrize(
        "optimiser", [lambda: pyro.optim.Adam({"lr": 0.05}), lambda: Slower(torch.optim.Adam, {"lr": 0.05})]
    )
    def test_without_parameters_steps_are_losses(self, loss, optimiser, recorded):
        """As long as there are none; what comes later is trained as under SVI."""

        def guide(x):
            location = pyro.param("location", torch.zeros(2)) if len(x) == 3 else torch.zeros(2)
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(location, 1.0).to_event(1))

        def model(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

        results = []
        for svi_class in (SVI, CompiledSVI):
            pyro.clear_param_store()
            torch.manual_seed(0)
            svi = svi_class(model, guide, optimiser(), loss(num_particles=2))
            losses = [svi.step(X[:5]) for _ in range(3)]
            if svi_class is CompiledSVI:
                assert not svi.compiled and svi.fallback_reason.startswith("there are no parameters to optimise")
                assert svi.state_dict()["steps"] == 3
            losses += [svi.step(X[:3]) for _ in range(3)]
            results.append((losses, values()))
        assert results[0][0] == pytest.approx(results[1][0], rel=1e-10) and len(results[0][1]) == 1
        assert_equal(results[1][1], results[0][1])

    def test_an_unused_parameter_does_not_decay(self, recorded):
        def make():
            network = nn.ModuleDict({"used": nn.Linear(2, 2), "unused": nn.Linear(2, 2)})

            def model(x):
                pyro.module("network", network)
                location_model(network["used"](x))

            return model, location_guide

        assert_same_trajectory(make, ELBO, optim=self.OPTIMISERS["AdamW"])

    def test_a_loss_of_one_element(self, recorded):
        def loss(model, guide, x):
            return ELBO.differentiable_loss(model, guide, x).reshape(1)

        svi = assert_same_trajectory(lambda: (location_model, location_guide), loss)
        assert svi.compiled


class Rescaled(poutine.messenger.Messenger):
    """A user's handler, whose method only Pyro names."""

    def __init__(self):
        self.factor = 1.0

    def _pyro_sample(self, message):
        if message["is_observed"]:
            message["scale"] = message["scale"] * self.factor


class Settled(dict):
    pass


@dataclasses.dataclass(frozen=True)
class Named:
    name: str
    scale: float = dataclasses.field(compare=False)


SLOPE = [1.0]


class Sloped(torch.distributions.Transform):
    domain = codomain = dist.constraints.real
    bijective, sign = True, 1

    def _call(self, x):
        return 1.5 * x

    def _inverse(self, y):
        return y / 1.5

    def log_abs_det_jacobian(self, x, y):
        return torch.zeros_like(x) + SLOPE[0]


class TestWhatIsReadOutOfSight:
    """Changed after the fifth step of SVI and of CompiledSVI: the same losses and parameters."""

    def trajectories(self, make, **arguments):
        return TestChangesBetweenSteps().trajectories(make, lambda svi, change: change(svi), **arguments)

    def scaled_by(self, read, change):
        def model(x):
            with poutine.scale(scale=read()):
                location_model(x)

        return lambda: (model, location_guide, change)

    def test_a_handlers_own_method(self, recorded):
        def make():
            handler = Rescaled()
            return handler(location_model), location_guide, lambda svi: setattr(handler, "factor", 3.0)

        assert self.trajectories(make).compiled

    def test_attributes_of_a_dictionary(self, recorded):
        def make():
            settled = Settled()
            settled.scale = 1.0
            return self.scaled_by(lambda: settled.scale, lambda svi: setattr(settled, "scale", 3.0))()

        assert self.trajectories(make).compiled

    def test_keywords_of_a_partial(self, recorded):
        def make():
            read = functools.partial(lambda scale: scale, scale=1.0)
            return self.scaled_by(read, lambda svi: read.keywords.update(scale=3.0))()

        assert self.trajectories(make).compiled

    def test_a_transforms_own_method(self, recorded):
        def guide(x):
            location = pyro.param("location", torch.zeros((), dtype=x.dtype))
            pyro.sample("m", dist.TransformedDistribution(dist.Normal(location, 1.0), [Sloped()]))

        def make():
            SLOPE[0] = 1.0
            return location_model, guide, lambda svi: SLOPE.__setitem__(0, 3.0)

        assert self.trajectories(make).compiled

    def test_a_gradient_hooks_closure(self, recorded):
        def make():
            factor = {"is": 1.0}

            def hooked(x):
                location_guide(x)
                parameter = pyro.get_param_store()._params["location"]
                if not parameter._backward_hooks:
                    parameter.register_hook(lambda gradient: factor["is"] * gradient)

            return location_model, hooked, lambda svi: factor.update({"is": 0.1})

        assert self.trajectories(make).fallback_reason is None

    def test_a_parameter_that_appears_with_draws_of_its_own(self, recorded):
        def make():
            settled = Settled()
            settled.more = False

            def guide(x):
                location = pyro.param("location", torch.zeros((), dtype=x.dtype))
                if settled.more:
                    location = location + pyro.param("more", lambda: torch.randn((), dtype=x.dtype))
                pyro.sample("m", dist.Normal(location, 1.0))

            return location_model, guide, lambda svi: setattr(settled, "more", True)

        assert self.trajectories(make).compiled

    def test_a_loss_with_gradients_of_the_instance(self, recorded):
        losses = []
        for kind in (SVI, CompiledSVI):
            pyro.clear_param_store()
            torch.manual_seed(0)
            loss = Trace_ELBO()
            stock = loss.loss_and_grads

            def doubled(*args, stock=stock):
                value = stock(*args)
                for parameter in pyro.get_param_store()._params.values():
                    parameter.grad.mul_(-1.0)
                return value

            loss.loss_and_grads = doubled
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FallbackWarning)
                svi = kind(location_model, location_guide, pyro.optim.Adam({"lr": 0.1}), loss)
            losses.append([svi.step(X) for _ in range(5)])
        assert losses[0] == pytest.approx(losses[1], rel=1e-10)

    def test_another_object_that_is_equal(self, recorded):
        losses = []
        for kind in (SVI, CompiledSVI):
            pyro.clear_param_store()
            torch.manual_seed(0)

            def model(x, named):
                with poutine.scale(scale=named.scale):
                    location_model(x)

            svi = kind(model, lambda x, named: location_guide(x), pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
            first, second = Named("same", 1.0), Named("same", 5.0)
            losses.append([svi.step(X, named) for named in [first] * 5 + [second] * 5])
        assert losses[0] == pytest.approx(losses[1], rel=1e-10)

    def test_dropout_that_is_checkpointed_runs_eagerly(self, recorded):
        network = nn.Sequential(nn.Linear(1, 4), nn.Dropout(0.5), nn.Linear(4, 1)).double()

        def model(x):
            h = torch.utils.checkpoint.checkpoint(network, x[:, :1], use_reentrant=False)[:, 0]
            m = pyro.sample("m", dist.Normal(x.new_zeros(()), 1.0))
            pyro.module("network", network)
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(m + h, 1.0), obs=x[:, 0])

        svi = CompiledSVI(model, location_guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
        with pytest.warns(FallbackWarning, match="it draws other random numbers"):
            for _ in range(3):
                svi.step(X)

    def test_a_generator_of_the_programs_own_runs_eagerly(self, recorded):
        losses = []
        for kind in (SVI, CompiledSVI):
            pyro.clear_param_store()
            torch.manual_seed(0)
            generator = torch.Generator().manual_seed(3)

            def model(x, generator=generator):
                location_model(x[torch.randint(0, len(x), (3,), generator=generator)])

            svi = kind(model, location_guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FallbackWarning)
                losses.append([svi.step(X) for _ in range(5)])
        assert losses[0] == losses[1]
        assert "Generator" in svi.fallback_reason

    def test_an_infinite_loss_with_finite_gradients_raises(self, recorded):
        def loss(model, guide, x, infinite):
            return ELBO.differentiable_loss(model, guide, x) + torch.where(infinite > 0, math.inf, 0.0)

        for kind in (pyro_vae.svi.SVI, CompiledSVI):
            pyro.clear_param_store()
            svi = kind(location_model, location_guide, adam(), loss)
            for _ in range(3):
                svi.step(X, torch.zeros(()))
            with pytest.raises(NonFiniteLossError, match="step 4: the loss is inf"):
                svi.step(X, torch.ones(()))

    def test_one_hot_is_recorded(self, recorded):
        def model(x, labels):
            location_model(x + nn.functional.one_hot(labels, 3).to(x).sum())

        guide = lambda x, labels: location_guide(x)  # noqa: E731
        svi = CompiledSVI(model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
        for _ in range(3):
            svi.step(X, torch.tensor([0, 2, 1]))
        assert svi.compiled

    def test_signatures_are_those_of_pyro(self):
        CompiledSVI(location_model, location_guide, pyro.optim.Adam({}), Trace_ELBO(), None, 0, 0)
        names = list(inspect.signature(pyro.infer.SVI).parameters)[:-1]
        assert list(inspect.signature(CompiledSVI).parameters)[: len(names)] == names


FAULTS = """
import resource, sys, torch
from pyro_vae.compiled import keep_freed_memory

if sys.argv[1] == "keep" and not keep_freed_memory():
    sys.exit(3)
faults = []
for _ in range(12):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    kept = [torch.ones(4_000_000) for _ in range(8)]
    del kept
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(max(faults[6:]))
"""


def test_kept_memory_is_used_again():
    """128 MB of tensors that come and go ask for fresh pages each time, as glibc is told here, and then no more."""
    found = {}
    given_back = {"MALLOC_TRIM_THRESHOLD_": "131072", "MALLOC_MMAP_THRESHOLD_": "131072"}
    for kind in ("keep", "leave"):
        done = subprocess.run(
            [sys.executable, "-c", FAULTS, kind], capture_output=True, text=True, env=os.environ | given_back
        )
        if done.returncode == 3:
            pytest.skip("expected glibc, found another C library")
        found[kind] = int(done.stdout)
    assert found["keep"] < 100 < found["leave"]


def plated_model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def plated_guide(x):
    location = pyro.param("location", torch.zeros(len(x)))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(location, 2.0))


PLATED = plated_model, plated_guide


class TestLosses:
    """Which losses are recorded: those whose ``loss_and_grads`` are the gradients of their `differentiable_loss`."""

    @pytest.mark.filterwarnings(
        "ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning", "ignore::FutureWarning"
    )
    @pytest.mark.parametrize("kind", ["JitTrace_ELBO", "JitTraceMeanField_ELBO", "JitTraceEnum_ELBO"])
    def test_losses_by_jit_run_eagerly(self, kind, recorded):
        """The derivative of JitTrace_ELBO's own differentiable_loss counts the pathwise part twice."""
        arguments = {"max_plate_nesting": 0, "strict_enumeration_warning": False, "ignore_jit_warnings": True}

        def model():
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(a, 1.0), obs=torch.tensor(2.0))

        def guide():
            pyro.sample("a", dist.Delta(pyro.param("location", torch.zeros(()))))

        def guide_of_mean_field():
            pyro.sample("a", dist.Normal(pyro.param("location", torch.zeros(())), 1e-9))

        guide = guide_of_mean_field if kind == "JitTraceMeanField_ELBO" else guide
        found = []
        for svi_class in (SVI, CompiledSVI):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FallbackWarning)
                loss = getattr(pyro.infer, kind)(**arguments)
                found.append(trajectory(svi_class, lambda: (model, guide), loss, (), optim=plain_sgd))
        assert found[1][0] == pytest.approx(found[0][0], rel=1e-12)
        assert_equal(found[1][1], found[0][1], 1e-12)
        assert kind in found[1][2].fallback_reason and kind.removeprefix("Jit") in found[1][2].fallback_reason

    @pytest.mark.parametrize("kind", ["gradients", "loss", "neither"])
    def test_a_loss_of_the_users_own_is_looked_at(self, kind, recorded):
        class Own(Trace_ELBO):
            def differentiable_loss(self, model, guide, *args):
                loss = super().differentiable_loss(model, guide, *args)
                return {"gradients": 2 * loss - loss.detach(), "loss": loss + 1.0, "neither": loss}[kind]

            def loss_and_grads(self, model, guide, *args):
                return super().loss_and_grads(model, guide, *args)

        if kind == "neither":
            assert assert_same_trajectory(lambda: (location_model, location_guide), Own()).compiled
        else:
            reason = eager_steps(lambda: (location_model, location_guide), loss=Own())
            assert "Own.loss_and_grads are not those of Own.differentiable_loss" in reason

    RECORDED = {
        "Trace_ELBO": lambda: Trace_ELBO(2),
        "TraceMeanField_ELBO": lambda: TraceMeanField_ELBO(2),
        "TraceEnum_ELBO": lambda: TraceEnum_ELBO(max_plate_nesting=1, strict_enumeration_warning=False),
        "TraceTMC_ELBO": lambda: pyro.infer.TraceTMC_ELBO(
            num_particles=2, max_plate_nesting=1, strict_enumeration_warning=False
        ),
        "TraceTailAdaptive_ELBO": lambda: pyro.infer.TraceTailAdaptive_ELBO(
            num_particles=3, vectorize_particles=True, max_plate_nesting=1
        ),
    }

    @pytest.mark.parametrize("name", RECORDED)
    def test_pyros_losses_that_are_recorded_have_the_gradients_of_their_differentiable_loss(self, name):
        loss = self.RECORDED[name]()
        assert pyro_vae.svi._cannot_derive(loss) is None
        PLATED[1](X)
        (parameter,) = pyro.get_param_store()._params.values()
        found = []
        for _ in range(2):
            torch.manual_seed(0)
            value = loss.differentiable_loss(*PLATED, X[:, 0])
            (gradient,) = torch.autograd.grad(value, [parameter])
            torch.manual_seed(0)
            parameter.grad = None
            told = loss.loss_and_grads(*PLATED, X[:, 0])
            found.append((value.item(), gradient.tolist(), told, parameter.grad.tolist()))
        value, gradient, told, left = found[1]
        assert gradient == pytest.approx(left, rel=1e-12) and any(gradient)
        assert value == pytest.approx(told, rel=1e-12)

    def test_no_draws_and_no_arguments(self, recorded):
        def model():
            pyro.sample("x", dist.Normal(pyro.param("location", torch.zeros(())), 1.0), obs=torch.tensor(3.0))

        for optim in (adam, plain_sgd):
            assert assert_same_trajectory(lambda: (model, lambda: None), ELBO, (), optim=optim).compiled

    def test_a_value_that_follows_from_parameters_alone_is_no_number_of_the_graph(self, recorded):
        def model():
            location = pyro.param("location", torch.ones(()))
            weight = 1.0 if float((location + 1).detach()) > 1.9 else 100.0
            pyro.sample("x", dist.Normal(weight * location, 1.0), obs=torch.tensor(-3.0))

        assert "on the host" in eager_steps(lambda: (model, lambda: None), (), steps=6)

    def test_a_first_call_without_sites(self, recorded):
        """As the auxiliary loss of a semi-supervised model on a batch without labels."""
        net = nn.Linear(2, 2)
        start = copy.deepcopy(net.state_dict())

        def model(x, y=None):
            pyro.module("net", net)
            if y is not None:
                with pyro.plate("data", len(x)):
                    pyro.sample("y", dist.Categorical(logits=net(x)), obs=y)

        found = []
        for svi_class in (SVI, CompiledSVI):
            pyro.clear_param_store()
            net.load_state_dict(start)
            net.zero_grad()
            svi = svi_class(model, lambda x, y=None: None, adam(), ELBO)
            losses = [svi.step(X), *(svi.step(X, torch.arange(6) % 2) for _ in range(3)), svi.step(X)]
            found.append((losses, values(net)))
        assert found[0][0] == pytest.approx(found[1][0], rel=1e-10) and svi.compiled
        assert_equal(found[1][1], found[0][1])

    def test_a_frozen_parameter_of_a_module(self, recorded):
        class Model(PyroModule):
            def __init__(self):
                super().__init__()
                self.scale = PyroParam(torch.tensor(1.0), constraint=dist.constraints.positive)
                self.requires_grad_(False)

            def forward(self, x):
                m = pyro.sample("m", dist.Normal(0.0, self.scale))
                pyro.sample("x", dist.Normal(m, 1.0).expand(x.shape).to_event(2), obs=x)

        assert assert_same_trajectory(lambda: (Model(), location_guide), ELBO).compiled

    def test_a_loss_with_kernels(self, recorded):
        from pyro.contrib.gp.kernels import RBF

        found = []
        for svi_class in (SVI, CompiledSVI):
            loss = pyro.infer.Trace_MMD(kernel=RBF(6), num_particles=3, vectorize_particles=True)
            pyro.clear_param_store()
            torch.manual_seed(0)
            svi = svi_class(*PLATED, adam(), loss)
            found.append([svi.step(X[:, 0]) for _ in range(5)])
        assert found[1] == pytest.approx(found[0], rel=1e-10) and svi.compiled


def plain_sgd():
    return pyro.optim.SGD({"lr": 0.01})


class ZeroedGradients(pyro.optim.PyroOptim):
    """Sees to the gradients before each update."""

    def __call__(self, params, *args, **kwargs):
        self.calls = getattr(self, "calls", 0) + 1
        for p in params:
            p.grad = 0.5 * p.grad
        super().__call__(params, *args, **kwargs)


class Slower(pyro.optim.PyroOptim):
    def _get_optim_args(self, param):
        return {"lr": 0.5 * super()._get_optim_args(param)["lr"]}


class Signs:
    """No torch optimiser, but one that Pyro takes."""

    def __init__(self, params, lr):
        self.params, self.lr = params, lr

    def step(self):
        for p in self.params:
            p.data -= self.lr * p.grad.sign()

    def state_dict(self):
        return {}


class DividedSGD(torch.optim.SGD):
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = p.grad / 3
        return super().step(closure)


class TestOptimisersOfTheUsersOwn:
    KINDS = {
        "own call": lambda: ZeroedGradients(torch.optim.SGD, {"lr": 0.01}),
        "own call of Adam": lambda: ZeroedGradients(torch.optim.Adam, {"lr": 0.01}),
        "own arguments": lambda: Slower(torch.optim.Adam, {"lr": 0.01}),
        "no torch optimiser": lambda: pyro.optim.PyroOptim(Signs, {"lr": 0.01}),
        "own step": lambda: pyro.optim.PyroOptim(DividedSGD, {"lr": 0.01}),
    }

    @pytest.mark.parametrize("kind", KINDS)
    def test_its_own_method_is_called(self, kind, recorded):
        svi = assert_same_trajectory(*PROGRAMS["AutoNormal"], optim=self.KINDS[kind])
        assert svi.compiled
        if kind.startswith("own call"):
            assert svi.optim.calls == svi.steps == 5

    def test_a_step_that_an_instance_gets(self, recorded):
        def after_step(svi):
            for optimizer in svi.optim.optim_objs.values():
                if "step" not in vars(optimizer):
                    stock = optimizer.step
                    optimizer.step = lambda stock=stock: (stock(), stock())

        assert assert_same_trajectory(*PROGRAMS["AutoNormal"], after_step=after_step).compiled

    @pytest.mark.parametrize("wrong", [torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1), "Adam", None])
    def test_what_is_no_optimiser_is_refused(self, wrong):
        with pytest.raises(ValueError, match="expected a pyro.optim object, or a callable .* got "):
            CompiledSVI(location_model, location_guide, wrong, ELBO)


class Located(PyroModule):
    def __init__(self, observed):
        super().__init__()
        self.observed = observed
        self.location = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        m = pyro.sample("m", dist.Normal(self.location, 1.0))
        if self.observed:
            pyro.sample("x", dist.Normal(m, 1.0).expand(x.shape).to_event(2), obs=x)


@pytest.mark.parametrize("svi_class", [pyro_vae.svi.SVI, CompiledSVI])
def test_one_name_for_two_parameters_is_told_and_both_are_trained(svi_class, recorded):
    """The parameter store keeps the guide's alone, and pyro.infer.SVI trains that alone."""
    model, guide = Located(True), Located(False)
    svi = svi_class(model, guide, plain_sgd(), ELBO)
    with pytest.warns(UserWarning, match="'guide.location' and 'model.location'.* the one name 'location': this SVI"):
        svi.step(X)
    svi.step(X)  # says no more
    assert model.location.item() != 0 and guide.location.item() != 0


class TestCopies:
    @pytest.mark.parametrize("how", ["deepcopy", "pickle"])
    @pytest.mark.parametrize("svi_class", [SVI, CompiledSVI])
    def test_a_copy_goes_on_as_the_original(self, svi_class, how, recorded):
        """With parameters of modules, which a copy has of its own."""
        with pyro.settings.context(module_local_params=True):
            model, guide = Located(True), Located(False)
            for program in (model, guide):
                program.location = PyroParam(torch.zeros(()))
            svi = svi_class(model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
            for _ in range(4):
                svi.step(X)
            other = copy.deepcopy(svi) if how == "deepcopy" else pickle.loads(pickle.dumps(svi))
            found = []
            for each in (svi, other):
                torch.manual_seed(3)
                found.append([each.step(X) for _ in range(3)])
        assert found[1] == pytest.approx(found[0], rel=1e-10)
        assert other.model.location is not model.location and torch.equal(other.model.location, model.location)
        assert svi_class is SVI or (svi.compiled and other.compiled)

    def test_of_parameters_in_the_store_it_is_as_with_svi(self, recorded):
        found = []
        for svi_class in (SVI, CompiledSVI):
            pyro.clear_param_store()
            torch.manual_seed(0)
            svi = svi_class(location_model, location_guide, adam(), ELBO)
            losses = [svi.step(X) for _ in range(3)]
            other = copy.deepcopy(svi)
            losses += [each.step(X) for each in (other, svi, other, svi, other)]
            found.append((losses, values()))
        assert found[1][0] == pytest.approx(found[0][0], rel=1e-10)
        assert_equal(found[1][1], found[0][1])

    def test_a_reason_is_kept(self):
        with pytest.warns(FallbackWarning):
            svi = CompiledSVI(location_model, location_guide, adam(), TraceGraph_ELBO())
        assert copy.deepcopy(svi).fallback_reason == svi.fallback_reason


class TestUpdatesThatOverflow:
    """In single precision, where 3.4e38 is the largest number."""

    @pytest.fixture(autouse=True)
    def single(self, float64):
        torch.set_default_dtype(torch.float32)

    LARGE = {
        "Adam": (lambda: pyro.optim.Adam({"lr": 0.01}), 1e39),
        "AdamW": (lambda: pyro.optim.AdamW({"lr": 0.01}), 1e39),
        "SGD": (lambda: pyro.optim.SGD({"lr": 0.01}), 1e39),
        "RAdam": (lambda: pyro.optim.RAdam({"lr": 0.01}), 1e39),
        "own call": (lambda: ZeroedGradients(torch.optim.SGD, {"lr": 0.01}), 3e38),
        "a torch optimiser": (lambda: functools.partial(torch.optim.Adam, lr=0.01), 1e39),
    }

    @pytest.mark.parametrize("optim", LARGE)
    @pytest.mark.parametrize("svi_class", [pyro_vae.svi.SVI, CompiledSVI])
    def test_such_an_update_has_not_acted(self, svi_class, optim, recorded):
        x = X.float()
        make, large = self.LARGE[optim]
        svi = svi_class(location_model, location_guide, make(), ELBO)
        for _ in range(3):
            svi.step(x)
        before, state = values(), str([optimizer.state_dict() for optimizer in svi.update.optimizers])
        rates = [group["lr"] for group in svi.update.groups]
        for group in svi.update.groups:
            group["lr"] = large
        with pytest.raises(
            NonFiniteLossError, match="step 4: the update would leave parameter 'param.location' not"
        ) as e:
            svi.step(x)
        assert "Mend: a smaller learning rate" in str(e.value) and f"learning rate {large}" in str(e.value)
        for group, rate in zip(svi.update.groups, rates, strict=True):
            group["lr"] = rate
        assert_equal(values(), before, 0.0)
        assert str([optimizer.state_dict() for optimizer in svi.update.optimizers]) == state
        svi.step(x)
        assert svi.steps == 4 and all(value.isfinite().all() for value in values().values())

    @pytest.mark.parametrize("optim", LARGE)
    @pytest.mark.parametrize("svi_class", [pyro_vae.svi.SVI, CompiledSVI])
    def test_a_rate_beyond_the_largest_number_and_no_gradient(self, svi_class, optim, recorded):
        """Infinity times zero is no number. An optimiser of torch's own may refuse such a rate itself."""

        def model(moves):
            location = pyro.param("location", torch.ones(()))
            pyro.factor("x", -((moves * location - 1) ** 2))

        svi = svi_class(model, lambda moves: None, self.LARGE[optim][0](), ELBO)
        for _ in range(3):
            svi.step(torch.tensor(0.0))
        for group in svi.update.groups:
            group["lr"] = 1e39
        before = values()
        with contextlib.suppress(NonFiniteLossError, RuntimeError):
            svi.step(torch.tensor(0.0))
        assert values()["location"].isfinite()
        if optim in ("Adam", "SGD", "a torch optimiser"):
            assert_equal(values(), before, 0.0)

    def test_a_rate_that_is_no_number(self, recorded):
        svi = CompiledSVI(location_model, location_guide, self.LARGE["Adam"][0](), ELBO)
        for _ in range(3):
            svi.step(X.float())
        svi.update.groups[0]["lr"] = math.nan
        with pytest.raises(NonFiniteLossError, match="Mend: a finite learning rate"):
            svi.step(X.float())

    @pytest.mark.parametrize("svi_class", [pyro_vae.svi.SVI, CompiledSVI])
    def test_squares_of_gradients_that_overflow(self, svi_class, recorded):
        """The parameter would be finite, and never move again."""

        def model(x, scale):
            location = pyro.param("location", torch.zeros(()))
            pyro.factor("x", -scale * (location - 1) ** 2)

        svi = svi_class(model, lambda x, scale: None, self.LARGE["Adam"][0](), ELBO)
        for _ in range(3):
            svi.step(X.float(), 1.0)
        with pytest.raises(NonFiniteLossError, match="'exp_avg_sq' of parameter 'param.location' .* Mend: clip_norm"):
            svi.step(X.float(), 1e25)
        svi.step(X.float(), 1.0)

    def test_a_division_by_nothing(self, recorded):
        """Adam with eps=0, at a gradient whose square is zero in single precision."""

        def model(x, scale):
            pyro.factor("x", scale * pyro.param("location", torch.zeros(())))

        svi = CompiledSVI(model, lambda x, scale: None, pyro.optim.Adam({"lr": 0.01, "eps": 0.0}), ELBO)
        with pytest.raises(NonFiniteLossError, match="Mend: eps > 0"):
            svi.step(X.float(), torch.tensor(1e-30))
        svi.step(X.float(), torch.tensor(1.0))

    @pytest.mark.parametrize("decay", [0.0, 0.1])
    @pytest.mark.parametrize("kind", ["Adam", "AdamW"])
    def test_an_update_that_might_overflow_and_does_not_is_taken(self, kind, decay, recorded):
        """The graph is not sure of it, so that it is taken beside the graph: the same numbers."""
        found = []
        for svi_class in (SVI, CompiledSVI):
            pyro.clear_param_store()
            torch.manual_seed(0)
            svi = svi_class(
                location_model,
                location_guide,
                getattr(pyro.optim, kind)({"lr": 0.01, "weight_decay": decay}),
                ELBO,
            )
            losses = [svi.step(X.float()) for _ in range(3)]
            optimiser_of(svi).param_groups[0]["lr"] = 1e15 / (1 + 1e17 * decay)
            optimiser_of(svi).param_groups[0]["eps"] = 1e-25
            losses.append(svi.step(X.float()))
            optimiser_of(svi).param_groups[0]["lr"] = 0.01
            losses.append(svi.step(X.float()))
            found.append((losses, values()))
        assert found[1][0] == pytest.approx(found[0][0], rel=1e-5) and svi.compiled and svi.steps == 5
        assert_equal(found[1][1], found[0][1], 1e-5)

    MESSAGES = {
        "data": (lambda x, m: (dist.Normal(m, 1.0), x * math.nan), 'data for "x" without NaN'),
        "argument": (
            lambda x, m: (dist.Poisson((m.abs() + 100).exp()), x.abs()),
            "Poisson has a rate .* Mend: another",
        ),
        "density": (lambda x, m: (dist.Normal(m, 1e-30), x), 'Mend: values of "x" inside the support of its Normal'),
    }

    @pytest.mark.parametrize("name", MESSAGES)
    def test_the_message_names_the_mend_of_the_cause(self, name):
        read, message = self.MESSAGES[name]

        def model(x):
            m = pyro.sample("m", dist.Normal(0.0, 1.0))
            fn, observed = read(x, m)
            with pyro.validation_enabled(False):
                pyro.sample("x", fn.expand(x.shape).to_event(2), obs=observed)

        svi = pyro_vae.svi.SVI(model, location_guide, adam(), ELBO)
        with pyro.validation_enabled(False), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            with pytest.raises(NonFiniteLossError, match=f'first at site "x".*{message}'):
                svi.step(X.float())

    def test_the_message_for_a_gradient_alone(self):
        def model(x):
            pyro.factor("x", -pyro.param("location", torch.zeros(())).sqrt())

        svi = pyro_vae.svi.SVI(model, lambda x: None, adam(), ELBO)
        with pytest.raises(NonFiniteLossError, match="every site is finite; the gradient .* keep roots, logarithms"):
            svi.step(X.float())


def test_what_torch_says_of_itself_is_not_passed_on_while_it_compiles(caplog):
    logger = logging.getLogger("torch._inductor.standalone_compile")
    filters, propagates = [*logger.filters], logger.propagate
    logger.propagate = True
    logger.addHandler(caplog.handler)
    try:
        with pyro_vae.compiled._quiet():
            logger.warning("standalone_compile artifact generation failed, cannot save. Run with ...")
            logging.getLogger("torch.utils.cpp_extension").warning("No CUDA runtime is found, using CUDA_HOME='/usr'")
            logger.warning("something else")
        logger.warning("artifact generation failed, cannot save")
    finally:
        logger.removeHandler(caplog.handler)
        logger.propagate = propagates
    assert logger.filters == filters
    assert {record.getMessage() for record in caplog.records} == {
        "something else",
        "artifact generation failed, cannot save",
    }


class PlainModel(nn.Module):
    """x ~ N(a z, 1), of a module that registers nothing in the parameter store."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
            pyro.sample("x", dist.Normal(z * self.a, 1.0), obs=x)


class PlainGuide(nn.Module):
    def __init__(self, norm=False):
        super().__init__()
        self.norm = nn.BatchNorm1d(1).double() if norm else nn.Identity()
        self.linear = nn.Linear(1, 1).double()

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.linear(self.norm(x[:, None]))[:, 0], 1.0))


@pytest.mark.filterwarnings("ignore::pyro_vae.compiled.FallbackWarning")
@pytest.mark.parametrize(
    "loss",
    [
        Trace_ELBO,
        TraceMeanField_ELBO,
        functools.partial(TraceEnum_ELBO, strict_enumeration_warning=False, max_plate_nesting=1),
        TraceGraph_ELBO,
        RenyiELBO,
        pyro_vae.estimators.ELBO,
    ],
)
def test_modules_that_register_nothing_are_trained(loss, recorded):
    """As those of modules that do: the derivative of the same loss along the same draws."""
    x, trained = 3 * torch.ones(6, dtype=torch.float64), []
    for svi_class, registered in ((SVI, True), (pyro_vae.svi.SVI, False), (CompiledSVI, False)):
        pyro.clear_param_store()
        torch.manual_seed(0)
        model, guide = PlainModel(), PlainGuide()

        def named(program, name):
            return lambda x: (pyro.module(name, program), program(x))

        programs = (named(model, "model"), named(guide, "guide")) if registered else (model, guide)
        svi = svi_class(*programs, pyro.optim.Adam({"lr": 0.1}), loss(num_particles=2))
        for _ in range(6):
            svi.step(x)
        trained.append(torch.stack([model.a.detach(), *(p.detach().flatten()[0] for p in guide.parameters())]))
        assert bool([*pyro.get_param_store().keys()]) == registered
    assert abs(float(trained[0][0]) - 1) > 0.05
    for found in trained[1:]:
        torch.testing.assert_close(found, trained[0], rtol=1e-8, atol=1e-10)


@pytest.mark.filterwarnings("ignore:Encountered NaN")
@pytest.mark.parametrize("svi_class", [pyro_vae.svi.SVI, CompiledSVI])
def test_a_step_that_is_not_finite_leaves_the_buffers(svi_class, recorded):
    torch.manual_seed(0)
    guide = PlainGuide(norm=True)
    svi = svi_class(PlainModel(), guide, functools.partial(torch.optim.Adam, lr=1e-3), Trace_ELBO())
    with pyro.validation_enabled(False):
        for _ in range(3):
            svi.step(torch.randn(8, dtype=torch.float64))
        before = copy.deepcopy(guide.state_dict())
        broken = torch.randn(8, dtype=torch.float64)
        broken[0] = math.nan
        with pytest.raises(NonFiniteLossError):
            svi.step(broken)
        for name, value in guide.state_dict().items():
            torch.testing.assert_close(value, before[name], rtol=0, atol=0)
        svi.step(torch.randn(8, dtype=torch.float64))
        guide.eval()
        assert math.isfinite(svi.evaluate_loss(torch.randn(8, dtype=torch.float64)))


@pytest.mark.parametrize("svi_class", [pyro_vae.svi.SVI, CompiledSVI])
@pytest.mark.parametrize(
    "optimiser",
    [
        functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        functools.partial(torch.optim.Adam, lr=0.1),
        functools.partial(torch.optim.AdamW, lr=0.1, weight_decay=0.5),
    ],
)
def test_clipping_moves_no_parameter_that_a_step_does_not_use(optimiser, svi_class, recorded):
    b = nn.Parameter(torch.ones(2))
    programs = nn.Module()
    programs.b = b

    def model(x, uses_b):
        pyro.module("programs", programs)
        location_model(x + (programs.b if uses_b else 0.0))

    svi = svi_class(model, lambda x, uses_b: location_guide(x), optimiser, ELBO, clip_norm=1e9)
    svi.step(X, uses_b=True)
    after = b.detach().clone()
    assert not torch.equal(after, torch.ones(2))
    for _ in range(4):
        svi.step(X, uses_b=False)
    assert torch.equal(b.detach(), after)


def test_numbers_that_are_read_and_written_behind_versions(recorded):
    """A write through ``.data`` is seen at the next step."""
    scale, losses = torch.tensor(1.0, dtype=torch.float64), []

    def model(x):
        location_model(x, weight=scale.item())

    for svi_class in (SVI, CompiledSVI):
        pyro.clear_param_store()
        torch.manual_seed(0)
        scale.data.fill_(1.0)
        svi = svi_class(model, location_guide, pyro.optim.Adam({"lr": 0.01}), ELBO)
        losses.append([])
        for i in range(8):
            if i == 5:
                scale.data.fill_(2.0)
            losses[-1].append(svi.step(X))
    assert losses[1] == pytest.approx(losses[0], rel=1e-10)


@pytest.mark.filterwarnings("ignore::pyro_vae.compiled.FallbackWarning")
def test_a_loss_that_is_infinite_by_design_trains(tmp_path, recorded):
    """The tail-adaptive divergence has gradients, and no value."""

    def loss():
        return TraceTailAdaptive_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        location = pyro.param("location", torch.zeros(2, dtype=torch.float64))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(location, 1.0).to_event(1))

    results = []
    for svi_class in (SVI, CompiledSVI):
        pyro.clear_param_store()
        torch.manual_seed(0)
        svi = svi_class(model, guide, pyro.optim.Adam({"lr": 0.05}), loss())
        assert [svi.step(X) for _ in range(5)] == [math.inf] * 5
        results.append(values())
    assert_equal(results[1], results[0])
    with pytest.raises(ValueError, match="expected a loss that tells a bound, got TraceTailAdaptive_ELBO"):
        fit(model, guide, X, loss=loss(), out=tmp_path / "run", progress=False)
