"""What eq. 5 costs, beside softmax of the same tensor and beside gradient descent, and how exact it is.

    python -m benchmarks.combiner [--quick] [--trained RUN]        about a minute on one core; exactness by a sample
    python -m benchmarks.combiner --exactness [--trained RUN]      exactness alone, in full; about 6 minutes

Each call is timed in turn with the softmax, on one thread.  Where the machine does other work, wall time is partly that
work's; CPU time is not, but for the caches.
"""

import argparse
import platform
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from clustering.groups import ClassGroups  # noqa: E402
from ensemble import combine_kl, combine_kl_sparse  # noqa: E402

SEED = 0


def problem(rows, classes, specialists, size, scale, conflicting, dtype, seed=SEED):
    """Overlapping random groups; softmax of normal logits times `scale`; conflicting: dustbins of .999 and 1e-6 at
    random."""
    rng = torch.Generator().manual_seed(seed)
    groups = ClassGroups(
        [torch.randperm(classes, generator=rng)[:size].numpy() for _ in range(specialists)], classes
    )
    g = torch.softmax(scale * torch.randn(rows, classes, generator=rng, dtype=dtype), 1)
    p = []
    for _ in range(specialists):
        one = torch.softmax(scale * torch.randn(rows, size + 1, generator=rng, dtype=dtype), 1)
        if conflicting:
            dustbin = torch.where(torch.rand(rows, 1, generator=rng) < 0.5, 0.999, 1e-6).to(dtype)
            one = torch.cat(
                [one[:, :-1] / one[:, :-1].sum(1, keepdim=True) * (1 - dustbin), dustbin], 1
            )
        p.append(one)
    return groups, g, p


class Objective:
    """sum_m KL(p_m, q) up to a constant, its gradient in the logits of q, and how far a q is from its optimum.

    Columns: the classes in any group come first (U of them), so that no mask is larger than [U, M].  A specialist's
    rows of zeros count as absent.
    """

    def __init__(self, groups, g, p, dtype=torch.float64):
        members = [torch.tensor(inside, dtype=torch.int64) for inside in groups.members]
        in_any = torch.zeros(groups.num_classes, dtype=torch.bool)
        in_any[torch.cat(members)] = True
        self.order = torch.cat([in_any.nonzero()[:, 0], (~in_any).nonzero()[:, 0]])
        self.U, place = int(in_any.sum()), torch.argsort(self.order)
        self.a = g.to(dtype)[:, self.order]
        self.outside = torch.ones(self.U, len(p), dtype=dtype)
        for m, (one, inside) in enumerate(zip(p, members, strict=True)):
            self.a[:, place[inside]] += one[:, :-1].to(dtype)
            self.outside[place[inside], m] = 0
        self.d = torch.stack([one[:, -1].to(dtype) for one in p], 1)
        self.mass = self.a.sum(1, keepdim=True) + self.d.sum(1, keepdim=True)

    def _left(self, q):
        """What q leaves outside each group, [n, M]: sums of what is there, never one minus the rest."""
        return q[:, : self.U] @ self.outside + q[:, self.U :].sum(1, keepdim=True)

    def of(self, q):
        q = q[:, self.order].to(self.a.dtype)
        return -torch.special.xlogy(self.a, q).sum(1) - torch.special.xlogy(
            self.d, self._left(q)
        ).sum(1)

    def start(self, q):
        return q[:, self.order].to(self.a.dtype).clamp(min=1e-30).log()

    def value_and_gradient(self, z):
        """Of q = softmax(z), z in our order of columns: [n], [n, C].  The gradient is what the optimum's conditions
        are missed by."""
        highest = z.amax(1, keepdim=True)
        q = torch.exp(z - highest)
        total = q.sum(1, keepdim=True)
        log_q = z - (highest + total.log())
        q /= total
        left = self._left(q)
        value = -torch.linalg.vecdot(self.a, log_q) - torch.special.xlogy(self.d, left).sum(1)
        return value, self._missed(q, left)

    def _missed(self, q, left):
        t = torch.where(self.d > 0, self.d / left, 0.0)
        missed = q * (self.mass - t.sum(1, keepdim=True))
        missed[:, : self.U] += q[:, : self.U] * (t @ (1 - self.outside).T)
        return missed.sub_(self.a)

    def residual(self, q):
        q = q[:, self.order].to(self.a.dtype)
        return max(
            float(self._missed(q, self._left(q)).abs().max()), float((q.sum(1) - 1).abs().max())
        )


def adam(objective, start, steps):
    """The lowest objective on the way, [n].  The step size falls from 0.1 to nothing, so that it does not end in a
    circle."""
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


def lbfgs(objective, start, steps):
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

    def closure():
        nonlocal lowest
        with torch.no_grad():
            value, z.grad = objective.value_and_gradient(z)
        lowest = torch.where(value < lowest, value, lowest)
        return value.sum()

    optimiser.step(closure)
    return lowest


STEPS = 1000
# What a judge asks: issue 3.
BARS = {"- L-BFGS": 1e-9, "- Adam": 1e-9, "KKT f64": 1e-8, "KKT f32": 1e-4}


def measured(groups, g, p, active=None, weights=None) -> dict:
    """What BARS names, for opinions in float64; p[m] is [B, |S_m| + 1], and not read where not active."""

    def objective_of(general, special):
        w = torch.ones(1 + len(special)) if weights is None else weights
        read = torch.ones(len(g), len(p), dtype=torch.bool) if active is None else active
        weighted = [
            torch.where(read[:, m, None], float(w[1 + m]) * one.double(), 0.0)
            for m, one in enumerate(special)
        ]
        return Objective(groups, float(w[0]) * general.double(), weighted)

    objective, single = objective_of(g, p), objective_of(g.float(), [one.float() for one in p])
    q = combine_kl(g, p, groups, active, weights)
    q32 = combine_kl(g.float(), [one.float() for one in p], groups, active, weights)
    ours = objective.of(q)
    found = {
        "- L-BFGS": float((ours - lbfgs(objective, g, STEPS)).max()),
        "- Adam": float((ours - adam(objective, g, STEPS)).max()),
        "KKT f64": objective.residual(q),
        "KKT f32": single.residual(q32),
    }
    finite = bool(torch.isfinite(q).all() and torch.isfinite(q32).all())
    return found if finite else dict.fromkeys(found, np.nan)


def _shown(found: dict) -> str:
    failing = [name for name, bar in BARS.items() if not found[name] <= bar]
    return " ".join(f"{found[name]:9.1e}" for name in BARS) + (
        f"  FAILS: {', '.join(failing)}" if failing else ""
    )


def _worst(all_found: list[dict]) -> str:
    worst = {name: float(np.max([found[name] for found in all_found])) for name in BARS}  # NaN wins
    return f"worst of {len(all_found)}: " + ", ".join(
        f"{n} {v:.1e} (bar {BARS[n]:.0e})" for n, v in worst.items()
    )


def exactness(everything: bool) -> list[dict]:
    print(
        f"\nexactness: our objective minus the lowest of L-BFGS and of Adam, {STEPS:,} steps each on the logits in "
        "float64, worst row\n(negative: ours is lower); KKT residual, worst class"
    )
    if not everything:
        print(
            "A sample: C up to 1,000, M of 2 and 10, two kinds; --exactness has C up to 100,000, five M, six kinds"
        )
    print(
        f"{'C':>7} {'M':>3} {'|S|':>4} {'scale':>5} {'conflict':>8} {'n':>3} | "
        + " ".join(f"{n:>9}" for n in BARS)
    )
    sizes = {100: (30, 4), 1_000: (60, 4), 15_000: (300, 4), 100_000: (300, 2)}
    all_found = []
    for classes, (size, rows) in sizes.items() if everything else list(sizes.items())[:2]:
        of_classes = []
        for specialists in (1, 2, 5, 10, 30) if everything else (2, 10):
            kinds = [(scale, conflicting) for conflicting in (False, True) for scale in (3, 8, 20)]
            for scale, conflicting in kinds if everything else [(3, False), (8, True)]:
                groups, g, p = problem(
                    rows, classes, specialists, size, scale, conflicting, torch.float64
                )
                of_classes.append(measured(groups, g, p))
                print(
                    f"{classes:7} {specialists:3} {size:4} {scale:5} {str(conflicting):>8} {rows:3} | "
                    f"{_shown(of_classes[-1])}",
                    flush=True,
                )
        print(f"C = {classes:,}, {_worst(of_classes)}", flush=True)
        all_found += of_classes
    return all_found


def trained(run: str, rows: int = 128) -> list[dict]:
    """The same on the opinions that a run's networks have of its test split, at the gates n = 1, 2, 5."""
    from ensemble import SpecialistEnsemble
    from pipeline.config import load_config
    from trainer.data import open_shards

    config = load_config(Path(run) / "config.toml")
    shards = open_shards(config.data.test, config.data, "test")
    ids = np.random.default_rng(SEED).choice(
        shards.num_samples, min(4 * rows, shards.num_samples), replace=False
    )
    inputs, all_found = torch.from_numpy(shards.inputs(np.sort(ids))), []
    print(f"\ntrained: {run}, its test split; rows are the first {rows} that ask a specialist")
    print(
        f"{'C':>7} {'gate':>4} {'active':>12} {'weight':>6} {'n':>3} | "
        + " ".join(f"{n:>9}" for n in BARS)
    )
    for n in (1, 2, 5):
        ensemble = SpecialistEnsemble.load(run, gate=n, allow_missing=True)
        p_general, p_special, active = ensemble.predictions(inputs)
        asked = active.any(1).nonzero()[:rows, 0]
        g = p_general[asked].double()
        g, p = g / g.sum(1, keepdim=True), []
        for m, one in enumerate(p_special):
            dense = torch.zeros(
                len(inputs), len(ensemble.groups.members[m]) + 1, dtype=torch.float64
            )
            if one is not None:
                dense[one[0]] = one[1].double()
            dense = dense[asked]
            p.append(dense / dense.sum(1, keepdim=True).clamp(min=1e-30))
        active = active[asked]
        count = active.sum(1)
        own = ensemble.weights
        for weights in [None] if own is None else [None, torch.as_tensor(own, dtype=torch.float64)]:
            all_found.append(measured(ensemble.groups, g, p, active, weights))
            weight = 1.0 if weights is None else float(weights[1])
            print(
                f"{g.shape[1]:7} {n:4} {f'{int(count.min())} to {int(count.max())}':>12} {weight:6.2f} "
                f"{len(g):3} | {_shown(all_found[-1])}",
                flush=True,
            )
    return all_found


def in_turn(functions: dict, repeats: int) -> dict:
    """name -> [repeats, 2] wall and CPU seconds per call; they take turns, so that what else the machine does hits them
    alike."""
    times = {name: [] for name in functions}
    for _ in range(repeats + 2):
        for name, function in functions.items():
            start, cpu = time.perf_counter(), time.process_time()
            function()
            times[name].append((time.perf_counter() - start, time.process_time() - cpu))
    return {name: np.array(found[2:]) for name, found in times.items()}


def speed(quick: bool):
    print(
        "\nspeed, float32, B = 256, C = 15,000, |S| = 300, validation included; ms, median wall (quickest; median CPU)"
    )
    repeats = 9 if quick else 41
    z = torch.randn(256, 15_000, generator=torch.Generator().manual_seed(SEED))
    rows = [
        ("M = 1", 1, None, 2),
        ("M = 10", 10, None, 4),
        ("256 active sets of M = 3 among 61", 61, 3, 10),
    ]
    seconds = {}
    for name, specialists, asked, bar in rows:
        groups, g, p = problem(256, 15_000, specialists, 300, 3, False, torch.float32)
        active = None
        if asked:
            rng, seen = torch.Generator().manual_seed(SEED), set()
            active = torch.zeros(256, specialists, dtype=torch.bool)
            for row in range(256):
                while (
                    chosen := tuple(
                        sorted(torch.randperm(specialists, generator=rng)[:asked].tolist())
                    )
                ) in seen:
                    pass
                seen.add(chosen)
                active[row, list(chosen)] = True
        start = time.perf_counter()
        combine_kl(g, p, groups, active)
        first = time.perf_counter() - start
        with torch.no_grad():
            found = in_turn(
                {
                    "ours": lambda a=active, g=g, p=p, G=groups: combine_kl(g, p, G, a),
                    "softmax": lambda: torch.softmax(z, 1),
                },
                repeats,
            )
        shown, values = {}, {}
        for who, times in found.items():
            values[who] = np.array(
                [np.median(times[:, 0]), times[:, 0].min(), np.median(times[:, 1])]
            )
            shown[who] = "{:6.2f} ({:.2f}; {:.2f})".format(*values[who] * 1e3)
        ratio = "{:.2f} ({:.2f}; {:.2f})".format(*values["ours"] / values["softmax"])
        seconds[name] = float(values["ours"][0])
        print(
            f"{name:34} {shown['ours']}, softmax {shown['softmax']}, ratio {ratio}, bar {bar}; "
            f"first call {first * 1e3:.0f} ms",
            flush=True,
        )
    groups, g, p = problem(256, 15_000, 10, 300, 3, False, torch.float32)
    objective = Objective(groups, g, p, torch.float32)
    steps = 3 if quick else 5
    start = time.perf_counter()
    adam(objective, g, steps)
    each = (time.perf_counter() - start) / steps
    print(
        f"Adam, M = 10: {each * 1e3:.0f} ms a step (n = {steps}); 1,000 steps {each * 1e3:.0f} s, "
        f"{1000 * each / seconds['M = 10']:,.0f} times ours, bar 1,000"
    )


def sparse(quick: bool):
    k, asked, size, specialists = 1_600, 5, 300, 40
    print(
        f"\nsparse: 256 rows, k = {k:,}, M = {asked}, |S| = {size}, a set of its own per row, float32, one core"
    )
    for classes in (100_000, 1_000_000):
        rng = np.random.default_rng(SEED)
        members = [rng.choice(classes, size, replace=False) for _ in range(specialists)]
        groups = ClassGroups(members, classes)
        active, indices = (
            torch.zeros(256, specialists, dtype=torch.bool),
            np.empty((256, k), dtype=np.int64),
        )
        for row in range(256):
            chosen = rng.choice(specialists, asked, replace=False)
            active[row, chosen] = True
            needed = np.unique(np.concatenate([members[m] for m in chosen]))
            others = np.setdiff1d(rng.choice(classes, 2 * k), needed)
            indices[row] = rng.permutation(
                np.concatenate([needed, rng.permutation(others)[: k - len(needed)]])
            )
        noise = torch.Generator().manual_seed(SEED)
        g = torch.softmax(3 * torch.randn(256, k + 1, generator=noise), 1)
        p = [
            torch.softmax(3 * torch.randn(256, size + 1, generator=noise), 1)
            for _ in range(specialists)
        ]
        where = torch.from_numpy(indices)
        with torch.no_grad():

            def ours(G=groups, w=where, a=active, g=g, p=p):
                return combine_kl_sparse(w, g[:, :-1], g[:, -1], p, G, a)

            found = in_turn({"ours": ours}, 5 if quick else 15)["ours"]
            wall, cpu = found[:, 0] * 1e3, found[:, 1] * 1e3
            with torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
            ) as profile:
                combine_kl_sparse(where, g[:, :-1], g[:, -1], p, groups, active)
        allocated = sum(max(0, event.self_cpu_memory_usage) for event in profile.key_averages())
        print(
            f"C = {classes:9,}: {np.median(wall):6.1f} ms ({wall.min():.1f}; {np.median(cpu):.1f}), bar 50; "
            f"{allocated / 2**20:.0f} MiB allocated in all",
            flush=True,
        )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a few cases, in seconds")
    parser.add_argument(
        "--exactness", action="store_true", help="only how exact it is, over the whole grid"
    )
    parser.add_argument(
        "--trained",
        metavar="RUN",
        help="also how exact it is on the predictions of a run's networks",
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
    )
    print(
        f"commit {commit.stdout.strip()}, torch {torch.__version__}, {platform.processor() or platform.machine()}, "
        f"{_cpu()}, one thread, seed {SEED}, {time.strftime('%Y-%m-%d %H:%M')}"
    )
    start = time.perf_counter()
    if not arguments.exactness:
        speed(arguments.quick)
        sparse(arguments.quick)
    found = exactness(arguments.exactness)
    if arguments.trained:
        found += trained(arguments.trained)
    print(f"\nof all, {_worst(found)}")
    print(f"\n{time.perf_counter() - start:.0f} s in all")


def _cpu() -> str:
    for line in (
        Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ()
    ):
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return "unknown CPU"


if __name__ == "__main__":
    main()
