"""What eq. 5 costs, beside softmax of the same tensor and gradient descent, and how exact it is.

    # about a minute on one core; exactness by a sample
    python -m benchmarks.combiner [--trained RUN]
    # the same with fewer repeats and cases, in seconds
    python -m benchmarks.combiner --quick
    # exactness alone, in full; about 6 minutes
    python -m benchmarks.combiner --exactness [--trained RUN]

Each call is timed in turn with the softmax, on one thread.  Where the machine does other work, wall
time is partly that work's. CPU time is not, but for the caches.

The last line is one JSON object: {"conditions", "speed", "adam", "sparse", "exactness", "seconds"}.
Times are in milliseconds.
"""

import argparse
import json
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from clustering.groups import ClassGroups
from ensemble import SpecialistEnsemble, combine_kl, combine_kl_sparse

SEED = 0
# Of L-BFGS and of Adam, on the logits.
STEPS = 1000
# What is measured of exactness, and how large it may be.
BARS = {"- L-BFGS": 1e-9, "- Adam": 1e-9, "KKT f64": 1e-8, "KKT f32": 1e-4}


class Problem(NamedTuple):
    """groups. g [B, C]. p[m] [B, |S_m| + 1], the dustbin last."""

    groups: ClassGroups
    g: Tensor
    p: list[Tensor]


@dataclass(frozen=True)
class Case:
    """A random problem: overlapping groups, softmax of normal logits times `scale`.

    conflicting: dustbins of .999 and 1e-6 at random.
    """

    rows: int
    classes: int
    specialists: int
    size: int
    scale: float = 3
    conflicting: bool = False

    def problem(self, dtype: torch.dtype) -> Problem:
        rng = torch.Generator().manual_seed(SEED)
        classes = [
            torch.randperm(self.classes, generator=rng)[: self.size].numpy()
            for _ in range(self.specialists)
        ]

        def distribution(width: int) -> Tensor:
            noise = torch.randn(self.rows, width, generator=rng, dtype=dtype)
            return torch.softmax(self.scale * noise, 1)

        g = distribution(self.classes)
        p = []
        for _ in range(self.specialists):
            one = distribution(self.size + 1)
            if self.conflicting:
                high = torch.rand(self.rows, 1, generator=rng) < 0.5
                dustbin = torch.where(high, 0.999, 1e-6).to(dtype)
                inside = one[:, :-1] / one[:, :-1].sum(1, keepdim=True)
                one = torch.cat([inside * (1 - dustbin), dustbin], 1)
            p.append(one)
        return Problem(ClassGroups(classes, self.classes), g, p)


class Objective:
    """sum_m KL(p_m, q) up to a constant, its gradient, and how far a q is from its optimum.

    Columns: the classes in any group come first (U of them), so that no mask is larger than [U, M].
    A specialist's rows of zeros count as absent.
    """

    def __init__(
        self,
        groups: ClassGroups,
        g: Tensor,
        p: list[Tensor],
        dtype: torch.dtype = torch.float64,
    ):
        group_classes = [torch.tensor(classes, dtype=torch.int64) for classes in groups.members]
        in_any = torch.zeros(groups.num_classes, dtype=torch.bool)
        in_any[torch.cat(group_classes)] = True
        self.order = torch.cat([in_any.nonzero()[:, 0], (~in_any).nonzero()[:, 0]])
        self.U = int(in_any.sum())
        column = torch.argsort(self.order)
        self.a = g.to(dtype)[:, self.order]
        self.outside = torch.ones(self.U, len(p), dtype=dtype)
        for m, (one, classes) in enumerate(zip(p, group_classes, strict=True)):
            self.a[:, column[classes]] += one[:, :-1].to(dtype)
            self.outside[column[classes], m] = 0
        self.d = torch.stack([one[:, -1].to(dtype) for one in p], 1)
        self.mass = self.a.sum(1, keepdim=True) + self.d.sum(1, keepdim=True)

    def _left(self, q: Tensor) -> Tensor:
        """What q leaves outside each group, [n, M]: sums, never one minus the rest."""
        return q[:, : self.U] @ self.outside + q[:, self.U :].sum(1, keepdim=True)

    def of(self, q: Tensor) -> Tensor:
        q = q[:, self.order].to(self.a.dtype)
        of_classes = torch.special.xlogy(self.a, q).sum(1)
        of_dustbins = torch.special.xlogy(self.d, self._left(q)).sum(1)
        return -of_classes - of_dustbins

    def start(self, q: Tensor) -> Tensor:
        return q[:, self.order].to(self.a.dtype).clamp(min=1e-30).log()

    def value_and_gradient(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Of q = softmax(z), z in our order of columns: [n], [n, C].

        The gradient is what the optimum's conditions are missed by.
        """
        highest = z.amax(1, keepdim=True)
        q = torch.exp(z - highest)
        total = q.sum(1, keepdim=True)
        log_q = z - (highest + total.log())
        q /= total
        left = self._left(q)
        value = -torch.linalg.vecdot(self.a, log_q) - torch.special.xlogy(self.d, left).sum(1)
        return value, self._missed(q, left)

    def _missed(self, q: Tensor, left: Tensor) -> Tensor:
        t = torch.where(self.d > 0, self.d / left, 0.0)
        missed = q * (self.mass - t.sum(1, keepdim=True))
        missed[:, : self.U] += q[:, : self.U] * (t @ (1 - self.outside).T)
        return missed.sub_(self.a)

    def residual(self, q: Tensor) -> float:
        q = q[:, self.order].to(self.a.dtype)
        missed = float(self._missed(q, self._left(q)).abs().max())
        return max(missed, float((q.sum(1) - 1).abs().max()))


def adam(objective: Objective, start: Tensor, steps: int) -> Tensor:
    """The lowest objective on the way, [n].

    The step size falls from 0.1 to nothing, so that it does not end in a circle.
    """
    z = objective.start(start).requires_grad_()
    optimiser = torch.optim.Adam([z], lr=0.1, fused=True)
    lowest = torch.full((len(z),), np.inf, dtype=z.dtype)
    for step in range(steps):
        with torch.no_grad():
            value, z.grad = objective.value_and_gradient(z)
        lowest = torch.minimum(lowest, value)
        optimiser.param_groups[0]["lr"] = 0.1 * (1 - step / steps)
        optimiser.step()
    return torch.minimum(lowest, objective.value_and_gradient(z.detach())[0])


def lbfgs(objective: Objective, start: Tensor, steps: int) -> Tensor:
    """The lowest objective on the way, [n], of L-BFGS on all rows together."""
    z = objective.start(start).requires_grad_()
    optimiser = torch.optim.LBFGS(
        [z],
        max_iter=steps,
        max_eval=2 * steps,
        tolerance_grad=1e-13,
        tolerance_change=0,
        history_size=10,
        line_search_fn="strong_wolfe",
    )
    lowest = torch.full((len(z),), np.inf, dtype=z.dtype)

    def closure() -> float:
        nonlocal lowest
        with torch.no_grad():
            value, z.grad = objective.value_and_gradient(z)
        lowest = torch.where(value < lowest, value, lowest)
        return float(value.sum())

    optimiser.step(closure)
    return lowest


# ---- exactness

Errors = dict[str, float]  # keys: those of BARS


def measure(
    problem: Problem, active: Tensor | None = None, weights: Tensor | None = None
) -> Errors:
    """What BARS names, for predictions in float64. p[m] is not read where it is not active."""
    groups, g, p = problem
    if active is None:
        active = torch.ones(len(g), len(p), dtype=torch.bool)
    w = [1.0] * (1 + len(p)) if weights is None else weights.tolist()

    def objective_of(general: Tensor, special: list[Tensor]) -> Objective:
        weighted = [
            torch.where(active[:, m, None], w[1 + m] * one.double(), 0.0)
            for m, one in enumerate(special)
        ]
        return Objective(groups, w[0] * general.double(), weighted)

    single_p = [one.float() for one in p]
    objective = objective_of(g, p)
    q = combine_kl(g, p, groups, active, weights)
    single_q = combine_kl(g.float(), single_p, groups, active, weights)
    if not bool(torch.isfinite(q).all() and torch.isfinite(single_q).all()):
        return dict.fromkeys(BARS, np.nan)
    ours = objective.of(q)
    return {
        "- L-BFGS": float((ours - lbfgs(objective, g, STEPS)).max()),
        "- Adam": float((ours - adam(objective, g, STEPS)).max()),
        "KKT f64": objective.residual(q),
        "KKT f32": objective_of(g.float(), single_p).residual(single_q),
    }


def formatted(errors: Errors) -> str:
    text = " ".join(f"{errors[name]:9.1e}" for name in BARS)
    failing = [name for name, bar in BARS.items() if not errors[name] <= bar]
    if failing:
        text += f"  FAILS: {', '.join(failing)}"
    return text


def worst_of(all_errors: list[Errors]) -> Errors:
    # NaN wins.
    return {name: float(np.max([errors[name] for errors in all_errors])) for name in BARS}


def worst_line(all_errors: list[Errors]) -> str:
    parts = [f"{n} {v:.1e} (bar {BARS[n]:.0e})" for n, v in worst_of(all_errors).items()]
    return f"worst of {len(all_errors)}: {', '.join(parts)}"


def exactness_cases(everything: bool, quick: bool) -> Iterator[list[Case]]:
    """The cases of each number of classes."""
    sizes = {100: (30, 4), 1_000: (60, 4), 15_000: (300, 4), 100_000: (300, 2)}
    specialists = [1, 2, 5, 10, 30]
    kinds = [(scale, conflicting) for conflicting in (False, True) for scale in (3, 8, 20)]
    if not everything:
        sizes = {classes: sizes[classes] for classes in (100, 1_000)}
        specialists = [10] if quick else [2, 10]
        kinds = [(3, False), (8, True)]
    for classes, (size, rows) in sizes.items():
        yield [
            Case(rows, classes, count, size, scale, conflicting)
            for count in specialists
            for scale, conflicting in kinds
        ]


def exactness(everything: bool, quick: bool) -> list[Errors]:
    print(
        f"\nexactness: our objective minus the lowest of L-BFGS and of Adam, {STEPS:,} steps each "
        "on the logits in float64,\nworst row (negative: ours is lower); KKT residual, worst class"
    )
    if not everything:
        print(
            "A sample: C up to 1,000, two kinds; --exactness has C up to 100,000, five M, six kinds"
        )
    head = f"{'C':>7} {'M':>3} {'|S|':>4} {'scale':>5} {'conflict':>8} {'n':>3}"
    print(f"{head} | " + " ".join(f"{name:>9}" for name in BARS))
    all_errors = []
    for cases in exactness_cases(everything, quick):
        of_classes = []
        for case in cases:
            errors = measure(case.problem(torch.float64))
            of_classes.append(errors)
            print(
                f"{case.classes:7} {case.specialists:3} {case.size:4} {case.scale:5} "
                f"{case.conflicting!s:>8} {case.rows:3} | {formatted(errors)}",
                flush=True,
            )
        print(f"C = {cases[0].classes:,}, {worst_line(of_classes)}", flush=True)
        all_errors += of_classes
    return all_errors


def trained(run: str, rows: int = 128) -> list[Errors]:
    """The same on what a run's networks predict of its test split, at the gates n = 1, 2, 5."""
    from pipeline.config import load_config
    from trainer.data import open_shards

    config = load_config(Path(run) / "config.toml")
    shards = open_shards(config.data.test, config.data, "test")
    count = min(4 * rows, shards.num_samples)
    ids = np.random.default_rng(SEED).choice(shards.num_samples, count, replace=False)
    inputs = torch.from_numpy(shards.inputs(np.sort(ids)))
    print(f"\ntrained: {run}, its test split; rows are the first {rows} that need a specialist")
    head = f"{'C':>7} {'gate':>4} {'active':>12} {'weight':>6} {'n':>3}"
    print(f"{head} | " + " ".join(f"{name:>9}" for name in BARS))
    all_errors = []
    for n in (1, 2, 5):
        ensemble = SpecialistEnsemble.load(run, gate=n, allow_missing=True)
        problem, active = _first_rows(ensemble, inputs, rows)
        counts = active.sum(1)
        choices: list[Tensor | None] = [None]
        if ensemble.weights is not None:
            choices.append(torch.as_tensor(ensemble.weights, dtype=torch.float64))
        for weights in choices:
            errors = measure(problem, active, weights)
            all_errors.append(errors)
            weight = 1.0 if weights is None else float(weights[1])
            spread = f"{int(counts.min())} to {int(counts.max())}"
            print(
                f"{problem.g.shape[1]:7} {n:4} {spread:>12} {weight:6.2f} {len(problem.g):3} | "
                f"{formatted(errors)}",
                flush=True,
            )
    return all_errors


def _first_rows(ensemble: SpecialistEnsemble, inputs: Tensor, rows: int) -> tuple[Problem, Tensor]:
    """The first rows that need a specialist, in float64, and which are active [n, M]."""
    p_general, p_special, active = ensemble.predictions(inputs)
    chosen = active.any(1).nonzero()[:rows, 0]
    g = p_general[chosen].double()
    p = []
    for entry, classes in zip(p_special, ensemble.groups.members, strict=True):
        dense = torch.zeros(len(inputs), len(classes) + 1, dtype=torch.float64)
        if entry is not None:
            dense[entry[0]] = entry[1].double()
        dense = dense[chosen]
        p.append(dense / dense.sum(1, keepdim=True).clamp(min=1e-30))
    return Problem(ensemble.groups, g / g.sum(1, keepdim=True), p), active[chosen]


# ---- speed


class Times(NamedTuple):
    """Per call, in milliseconds."""

    median: float
    quickest: float
    median_cpu: float

    def __str__(self) -> str:
        return f"{self.median:6.2f} ({self.quickest:.2f}; {self.median_cpu:.2f})"


def in_turn(functions: dict[str, Callable[[], object]], repeats: int) -> dict[str, Times]:
    """They take turns, so that what else the machine does hits them alike."""
    seconds = {name: [] for name in functions}
    for _ in range(repeats + 2):
        for name, function in functions.items():
            start, cpu = time.perf_counter(), time.process_time()
            function()
            elapsed = time.perf_counter() - start
            seconds[name].append((elapsed, time.process_time() - cpu))
    times = {}
    for name, pairs in seconds.items():
        wall, cpu = 1e3 * np.array(pairs[2:]).T
        times[name] = Times(float(np.median(wall)), float(wall.min()), float(np.median(cpu)))
    return times


def distinct_sets(rows: int, specialists: int, active_per_row: int) -> Tensor:
    """active [rows, specialists], a set of its own per row."""
    rng = torch.Generator().manual_seed(SEED)
    active = torch.zeros(rows, specialists, dtype=torch.bool)
    seen = set()
    while len(seen) < rows:
        chosen = sorted(torch.randperm(specialists, generator=rng)[:active_per_row].tolist())
        if tuple(chosen) not in seen:
            active[len(seen), chosen] = True
            seen.add(tuple(chosen))
    return active


def speed(quick: bool) -> dict[str, dict]:
    """Name -> {"ours", "softmax": Times, "first_call"}."""
    print(
        "\nspeed, float32, B = 256, C = 15,000, |S| = 300, validation included; "
        "ms, median wall (quickest; median CPU)"
    )
    z = torch.randn(256, 15_000, generator=torch.Generator().manual_seed(SEED))
    cases = [
        ("M = 1", 1, None, 2),
        ("M = 10", 10, None, 4),
        ("256 active sets of M = 3 among 61", 61, distinct_sets(256, 61, 3), 10),
    ]
    rows = {}
    for name, specialists, active, bar in cases:
        groups, g, p = Case(256, 15_000, specialists, 300).problem(torch.float32)

        def ours(groups=groups, g=g, p=p, active=active) -> Tensor:
            return combine_kl(g, p, groups, active)

        start = time.perf_counter()
        ours()
        first_call = 1e3 * (time.perf_counter() - start)
        functions = {"ours": ours, "softmax": lambda: torch.softmax(z, 1)}
        with torch.no_grad():
            times = in_turn(functions, 5 if quick else 41)
        pairs = zip(times["ours"], times["softmax"], strict=True)
        ratio = Times(*(mine / other for mine, other in pairs))
        print(
            f"{name:34} {times['ours']}, softmax {times['softmax']}, ratio {ratio}, bar {bar}; "
            f"first call {first_call:.0f} ms",
            flush=True,
        )
        rows[name] = {n: t._asdict() for n, t in times.items()} | {"first_call": first_call}
    return rows


def adam_step(quick: bool, ours: float) -> float:
    """Milliseconds of one step of gradient descent.  ours: of combine_kl, for comparison."""
    groups, g, p = Case(256, 15_000, 10, 300).problem(torch.float32)
    objective = Objective(groups, g, p, torch.float32)
    steps = 1 if quick else 5
    start = time.perf_counter()
    adam(objective, g, steps)
    each = 1e3 * (time.perf_counter() - start) / steps
    print(
        f"Adam, M = 10: {each:.0f} ms a step (n = {steps}); 1,000 steps {each:.0f} s, "
        f"{1000 * each / ours:,.0f} times ours, bar 1,000"
    )
    return each


# ---- sparse


class SparseProblem(NamedTuple):
    """groups. active [B, M]. indices [B, k]. g [B, k + 1], the tail last. p as Problem has it."""

    groups: ClassGroups
    active: Tensor
    indices: Tensor
    g: Tensor
    p: list[Tensor]

    def combined(self) -> tuple[Tensor, Tensor, Tensor]:
        values, tail = self.g[:, :-1], self.g[:, -1]
        return combine_kl_sparse(self.indices, values, tail, self.p, self.groups, self.active)


def sparse_problem(
    classes: int, rows: int, k: int, active_per_row: int, size: int, specialists: int
) -> SparseProblem:
    rng = np.random.default_rng(SEED)
    group_classes = [rng.choice(classes, size, replace=False) for _ in range(specialists)]
    active = torch.zeros(rows, specialists, dtype=torch.bool)
    indices = np.empty((rows, k), dtype=np.int64)
    for row in range(rows):
        chosen = rng.choice(specialists, active_per_row, replace=False)
        active[row, chosen] = True
        needed = np.unique(np.concatenate([group_classes[m] for m in chosen]))
        others = np.setdiff1d(rng.choice(classes, 2 * k), needed)
        others = rng.permutation(others)[: k - len(needed)]
        indices[row] = rng.permutation(np.concatenate([needed, others]))
    noise = torch.Generator().manual_seed(SEED)
    g = torch.softmax(3 * torch.randn(rows, k + 1, generator=noise), 1)
    p = [
        torch.softmax(3 * torch.randn(rows, size + 1, generator=noise), 1)
        for _ in range(specialists)
    ]
    return SparseProblem(
        ClassGroups(group_classes, classes), active, torch.from_numpy(indices), g, p
    )


def sparse(quick: bool) -> dict[int, dict]:
    """C -> Times and "mebibytes", allocated in all."""
    k, active_per_row, size = 1_600, 5, 300
    print(
        f"\nsparse: 256 rows, k = {k:,}, M = {active_per_row}, |S| = {size}, "
        "a set of its own per row, float32, one core"
    )
    rows = {}
    for classes in [100_000] if quick else [100_000, 1_000_000]:
        problem = sparse_problem(classes, 256, k, active_per_row, size, specialists=40)
        with torch.no_grad():
            times = in_turn({"ours": problem.combined}, 3 if quick else 15)["ours"]
            mebibytes = allocated(problem.combined)
        print(
            f"C = {classes:9,}: {times}, bar 50; {mebibytes:.0f} MiB allocated in all", flush=True
        )
        rows[classes] = times._asdict() | {"mebibytes": mebibytes}
    return rows


def allocated(function: Callable[[], object]) -> float:
    """MiB that a call allocates in all."""
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
        function()
    usage = [event.self_cpu_memory_usage for event in profile.key_averages()]
    return sum(max(0, each) for each in usage) / 2**20


# ---- the program


@dataclass
class Conditions:
    commit: str
    torch: str
    machine: str
    cpu: str
    seed: int
    time: str

    def __str__(self) -> str:
        return (
            f"commit {self.commit}, torch {self.torch}, {self.machine}, {self.cpu}, one thread, "
            f"seed {self.seed}, {self.time}"
        )


def conditions() -> Conditions:
    command = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    return Conditions(
        commit=commit.stdout.strip(),
        torch=torch.__version__,
        machine=platform.processor() or platform.machine(),
        cpu=_cpu_name(),
        seed=SEED,
        time=time.strftime("%Y-%m-%d %H:%M"),
    )


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    for line in lines:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return "unknown CPU"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer repeats and cases, in seconds")
    parser.add_argument(
        "--exactness", action="store_true", help="only how exact it is, over the whole grid"
    )
    parser.add_argument(
        "--trained",
        metavar="RUN",
        help="also how exact it is on the predictions of a run's networks",
    )
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    start = time.perf_counter()
    now = conditions()
    print(now)
    results: dict[str, object] = {"conditions": asdict(now)}
    if not arguments.exactness:
        rows = speed(arguments.quick)
        results["speed"] = rows
        results["adam"] = adam_step(arguments.quick, rows["M = 10"]["ours"]["median"])
        results["sparse"] = sparse(arguments.quick)
    all_errors = exactness(arguments.exactness, arguments.quick)
    if arguments.trained:
        all_errors += trained(arguments.trained)
    print(f"\nof all, {worst_line(all_errors)}")
    seconds = time.perf_counter() - start
    print(f"\n{seconds:.0f} s in all")
    results["exactness"] = {"cases": len(all_errors), "worst": worst_of(all_errors), "bars": BARS}
    results["seconds"] = seconds
    print(json.dumps(results))


if __name__ == "__main__":
    main()
