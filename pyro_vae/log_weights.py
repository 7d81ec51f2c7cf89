"""``ln p(x, z) - ln q(z | x)`` of K draws, (K, B), in every plate structure: what an estimator is made of."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.infer.util import is_validation_enabled
from pyro.poutine.messenger import Messenger
from pyro.util import check_site_shape
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
from torch.nn.modules.batchnorm import _BatchNorm

from .compiled import preserved
from .distributions import check_masks, leaf_of, mixes_rows
from .draws import DRAWS, DrawsPlate, difference, log_prob_of, warn_of
from .guards import walk

__all__ = [
    "LogWeights",
    "Path",
    "Site",
    "Structure",
    "Structures",
    "check_draws_alone",
    "is_point",
    "log_weights",
    "on_plates",
    "per_datum",
    "plate_of_data",
    "samples",
    "some_rows",
    "structure_of",
]

MAX_STRUCTURES = 100  # signatures that are kept
PER_DRAW = ("log_p", "log_q", "reconstruction", "kl", "score")


class Structure(NamedTuple):
    """What a pair is for arguments of one signature.

    `plate` is the outermost one of independent data, None where there is none: then everything is one datum. Sites
    outside it are global. `nesting` is how many dimensions the plates take; `subsampled` a plate within the data's (or
    any, where there is none) that stands for more elements than it has.
    """

    plate: str | None
    nesting: int
    global_sites: tuple[str, ...]
    subsampled: str | None


def structure_of(
    model: Callable, guide: Callable, args: Sequence[Any], kwargs: Mapping[str, Any], plate: str | None = None
) -> Structure:
    """Run guide and model once, leaving everything as it was, to see their plates.

    The plate of the data, where it is not given, is one that holds every observed site: the one with the most latent
    sites (points apart), and of several like it the outermost. There is none where a site outside is drawn after one
    within, on which it may depend.

    Raises:
        ValueError: latent sites of the model that the guide lacks, or that are marked for enumeration; sites of the
            guide that the model lacks, or observes; chains of which other steps are there; with Pyro's validation,
            log-probabilities that do not fit plates.
    """
    with disable_proxy_modes_tracing(), preserved(), torch.no_grad():
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        model_trace = poutine.trace(poutine.replay(model, guide_trace)).get_trace(*args, **kwargs)
        structure = _structure(model_trace, guide_trace, plate)
        _check_steps(model_trace, guide_trace)
        if is_validation_enabled():
            for trace in (guide_trace, model_trace):
                for _, site in samples(trace):
                    site["log_prob"] = log_prob_of(site)
                    check_site_shape(site, structure.nesting)
    return structure


def _structure(model_trace: poutine.Trace, guide_trace: poutine.Trace, plate: str | None) -> Structure:
    _check_latents(model_trace, guide_trace)
    traces = [
        [(n, site) for n, site in samples(trace) if not _weightless(site)] for trace in (guide_trace, model_trace)
    ]
    sites = [site for trace in traces for site in trace]
    frames = [frame for _, site in sites for frame in site["cond_indep_stack"] if frame.name != DRAWS]
    if plate is None:
        latent = [_plates(site) for _, site in traces[0] if not site["is_observed"] and not is_point(site["fn"])]
        observed = [_plates(site) for _, site in traces[1] if site["is_observed"]]
        count = {name: sum(name in stack for stack in latent) for stack in observed or latent for name in stack}
        shared = [name for name, latents in count.items() if latents and all(name in stack for stack in observed)]
        plate = max(shared, key=count.__getitem__, default=None)  # the first of the largest
        for inside in ([plate in _plates(site) for _, site in trace] for trace in traces):
            if any(a and not b for a, b in itertools.pairwise(inside)):
                plate = None
    else:
        _check_order(traces, plate)
    scaled = {f.name for f in frames if f.name != plate and f.full_size is not None and f.size != f.full_size}
    within = [site for _, site in sites if plate is None or plate in _plates(site)]
    subsampled = (f.name for site in within for f in site["cond_indep_stack"] if f.name in scaled)
    outside = {} if plate is None else {name: None for name, site in sites if plate not in _plates(site)}
    nesting = -min((frame.dim for frame in frames if frame.vectorized), default=0)
    return Structure(plate, nesting, tuple(outside), next(subsampled, None))


def _check_order(traces: Sequence[Sequence[tuple[str, Any]]], plate: str) -> None:
    """A global site that is drawn after a local one may depend on it: then no datum has a weight of its own."""
    for sites in traces:
        local = None
        for name, site in sites:
            if plate in _plates(site):
                local = name
            elif local is not None:
                raise ValueError(
                    f'expected the global site "{name}" before the sites of the plate "{plate}", got it after '
                    f'"{local}", on which it may depend: draw it first, or put it in the plate'
                )


def plate_of_data(run: Callable[[int], Sequence[poutine.Trace]], rows: int) -> str:
    """The name of the plate of the data: "data", else the outermost that has an element for each row and holds all that
    the traces observe, or where they observe nothing, something that they draw.

    A plate of something else may have as many elements: another number of rows tells them apart.

    Args:
        run: gives traces of calls with so many rows; it may fail for another number than `rows`.

    Raises:
        ValueError: there is none.
    """
    sites = [site for trace in run(rows) for _, site in samples(trace) if not _weightless(site)]
    sites = sorted((site for site in sites if _plates(site)), key=lambda site: not site["is_observed"])
    stacks = [_sizes(site) for site in sites]
    if any("data" in stack for stack in stacks):
        return "data"
    observed = sum(site["is_observed"] for site in sites)
    fitting = [
        name
        for stack in stacks[: observed or None]
        for name, size in stack.items()
        if size == rows and all(name in other for other in stacks[:observed])
    ]
    if len({*fitting}) > 1 or (fitting and not observed):
        others: dict[str, int] = {}
        count = rows - 1 if rows > 1 else 2
        with contextlib.suppress(Exception), torch.random.fork_rng():  # programs of one number of rows
            for trace in run(count):
                for _, site in samples(trace):
                    others |= _sizes(site)
        fitting = [name for name in fitting if others.get(name, count) == count]
    if not fitting:
        raise ValueError(
            f"expected a plate of the {rows} data of a call around all that is observed, got the plates "
            f"{sorted({name for stack in stacks for name in stack})}: put the observed sites in "
            'pyro.plate("data", len(x))'
        )
    return fitting[0]


def some_rows(args: Sequence[Any], kwargs: Mapping[str, Any], count: int) -> tuple[list[Any], dict[str, Any]]:
    """The first `count` rows of data, or all and the first again."""

    def some(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.dim():
            return value
        return value[:count] if count <= len(value) else torch.cat([value, value[:1]])

    return [*map(some, args)], {name: some(value) for name, value in kwargs.items()}


def _sizes(site: Mapping[str, Any]) -> dict[str, int]:
    return {f.name: f.size for f in site["cond_indep_stack"] if f.vectorized and f.name != DRAWS}


def _check_latents(model_trace: poutine.Trace, guide_trace: poutine.Trace) -> None:
    for name, site in samples(model_trace):
        if site["is_observed"]:
            continue
        if name in guide_trace.nodes:
            if not is_point(guide_trace.nodes[name]["fn"]):
                check_masks(name, site, guide_trace.nodes[name])
            continue
        if site["infer"].get("enumerate"):
            raise ValueError(
                f'expected latent sites that the guide draws, got "{name}", which is to be summed out: draw it in the '
                "guide too, or use TraceEnum_ELBO"
            )
        raise ValueError(
            f'expected every latent site of the model in the guide, got "{name}" in the model alone: sample it in the '
            "guide, or give its value"
        )
    for name, site in samples(guide_trace):
        if name not in model_trace.nodes and not site["is_observed"] and not site["infer"].get("is_auxiliary"):
            raise ValueError(
                f'expected sites of the guide in the model too, got "{name}" in the guide alone: give it the name of a '
                'latent site, or mark it, infer={"is_auxiliary": True}'
            )
    check_draws_alone(guide_trace)


def check_draws_alone(guide_trace: poutine.Trace) -> None:
    """Raises ValueError for a site that a guide observes, whose density no bound on log p(x) has in its ln q.

    What it adds by `pyro.factor` is meant to be there.
    """
    for name, site in samples(guide_trace):
        if site["is_observed"] and not _weightless(site) and not isinstance(site["fn"], pyro.distributions.Unit):
            raise ValueError(
                f'expected a guide that draws latent sites alone, got the observed site "{name}": leave it to the '
                "model; a GuideMessenger, which runs the model itself, is for Pyro's own ELBOs"
            )


def _check_steps(model_trace: poutine.Trace, guide_trace: poutine.Trace) -> None:
    """A closed form of the divergence of two chains has one mask for both."""
    for name, site in samples(guide_trace):
        masks = _steps(site["fn"]), _steps(model_trace.nodes[name]["fn"]) if name in model_trace.nodes else None
        if masks[0] is None or masks[1] is None or masks[0].is_meta:  # which have no values
            continue
        if bool((masks[0] != masks[1]).any()):
            raise ValueError(
                f'expected latent site "{name}" masked in model and guide alike, got chains that differ in which steps '
                "are there: give both the same mask"
            )


class Structures:
    """A `Structure` for each pair and signature of arguments; copies and pickles begin empty.

    Nothing is kept alive: where a program is another than it was, or at the place of another, its run shows it, and
    `log_weights` looks again.
    """

    # they follow from the programs, so that no guard of a compiled step need look here
    __slots__ = ("joint", "known", "warned")

    def __init__(self) -> None:
        self.known: dict[Hashable, Structure] = {}
        self.joint: dict[Hashable, _Joint] = {}
        self.warned = False

    def __reduce__(self) -> tuple[type, tuple]:
        return Structures, ()

    def of(
        self,
        model: Callable,
        guide: Callable,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        plate: str | None = None,
        known: Structure | None = None,
    ) -> Structure:
        """That of the pair; `known` takes the place of what was."""
        key = self._key(model, guide, args, kwargs, plate)
        if known is not None or key not in self.known:
            while len(self.known) >= MAX_STRUCTURES:
                self.known.pop(next(iter(self.known)))
            self.known[key] = known or structure_of(model, guide, args, kwargs, plate)
        return self.known[key]

    def knows(
        self, model: Callable, guide: Callable, args: Sequence[Any], kwargs: Mapping[str, Any], plate: str | None
    ) -> bool:
        return self._key(model, guide, args, kwargs, plate) in self.known

    def together(
        self,
        model: Callable,
        guide: Callable,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        plate: str | None,
        num_draws: int,
    ) -> bool:
        """Whether several draws may be made in one call: the programs keep rows apart, and the first and the last of
        the draws score as in calls of their own, which is looked at once."""
        key = (*self._key(model, guide, args, kwargs, plate), num_draws)  # type: ignore[misc]
        if key not in self.joint or not self.joint[key].is_of(model, guide):
            while len(self.joint) >= MAX_STRUCTURES:
                self.joint.pop(next(iter(self.joint)))
            self.joint[key] = _Joint(model, guide)
        joint = self.joint[key]
        if joint.mixes_rows():
            return False
        if joint.is_due():
            structure = self.of(model, guide, args, kwargs, plate, structure_of(model, guide, args, kwargs, plate))
            with disable_proxy_modes_tracing(), preserved():
                problem = difference([guide, model], args, kwargs, num_draws, structure.nesting, structure.plate)
            if problem is not None and not self.warned:
                self.warned = True
                warn_of(problem)
            joint.differs = problem is not None
        return not joint.differs

    @staticmethod
    def _key(
        model: Callable, guide: Callable, args: Sequence[Any], kwargs: Mapping[str, Any], plate: str | None
    ) -> Hashable:
        return _identity(model), _identity(guide), _signature((tuple(args), dict(kwargs))), plate


class _Joint:
    """What is known of several draws in one call of a pair.

    It is looked at again at calls 1, 2, 4, 8 ... and where modules, their modes or numbers in their attributes have
    changed: a layer that is zero before training hides which dimension the next one counts. A difference stays.
    """

    def __init__(self, *programs: Callable) -> None:
        found = [value for _, _, value in walk(programs).entries]
        self.owners = [weakref.ref(owner) for owner in map(_owner, programs)]
        found += map(_owner, programs)
        modules = {id(m): m for each in found if isinstance(each, nn.Module) for m in each.modules()}
        self.modules = [weakref.ref(module) for module in modules.values()]
        self.state = self._state()
        self.calls, self.differs = 0, False

    def is_of(self, *programs: Callable) -> bool:
        """Whether it is of these programs as they are, but for the modes of modules and numbers in attributes."""
        if any(ref() is not owner for ref, owner in zip(self.owners, map(_owner, programs), strict=True)):
            return False
        known = {id(module()) for module in self.modules}
        owners = [owner for owner in map(_owner, programs) if isinstance(owner, nn.Module)]
        return all(id(m) in known for owner in owners for m in owner.modules())

    def is_due(self) -> bool:
        """Whether the draws are to be held against single calls now."""
        self.calls += 1
        if (state := self._state()) != self.state:
            self.state, self.calls = state, 1
        return not self.differs and self.calls & (self.calls - 1) == 0

    def _state(self) -> list[Any]:
        found: list[Any] = []
        for module in (ref() for ref in self.modules):
            own = vars(module).items() if module is not None and not _is_of_library(module) else ()
            found.append(bool(getattr(module, "training", False)))
            found += [(name, value) for name, value in own if isinstance(value, bool | int | float | str)]
        return found

    def mixes_rows(self) -> bool:
        return mixes_rows(*(module() for module in self.modules if isinstance(module(), _BatchNorm)))


def _owner(program: Callable) -> Any:
    return getattr(program, "__self__", program)


def _is_of_library(module: nn.Module) -> bool:
    return type(module).__module__.partition(".")[0] in ("torch", "pyro", "pyro_vae")


def _identity(program: Callable) -> Hashable:
    owner = getattr(program, "__self__", None)  # of a bound method, which is another object each time
    return id(program) if owner is None else (id(owner), getattr(program, "__func__", None))


def _signature(value: Any) -> Hashable:
    if isinstance(value, Tensor):
        return Tensor, value.shape
    if isinstance(value, Mapping):
        return type(value), *((key, _signature(each)) for key, each in value.items())
    if isinstance(value, list | tuple):
        return type(value), *map(_signature, value)
    return (type(value), value) if value is None or isinstance(value, int | str) else (type(value),)


class Site(NamedTuple):
    """A latent site: q, p, the draws, ``(K, ...)``, and the dimension of them that the data are on."""

    q: Any
    p: Any
    value: Tensor
    data_dim: int


class Path(NamedTuple):
    """A draw as the sampling path made it from the parameters and earlier leaves, and the leaf in its place.

    `counted` tells whose ln q counts, in the shape of the draw, where its site is masked; None where all do. `log_q` is
    ln q of a chain whose steps are masked, in the shape of its plates.
    """

    name: str
    drawn: Tensor
    leaf: Tensor
    counted: Tensor | None
    log_q: Tensor | None = None


@dataclasses.dataclass
class LogWeights:
    """Parts of ``ln w = ln p(x, z) - ln q(z | x)`` for K draws and B data, each (K, B), and of global sites, each ().

    Attributes:
        log_p, log_q: of the local sites; a KL weight is in both.
        reconstruction: ``ln p(x | z)``.
        kl: ``ln q(z | x) - ln p(z)``, or where it was asked for and exists the analytic divergence in its place.
        score: ln q of the sites that have no reparameterised draw, without weights; None where there are none.
        global_log_p, global_log_q, global_score: the same for the sites outside the plate of the data.
        scale: of the plate of the data, N / B. weighted: whether ln q of a local latent site has a weight, the KL's.
        sites: the local latent sites. unreparameterised: the names of those that `score` and `global_score` are of.
        leaves: whether the programs were given draws as leaves of autograd; `paths` are how these were made.
    """

    log_p: Tensor
    log_q: Tensor
    reconstruction: Tensor
    kl: Tensor
    score: Tensor | None
    global_log_p: Tensor
    global_log_q: Tensor
    global_score: Tensor | None
    scale: float
    weighted: bool
    sites: dict[str, Site]
    global_sites: tuple[str, ...]
    unreparameterised: list[str]
    calls: list[_Reader]
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    leaves: bool = False
    paths: list[Path] = dataclasses.field(default_factory=list)

    @property
    def log_weight(self) -> Tensor:
        return self.reconstruction - self.kl

    @property
    def global_log_weight(self) -> Tensor:
        return self.global_log_p - self.global_log_q

    def kl_per_dim(self, name: str) -> Tensor:
        """A site's part of `kl` for each dimension where q and p both factorise over them, else as a whole:
        (K, B, dimensions), K being 1 where it is that of every draw."""
        parts = torch.cat([call.kl_per_dim(name, call.analytic_kl) for call in self.calls])
        return parts.reshape(*parts.shape[:2], -1, parts.shape[-1]).sum(2)

    def kl_per_element(self) -> Tensor | None:
        """`kl` of all local sites for each dimension in each element of the plates within the data's, (K, B, elements),
        in closed form where it exists; None where a site does not factorise over its dimensions."""
        if not all(factorises(d) for site in self.sites.values() for d in site[:2]):
            return None
        of_sites = [torch.cat([call.kl_per_dim(name, True) for call in self.calls]) for name in self.sites]
        return torch.cat([each.flatten(start_dim=2).expand(*self.kl.shape, -1) for each in of_sites], 2)

    def counted(self, name: str) -> Tensor | None:
        """Whether ln q or ln p of a draw counts, in the shape of the site's value; None where all do."""
        masks = [counted(trace.nodes[name], self.sites[name].value) for trace in (self.calls[0].q, self.calls[0].p)]
        return None if masks[0] is None or masks[1] is None else masks[0] | masks[1]

    def observed(self, name: str) -> Tensor | None:
        """The value of an observed site; None where there is none of that name."""
        site = self.calls[0].p.nodes.get(name, {})
        return site["value"] if site.get("is_observed") else None

    def along_paths(self, of_local: Tensor, of_global: Tensor, of_masked: Tensor) -> Tensor:
        """What has the gradient ``sum_i (d f / d z_i) dz_i``, f being `of_local` for draws of local sites whose ln q
        counts, `of_masked` for those whose ln q is masked, and `of_global` for those of global sites. dz_i is what the
        parameters and the global draws change in z_i at fixed earlier local draws; ``d f / d z_i`` is total: it goes
        on through all later local draws, masked or not.

        Why f belongs to the draw at which a change begins: with v = softmax(ln w) the gradient of ``ln mean_k w_k`` is
        ``sum_k v_k d ln w_k``, and its part from q_i's parameters phi is, where ln q_i counts,

            sum_k v_k (d ln w_k / d z_i) dz_i - v_k d ln q(z_i | z_<i; phi) / d phi.

        In expectation the second term is ``-(d v_k / d z_i) dz_i = -(v_k - v_k^2) (d ln w_k / d z_i) dz_i``, so that
        ``v_k^2`` is left. Where ln q_i is masked there is no second term, and `v_k` stays. Neither depends on the masks
        of the sites that the path goes through. A chain is one site, and a change at a step that counts goes on through
        its later steps: where one that is masked has a part in f, both terms stay as they are.
        """
        paths = [*enumerate(self.paths)]
        of_all = [i for i, path in paths if path.name in self.global_sites]
        own = [i for i, _ in paths if i not in of_all]
        gradients, scores = self._totals(of_local, own), of_local.new_zeros(())
        if of_masked is not of_local and any(self.paths[i].counted is not None for i in own):
            of_others = self._totals(of_masked, own)
            for i in own:
                _, _, leaf, counted, log_q = self.paths[i]
                if counted is None:
                    continue
                if log_q is not None:
                    in_part = (of_others[i] != 0) & ~counted
                    in_part = in_part.flatten(start_dim=log_q.dim()).any(-1)
                    (weight,) = torch.autograd.grad(of_masked, log_q, retain_graph=True)
                    scores = scores + torch.where(in_part, weight * log_q, 0.0).sum()
                    counted = counted & ~in_part[(..., *[None] * (leaf.dim() - log_q.dim()))]
                gradients[i] = torch.where(counted, gradients[i], of_others[i])
        if of_all:
            of_global = of_global + scores
            from_local = sum(((gradients[i].detach() * self.paths[i].drawn).sum() for i in own), of_global)
            gradients |= self._totals(from_local, of_all)
        for i, path in paths:
            scores = scores + (gradients[i].detach() * path.drawn).sum()
        return scores

    def _totals(self, f: Tensor, those: Sequence[int]) -> dict[int, Tensor]:
        """The derivatives of f by the leaves of these paths, all the way through later ones of them."""
        gradients = {i: torch.zeros_like(self.paths[i].leaf) for i in those}

        def add(value: Tensor, onto: Sequence[int], outer: Tensor | None = None) -> None:
            if onto and value.requires_grad:
                leaves = [self.paths[i].leaf for i in onto]
                found = torch.autograd.grad(value, leaves, outer, retain_graph=True, allow_unused=True)
                for i, gradient in zip(onto, found, strict=True):
                    gradients[i] = gradients[i] if gradient is None else gradients[i] + gradient

        add(f, those)
        for count in reversed(range(len(those))):
            add(self.paths[those[count]].drawn, those[:count], gradients[those[count]])
        return gradients


def log_weights(
    model: Callable,
    guide: Callable,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    num_particles: int,
    structures: Structures | None = None,
    *,
    plate: str | None = None,
    vectorize: bool = True,
    analytic_kl: bool = False,
    leaves: bool = False,
    scaled: bool = True,
    given: poutine.Trace | None = None,
) -> LogWeights:
    """Draw K times from the guide, and score the draws. Global sites are drawn once for all K.

    Args:
        structures: where to look up the pair's, and keep it. plate: that of the data, as for `structure_of`.
        vectorize: all draws in one call, in a plate outside all others; else one call each.
        analytic_kl: use ``KL(q(z_i | x, z_<i) || p(z_i | z_<i))`` in closed form, in `kl` alone, where it exists.
        leaves: hand the programs each reparameterised draw as a leaf of autograd, and keep the path that led to it.
        scaled: take scales into account, those of plates within the data's and weights such as the KL's.
        given: draws of the global sites to score the data at.

    Raises:
        ValueError: as `structure_of`; programs whose plates differ from run to run.

    Example:
        >>> from pyro_vae.guides import AmortizedGuide
        >>> from pyro_vae.models import VAE
        >>> model = VAE((4,), latent_dim=2)
        >>> log_weights(model, AmortizedGuide(model), (torch.ones(5, 4),), {}, 3).log_weight.shape
        torch.Size([3, 5])
    """
    structures = structures or Structures()
    if vectorize and num_particles > 1:
        vectorize = structures.together(model, guide, args, kwargs, plate, num_particles)
    kept = structures.knows(model, guide, args, kwargs, plate)
    structure = structures.of(model, guide, args, kwargs, plate)
    for _ in range(2):
        call = functools.partial(_one_call, model, guide, args, kwargs, structure, analytic_kl, leaves, scaled)
        try:
            first = call(num_particles if vectorize else 1, given)
        except Exception:
            now = structure_of(model, guide, args, kwargs, plate) if kept else structure
            if now == structure:
                raise
            structure, kept = structures.of(model, guide, args, kwargs, plate, known=now), False
            continue  # a plate more than there was, where the draws' own is
        now = _structure(first.calls[0].p, first.calls[0].q, plate)
        if now == structure:
            break
        structure = structures.of(model, guide, args, kwargs, plate, known=now)  # it is not what it was
    else:
        raise ValueError(f"expected programs of static structure, got {structure} and then {now}: decide by masks")
    if vectorize or num_particles == 1:
        return first
    shared = poutine.Trace()  # by all draws: the rows of plates, and global sites
    for trace in (*([] if given is None else [given]), first.calls[0].q, first.calls[0].p):
        for name, site in trace.nodes.items():
            of_all = type(site.get("fn")).__name__ == "_Subsample" or name in structure.global_sites
            if of_all and name not in shared.nodes:
                shared.add_node(name, **site)
    parts = [first, *(call(1, shared) for _ in range(1, num_particles))]
    joined: dict[str, Any] = {
        part: torch.cat([getattr(each, part) for each in parts])
        for part in PER_DRAW
        if getattr(first, part) is not None
    }
    calls = [each.calls[0] for each in parts]
    return dataclasses.replace(first, **joined, calls=calls, paths=[path for each in parts for path in each.paths])


def _one_call(
    model: Callable,
    guide: Callable,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    structure: Structure,
    analytic_kl: bool,
    leaves: bool,
    scaled: bool,
    num_particles: int,
    shared: poutine.Trace | None = None,
) -> LogWeights:
    draws = DrawsPlate(num_particles, structure.nesting, structure.plate)
    detached = _Leaves(leaves, () if shared is None else structure.global_sites)
    if shared is not None:
        model, guide = (poutine.replay(program, shared) for program in (model, guide))
    with draws, detached:
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
    with draws:
        model_trace = poutine.trace(poutine.replay(model, guide_trace)).get_trace(*args, **kwargs)
    reader = _Reader(model_trace, guide_trace, structure, num_particles, analytic_kl, scaled, detached.own_log_q)
    weights = reader.read(args, kwargs)
    weights.leaves = leaves
    weights.paths = [path._replace(log_q=reader.log_q_of_chains.get(path.name)) for path in detached.paths]
    return weights


class _Leaves(Messenger):
    """Replaces reparameterised draws by leaves, but for sites `kept`."""

    def __init__(self, wanted: bool, kept: Sequence[str]) -> None:
        super().__init__()
        self.wanted, self.kept = wanted, kept
        self.paths: list[Path] = []
        self.own_log_q: dict[str, Tensor] = {}  # of draws by transforms, scored by the pass that made them

    def _pyro_post_sample(self, message: Any) -> None:
        unsuited = message["is_observed"] or type(message["fn"]).__name__ == "_Subsample"
        if not self.wanted or unsuited or message["name"] in self.kept:
            return
        drawn, q = message["value"], message["fn"]
        if hasattr(drawn, "_unquantize"):
            raise ValueError(
                f'expected draws that are differentiated at their values, got those of "{message["name"]}", a straight-'
                "through relaxation: use ELBO or IWAE"
            )
        if q.has_rsample and drawn.is_floating_point():
            if any(isinstance(each, torch.distributions.TransformedDistribution) for each in _layers(q)):
                self.own_log_q[message["name"]] = q.log_prob(drawn).detach()
            _check_masks_of_draws(message)
            path, leaf, message["value"] = leaf_of(drawn)
            self.paths.append(Path(message["name"], path, leaf, counted(message, path)))


class _Reader:
    """Sums a pair of traces into `LogWeights`."""

    def __init__(
        self,
        model_trace: poutine.Trace,
        guide_trace: poutine.Trace,
        structure: Structure,
        num_particles: int,
        analytic_kl: bool,
        scaled: bool,
        own_log_q: Mapping[str, Tensor],
    ) -> None:
        self.scaled, self.own_log_q = scaled, own_log_q
        self.p, self.q, self.structure, self.K = model_trace, guide_trace, structure, num_particles
        frames = [f for trace in (self.p, self.q) for _, site in samples(trace) for f in site["cond_indep_stack"]]
        of_data = [frame for frame in frames if frame.name == structure.plate]
        scales = {(frame.full_size or frame.size) / frame.size for frame in of_data} or {1.0}
        if len(scales) > 1:
            raise ValueError(
                f'expected plate "{structure.plate}" of one size in model and guide, got data that stand for {scales} '
                "each: give it the same size in both"
            )
        (self.scale,) = scales
        self.data_dim: int | None = of_data[0].dim if of_data else None
        self.B: int = of_data[0].size if of_data else 1
        self.shared = [n for n, _ in samples(self.q) if n in self.p.nodes and not self.p.nodes[n]["is_observed"]]
        self.in_order = self.shared == [name for name, _ in samples(self.p) if name in self.shared]
        self.log_q_of_chains: dict[str, Tensor] = {}  # of those whose steps are masked
        # then each q(z_i | z_<i) and p(z_i | z_<i) is known before z_i
        self.analytic_kl = analytic_kl and self.in_order

    def read(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> LogWeights:
        values = [site["value"] for trace in (self.q, self.p) for _, site in samples(trace)]
        zero = torch.zeros((), device=next((value.device for value in values if isinstance(value, Tensor)), None))
        sums = dict.fromkeys(PER_DRAW, zero)
        of_all = dict.fromkeys(("log_p", "log_q", "score"), zero)
        unreparameterised: list[str] = []
        weighted = False
        divergences = {name: self._divergence(name) for name in self.shared} if self.analytic_kl else {}
        for trace, part in ((self.q, "log_q"), (self.p, "log_p")):
            for name, site in samples(trace):
                log_prob = log_prob_of(site)
                if trace is self.q and name in self.own_log_q:
                    log_prob = self.own_log_q[name] + (log_prob - log_prob.detach())
                value = self._weighted(site, on_plates(site, log_prob))
                if trace is self.q and (differ := self._differ(name)) is not None:
                    value = value.masked_fill(differ, math.nan)
                if trace is self.q and any(_steps(each) is not None for each in _layers(site["fn"])):
                    self.log_q_of_chains[name] = value
                score = None
                if trace is self.q and not site["fn"].has_rsample:
                    unreparameterised.append(name)
                    score = on_plates(site, site["fn"].score_parts(site["value"]).score_function, masked=False)
                if name in self.structure.global_sites:
                    of_all[part] = of_all[part] + value.sum()
                    of_all["score"] = of_all["score"] + (0.0 if score is None else score.sum())
                    continue
                sums[part] = sums[part] + (value := self._per_datum(value))
                sums["score"] = sums["score"] + (0.0 if score is None else self._per_datum(score))
                if trace is self.p and site["is_observed"]:
                    sums["reconstruction"] = sums["reconstruction"] + value
                elif (divergence := divergences.get(name)) is None:
                    sums["kl"] = sums["kl"] + (value if trace is self.q else -value)
                elif trace is self.q:
                    sums["kl"] = sums["kl"] + self._per_datum(divergence)
                weighted |= trace is self.q and self._scale(site) is not None
        parts = {name: value.expand(self.K, self.B) for name, value in sums.items()}
        of_local = [name for name in unreparameterised if name not in self.structure.global_sites]
        return LogWeights(
            log_p=parts["log_p"],
            log_q=parts["log_q"],
            reconstruction=parts["reconstruction"],
            kl=parts["kl"],
            score=parts["score"] if of_local else None,
            global_log_p=of_all["log_p"],
            global_log_q=of_all["log_q"],
            global_score=of_all["score"] if len(of_local) < len(unreparameterised) else None,
            scale=self.scale,
            weighted=weighted,
            sites={name: self._site(name) for name in self.shared if name not in self.structure.global_sites},
            global_sites=self.structure.global_sites,
            unreparameterised=unreparameterised,
            calls=[self],
            args=args,
            kwargs=kwargs,
        )

    def _site(self, name: str) -> Site:
        q, value = self.q.nodes[name]["fn"], self.p.nodes[name]["value"]
        value = value[None] if self.K == 1 else value  # a single draw has no dimension of its own
        return Site(q, self.p.nodes[name]["fn"], value, value.dim() - q.event_dim + (self.data_dim or 0))

    def _differ(self, name: str) -> Tensor | None:
        """Of which data the chains of model and guide differ in which steps are there, found without reading masks:
        `_check_steps` reads them at the first of like calls."""
        masks = [_steps(trace.nodes[name]["fn"]) for trace in (self.q, self.p) if name in trace.nodes]
        if len(masks) < 2 or masks[0] is None or masks[1] is None or masks[0] is masks[1]:
            return None
        return (masks[0] != masks[1]).any(-1)

    def _divergence(self, name: str) -> Tensor | None:
        """``KL(q(z_i | x, z_<i) || p(z_i | z_<i))`` in closed form, weighted; None where there is none."""
        q, p = self.q.nodes[name], self.p.nodes[name]
        divergence = closed_form_kl(q["fn"], p["fn"])
        return None if divergence is None else self._weighted_kl(name, divergence, p["fn"].log_prob)

    def _weighted_kl(self, name: str, kl: Tensor, log_p: Callable[[Tensor], Tensor]) -> Tensor:
        """``w_q (ln q - ln p) + (w_q - w_p) ln p``, the weights being masks and scales, which may differ."""
        q, p = self.q.nodes[name], self.p.nodes[name]
        kl = self._weighted(q, on_plates(q, kl))
        if _equal(q["mask"], p["mask"]) and _equal(q["scale"], p["scale"]):
            return kl
        of_q, of_p = (self._weighted(site, on_plates(site, log_p(p["value"]))) for site in (q, p))
        return kl + (of_q - of_p)

    def kl_per_dim(self, name: str, analytic: bool) -> Tensor:
        """(K, B, *plates within, dimensions), in closed form where that is asked for and exists."""
        (q, p), z = (trace.nodes[name]["fn"] for trace in (self.q, self.p)), self.p.nodes[name]["value"]
        events, dims = 0, 1 + self.structure.nesting
        if all(isinstance(d, torch.distributions.Independent) and factorises(d) for d in (q, p)):
            events, q, p = q.event_dim, q.base_dist, p.base_dist

        def first(value: Tensor) -> Tensor:
            """(dimensions, *plates)"""
            value = value.flatten(start_dim=-events).movedim(-1, 0) if events else value[None]
            return value.reshape(len(value), *[1] * (dims + 1 - value.dim()), *value.shape[1:])

        divergence = closed_form_kl(q, p) if analytic and self.in_order else None
        kl = q.log_prob(z) - p.log_prob(z) if divergence is None else divergence
        kl = self._weighted_kl(name, first(kl), lambda z: first(p.log_prob(z))).movedim(0, -1)
        return kl[:, None] if self.data_dim is None else kl.movedim(self.data_dim - 1, 1)

    def _scale(self, site: Mapping[str, Any]) -> Any:
        """The site's scale without that of the plate of the data; None where it is 1."""
        scale = site["scale"] / (self.scale if self.structure.plate in _plates(site) else 1.0)
        return None if isinstance(scale, float | int) and scale == 1 else scale

    def _weighted(self, site: Mapping[str, Any], log_prob: Tensor) -> Tensor:
        scale = self._scale(site) if self.scaled else None
        return log_prob if scale is None else log_prob * scale

    def _per_datum(self, value: Tensor) -> Tensor:
        return per_datum(value, self.data_dim, -1 - self.structure.nesting)


def on_plates(site: Mapping[str, Any], log_prob: Tensor, masked: bool = True) -> Tensor:
    """A site's log-probabilities, masked, and of the shape of all its plates."""
    if masked and site["mask"] is not None:
        log_prob = torch.where(torch.as_tensor(site["mask"]), log_prob, log_prob.new_zeros(()))
    plates = {frame.dim: frame.size for frame in site["cond_indep_stack"] if frame.vectorized}
    shape = [plates.get(dim, 1) for dim in range(min(plates, default=0), 0)]
    return log_prob.expand(torch.broadcast_shapes(log_prob.shape, tuple(shape)))


def per_datum(value: Tensor, data_dim: int | None, draws_dim: int) -> Tensor:
    """Summed over all plates but those of draws and data: (K, B), with 1 in the place of what it has not."""
    others = [dim for dim in range(-value.dim(), 0) if dim not in (draws_dim, data_dim)]
    value = value.sum(others, keepdim=True) if others else value
    return value.reshape(value.shape[draws_dim] if value.dim() >= -draws_dim else 1, -1)


def factorises(distribution: Any) -> bool:
    """Whether its dimensions are independent: a number, or an `Independent` of numbers."""
    base = distribution.base_dist if isinstance(distribution, torch.distributions.Independent) else distribution
    return not base.event_shape


def closed_form_kl(q: Any, p: Any) -> Tensor | None:
    """``KL(q || p)``, of the batch shape of both; None where there is no closed form."""
    if is_point(q):  # whose registered divergence lacks its density
        return None
    masks = [getattr(each, "_mask", None) for d in (q, p) for each in _layers(d)]
    if any(mask is not None and mask is not True for mask in masks):
        return None  # Pyro's is that of what both count, and the masks may differ
    if q.batch_shape != p.batch_shape:  # torch's formulas for discrete ones do not broadcast
        shape = torch.broadcast_shapes(q.batch_shape, p.batch_shape)
        q, p = q.expand(shape), p.expand(shape)
    try:
        return torch.distributions.kl_divergence(q, p)
    except NotImplementedError:
        return None


def counted(site: Mapping[str, Any], value: Tensor) -> Tensor | None:
    """Whose log-probability no mask of a handler or of the distribution leaves out, in the shape of the value."""
    masks, found = [(site["mask"], len(site["fn"].event_shape))], None
    for each in _layers(site["fn"]):
        dims = len(each.event_shape)
        masks += [(getattr(each, "_mask", None), dims), (_steps(each), dims - 1)]
    for mask, event_dim in masks:
        if mask is not None:
            mask = torch.as_tensor(mask, device=value.device).expand(value.shape[: value.dim() - event_dim])
            mask = mask[(..., *[None] * event_dim)]
            found = mask if found is None else found & mask
    return found


def _check_masks_of_draws(site: Mapping[str, Any]) -> None:
    """Raises ValueError for a mask below a transform."""
    transformed = False
    for each in _layers(site["fn"]):
        masks = getattr(each, "_mask", None), _steps(each)
        if transformed and any(mask is not None and mask is not True for mask in masks):
            raise ValueError(
                f'expected masks of whole draws, got one of what a transform makes "{site["name"]}" of, which leaves '
                "out no part of the draw: mask the distribution that the transform returns, or use ELBO or IWAE"
            )
        transformed |= isinstance(each, torch.distributions.TransformedDistribution)


def _steps(distribution: Any) -> Tensor | None:
    """The mask of a chain's steps."""
    return getattr(distribution, "mask_", None)


def _layers(distribution: Any) -> Iterator[Any]:
    """The distribution and what it is made from."""
    yield distribution
    while hasattr(distribution, "base_dist"):
        distribution = distribution.base_dist
        yield distribution


def is_point(distribution: Any) -> bool:
    return any(isinstance(each, pyro.distributions.Delta) for each in _layers(distribution))


def _weightless(site: Mapping[str, Any]) -> bool:
    """Whether an observed site's log-probability is always 0: deterministic, or what a reparameterisation left."""
    masks = [getattr(each, "_mask", None) for each in _layers(site["fn"])]
    return site["is_observed"] and (bool(site["infer"].get("_deterministic")) or any(mask is False for mask in masks))


def _equal(a: Any, b: Any) -> bool:
    """Whether two masks or scales are the same, as far as can be told without reading tensors."""
    return a is b or (not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b)


def _plates(site: Mapping[str, Any]) -> list[str]:
    """The vectorised plates around a site, from the outermost."""
    return [frame.name for frame in site["cond_indep_stack"] if frame.vectorized and frame.name != DRAWS]


def samples(trace: poutine.Trace) -> Iterator[tuple[str, Any]]:
    """The sample sites of a trace, without those that plates make."""
    for name, site in trace.nodes.items():
        if site["type"] == "sample" and type(site["fn"]).__name__ != "_Subsample":
            yield name, site
