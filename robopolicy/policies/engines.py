"""Engines: how a policy's tick is run. The whole path from observation to chunk is one graph, noise is an input.

    eager     the policy itself, operation by operation
    compile   torch.export, then AOTInductor: C++ made by a compiler that must be here (g++ or clang)
    onnx      torch.export, then ONNX Runtime; what `robopolicy export` writes

Normalising, encoding, every denoising step, un-normalising and clipping are captured from the policy's own `act` (and
`refine`), so an engine knows no method: it works for every policy that draws its noise by `robopolicy.rng`, branches on
no tensor's values, and takes its other settings as hashable values. One graph is captured per set of settings, at first
use (`capture` does it ahead). Noise is drawn outside, by the same generators in the same order: every engine sees the
noise that eager would.

A graph serves one row; a batch runs row by row, so rows cannot depend on their neighbours and an evaluation runs what
a robot runs. Chains of more than MAX_UNROLLED network calls are not unrolled: there the network's two halves
(`nn.layers.ChunkNetwork`) are graphs and the chain around them is eager.

CUDA graphs are not used: nothing here was written for, or tried on, a GPU.
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from robopolicy.errors import RobopolicyError, UnknownNameError
from robopolicy.nn.graphs import Runner, build_graph, require_backend
from robopolicy.nn.layers import ChunkNetwork
from robopolicy.policies.base import Policy
from robopolicy.rng import NoiseTape, Rng, randn
from robopolicy.types import Observation

EngineName = Literal["eager", "compile", "onnx"]

OUTPUTS = {
    "act": ("chunk",),
    "refine": ("chunk", "estimate"),
    "refine_first": ("x", "cond", "estimate"),
    "refine_rest": ("chunk",),
}
"""Methods of a policy that become graphs, where it has them, and what they return."""

TENSORS = (Tensor, Observation)

MAX_UNROLLED = 32
"""Network calls of the longest chain that becomes one graph; exporting takes longer than linearly in it."""


def build_engine(
    policy: Policy, engine: str = "eager", *, num_threads: int | None = None, max_unrolled: int = MAX_UNROLLED
) -> Policy:
    """Return `policy` run by `engine`: the policy itself for `eager`, else a GraphEngine, which acts like it.

    Args:
        policy: in evaluation mode, on the CPU.
        engine: one of EngineName.
        num_threads: of ONNX Runtime; None: as many as torch uses now. `compile` always runs on torch's own threads.
        max_unrolled: network calls of the longest chain that becomes one graph.

    Raises:
        RobopolicyError: the engine is unknown, its packages or a C++ compiler are missing, or the policy is on a GPU
            or in training mode.
    """
    if engine not in get_args(EngineName):
        raise UnknownNameError("engine", engine, get_args(EngineName))
    if engine == "eager":
        return policy
    require_backend(engine)
    if policy.device.type != "cpu":
        raise RobopolicyError(f"engine={engine} runs on the CPU, the policy is on {policy.device}; use engine=eager.")
    if policy.training:
        raise RobopolicyError("An engine captures the policy as it acts: call policy.eval() first.")
    return cast(
        Policy,
        GraphEngine(policy, engine, num_threads=num_threads or torch.get_num_threads(), max_unrolled=max_unrolled),
    )


@dataclass(frozen=True, kw_only=True)
class Graph:
    """One captured method for one set of settings."""

    method: str
    settings: Mapping[str, Any]
    inputs: Mapping[str, tuple[int, ...]]
    """Name to shape, of one row; `noise` first if there is any."""
    draws: tuple[int, ...]
    """Shape of the noise [n, 1, ...]; n is 0 where nothing is drawn."""
    outputs: tuple[str, ...]
    runner: Runner

    def fits(self, tensors: Sequence[Tensor]) -> bool:
        """Whether all `tensors` (without the noise) are of the right shape and finite; quicker than finding out what
        is wrong. Squares that overflow pass for not finite."""
        for value, shape in zip(tensors, self._shapes, strict=True):
            if value.shape != shape and value.shape[1:] != shape[1:]:
                return False
            if value.is_floating_point():
                flat = value.numpy().ravel()
                if not math.isfinite(flat.dot(flat)):
                    return False
        return True

    @functools.cached_property
    def _shapes(self) -> list[tuple[int, ...]]:
        return [shape for name, shape in self.inputs.items() if name != "noise"]


class GraphEngine:
    """Acts like the policy that it wraps, by graphs; everything else is forwarded to that policy."""

    def __init__(self, policy: Policy, engine: str, *, num_threads: int, max_unrolled: int = MAX_UNROLLED) -> None:
        self.engine = engine
        self.num_threads = num_threads
        self.max_unrolled = max_unrolled
        self._policy: Any = policy
        self._graphs: dict[Any, Graph | Callable[..., Any]] = {}
        self._modalities = tuple(policy.spec.observation)
        self._names: dict[str, list[str]] = {}
        self._network: nn.Module | None = None
        for name in OUTPUTS:
            if hasattr(policy, name):
                self._names[name] = [p for p in inspect.signature(getattr(policy, name)).parameters if p != "generator"]
                setattr(self, name, functools.partial(self._run, name))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_policy"], name)

    @property
    def graphs(self) -> list[Graph]:
        """All that was captured so far as a whole."""
        return [graph for graph in self._graphs.values() if isinstance(graph, Graph)]

    def capture(self, method: str, *args: Any, **settings: Any) -> Graph | None:
        """Return the graph that `method` runs with these arguments; None if its chain is too long for one graph."""
        args, settings = self._sorted(method, args, settings)
        found = self._graph(method, args, settings)
        return found if isinstance(found, Graph) else None

    def _run(self, method: str, *args: Any, generator: Rng = None, **settings: Any) -> Any:
        args, settings = self._sorted(method, args, settings)
        graph = self._graphs.get((method, len(args), *settings.items())) or self._graph(method, args, settings)
        if not isinstance(graph, Graph):
            return graph(generator=generator, **dict(zip(self._names[method], args, strict=False)), **settings)
        try:
            tensors = _tensors(args, self._modalities)
            fine = graph.fits(tensors)
        except KeyError:  # a modality is missing
            fine = False
        if not fine:
            self._check(args)  # says what is wrong
        if graph.draws[0]:
            tensors.insert(0, _draw(graph.draws, len(tensors[0]), generator))
        outputs = _by_row(graph, tensors)
        return outputs if len(outputs) > 1 else outputs[0]

    def _sorted(self, method: str, args: tuple[Any, ...], settings: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
        """Return the tensors in the order of the method's signature, and the settings that are none."""
        given = {name: value for name, value in settings.items() if value is not None}
        for name in self._names[method][len(args) :]:
            if not isinstance(given.get(name), TENSORS):
                break
            args = (*args, given.pop(name))
        return args, given

    def _check(self, args: Sequence[Any]) -> None:
        if isinstance(args[0], Observation):
            self._policy.check_inputs(*args)

    def _graph(self, method: str, args: tuple[Any, ...], settings: dict[str, Any]) -> Graph | Callable[..., Any]:
        key = (method, len(args), *settings.items())
        if key not in self._graphs:
            self._check(args)
            first = tuple(_first_row(value) for value in args)
            num_calls, draws = self._rehearse(method, first, settings)
            if num_calls > self.max_unrolled:
                self._graphs[key] = getattr(self._with_network_graphs(), method)
            else:
                self._graphs[key] = self._capture(method, first, settings, draws)
            if method == "refine_first":  # its other half will be wanted at some tick that cannot wait for a capture
                with torch.no_grad():
                    x, cond, _ = self._run(method, *first, **settings)
                self._graph("refine_rest", (x, cond), settings)
        return self._graphs[key]

    def _rehearse(self, method: str, args: tuple[Any, ...], settings: Mapping[str, Any]) -> tuple[int, tuple[int, ...]]:
        """Run `method` eagerly on one row; return its number of network calls and the shape of its noise."""
        network = getattr(self._policy, "network", None)
        counter = _Counting(network) if isinstance(network, ChunkNetwork) else None
        policy = self._policy if counter is None else _with_network(self._policy, counter)
        tape = NoiseTape()
        getattr(policy, method)(generator=tape, **dict(zip(self._names[method], args, strict=False)), **settings)
        shapes = {tuple(noise.shape) for noise in tape.drawn}
        if len(shapes) > 1:
            raise RobopolicyError(
                f"engine={self.engine}: {type(self._policy).__name__}.{method} draws noise of several shapes, "
                f"{sorted(shapes)}; an engine takes one. engine=eager works."
            )
        return counter.num_calls if counter else 0, (len(tape.drawn), *(shapes.pop() if shapes else ()))

    def _capture(
        self, method: str, args: tuple[Any, ...], settings: Mapping[str, Any], draws: tuple[int, ...]
    ) -> Graph:
        names: list[str] = []
        for name, value in zip(self._names[method], args, strict=False):
            names += self._modalities if isinstance(value, Observation) else [name]
        tensors = _tensors(args, self._modalities)
        if draws[0]:
            names, tensors = ["noise", *names], [randn(*draws), *tensors]
        outputs = OUTPUTS[method]
        runner = build_graph(
            self.engine,
            _Method(self._policy, method, dict(zip(self._names[method], args, strict=False)), settings, bool(draws[0])),
            tensors,
            what=f"{type(self._policy).__name__}.{method}",
            names=names,
            outputs=outputs,
            num_threads=self.num_threads,
        )
        return Graph(
            method=method,
            settings=dict(settings),
            inputs={name: tuple(value.shape) for name, value in zip(names, tensors, strict=True)},
            draws=draws,
            outputs=outputs,
            runner=runner,
        )

    def _with_network_graphs(self) -> Any:
        """Return the policy with its network's two halves as graphs."""
        if self._network is None:
            self._network = _GraphNetwork(self._policy, self.engine, self.num_threads)
        return _with_network(self._policy, self._network)


class _Method(nn.Module):
    """A policy's method as a function of tensors alone."""

    def __init__(
        self, policy: Policy, method: str, args: Mapping[str, Any], settings: Mapping[str, Any], noise: bool
    ) -> None:
        super().__init__()
        self.policy = policy
        self._method, self._names, self._settings, self._noise = method, tuple(args), dict(settings), noise
        self._modalities = tuple(policy.spec.observation) if "obs" in args else ()

    def forward(self, *tensors: Tensor) -> Any:
        tape = NoiseTape(tensors[0] if self._noise else ())
        values: list[Any] = list(tensors[self._noise :])
        if num := len(self._modalities):
            values[:num] = [Observation(modalities=dict(zip(self._modalities, values[:num], strict=True)))]
        given = dict(zip(self._names, values, strict=True))
        return getattr(self.policy, self._method)(generator=tape, **given, **self._settings)


class _Counting(ChunkNetwork):
    """Counts how often its network denoises."""

    def __init__(self, network: ChunkNetwork) -> None:
        super().__init__()
        self.network = network
        self.num_calls = 0

    def condition(self, t: Tensor, cond: Tensor) -> tuple[Tensor, ...]:
        return self.network.condition(t, cond)

    def denoise(self, x: Tensor, *condition: Tensor) -> Tensor:
        self.num_calls += 1
        return self.network.denoise(x, *condition)


class _Half(nn.Module):
    """A network's `denoise` as a module."""

    def __init__(self, network: ChunkNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, *condition: Tensor) -> Tensor:
        return self.network.denoise(x, *condition)


class _GraphNetwork(ChunkNetwork):
    """A network whose `denoise` is a graph for one row; `condition`, which runs once per chunk, stays eager."""

    def __init__(self, policy: Any, engine: str, num_threads: int) -> None:
        super().__init__()
        self._eager: ChunkNetwork = policy.network
        with torch.no_grad():
            parts = self._eager.condition(torch.zeros(1, dtype=torch.int64), torch.randn(1, policy.encoder.out_dim))
        self._denoise = build_graph(
            engine,
            _Half(self._eager),
            [torch.randn(1, policy.timing.horizon, policy.spec.action.dim), *parts],
            what=f"{type(self._eager).__name__}.denoise",
            names=["x", *(f"condition_{i}" for i in range(len(parts)))],
            outputs=["output"],
            num_threads=num_threads,
        )

    def condition(self, t: Tensor, cond: Tensor) -> tuple[Tensor, ...]:
        return self._eager.condition(t, cond)

    def denoise(self, x: Tensor, *condition: Tensor) -> Tensor:
        if len(x) == 1:
            return self._denoise(x, *condition)[0]
        rows = [self._denoise(x[i : i + 1], *(part[i : i + 1] for part in condition))[0] for i in range(len(x))]
        return torch.cat(rows)


def _with_network(policy: Any, network: nn.Module) -> Any:
    """Return a policy that shares everything with `policy` but its network."""
    other = copy.copy(policy)
    other._modules = {**policy._modules, "network": network}
    return other


def _tensors(args: Iterable[Any], modalities: Iterable[str]) -> list[Tensor]:
    """Return the tensors that `args` hold."""
    found: list[Tensor] = []
    for value in args:
        if isinstance(value, Observation):
            found += [value.modalities[name] for name in modalities]
        else:
            found.append(value)
    return found


def _first_row(value: Any) -> Any:
    """Return the first row of what has rows, copied; anything else as it is."""
    if isinstance(value, Observation):
        return Observation(modalities={name: _first_row(tensor) for name, tensor in value.modalities.items()})
    return value[:1].clone() if isinstance(value, Tensor) else value


def _draw(draws: Sequence[int], batch: int, generator: Rng) -> Tensor:
    """Return noise [n, B, ...], the same as n draws of [B, ...] one after the other."""
    num, _, *shape = draws
    if batch == 1 and not isinstance(generator, NoiseTape):
        source = generator if generator is None or isinstance(generator, torch.Generator) else generator[0]
        if source is None or source.device.type == "cpu":
            noise = torch.empty(num, 1, *shape)
            if math.prod(shape) % 16 == 0:  # torch fills by 16: all at once are the same numbers
                return noise.normal_(generator=source)
            for part in noise.unbind():
                part.normal_(generator=source)
            return noise
    return torch.stack([randn(batch, *shape, generator=generator) for _ in range(num)])


def _by_row(graph: Graph, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Run a graph of one row on `tensors` of B rows; the noise has its rows second."""
    batch = len(tensors[-1])
    if batch == 1:
        return graph.runner(*tensors)
    noise, others = (tensors[:1], tensors[1:]) if graph.draws[0] else ((), tensors)
    rows = [
        graph.runner(*(part[:, i : i + 1] for part in noise), *(value[i : i + 1] for value in others))
        for i in range(batch)
    ]
    return tuple(torch.cat(parts) for parts in zip(*rows, strict=True))
