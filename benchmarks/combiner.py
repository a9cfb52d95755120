"""What eq. 5 costs, beside softmax of the same tensor and beside gradient descent, and how exact it is.

    python -m benchmarks.combiner [--quick] [--trained RUN]        about 4 minutes on one core

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
    groups = ClassGroups([torch.randperm(classes, generator=rng)[:size].numpy() for _ in range(specialists)], classes)
    g = torch.softmax(scale * torch.randn(rows, classes, generator=rng, dtype=dtype), 1)
    p = []
    for _ in range(specialists):
        one = torch.softmax(scale * torch.randn(rows, size + 1, generator=rng, dtype=dtype), 1)
        if conflicting:
            dustbin = torch.where(torch.rand(rows, 1, generator=rng) < 0.5, 0.999, 1e-6).to(dtype)
            one = torch.cat([one[:, :-1] / one[:, :-1].sum(1, keepdim=True) * (1 - dustbin), dustbin], 1)
        p.append(one)
    return groups, g, p


class Objective:
    """sum_m KL(p_m, q) up to a constant, and how far q is from its optimum."""

    def __init__(self, groups, g, p):
        self.g, self.p = g.double(), [one.double() for one in p]
        self.inside = [torch.tensor(members) for members in groups.members]
        self.outside = torch.ones(len(p), groups.num_classes, dtype=torch.float64)
        for m, members in enumerate(self.inside):
            self.outside[m, members] = 0

    def of(self, q):
        left = q @ self.outside.T
        total = -torch.special.xlogy(self.g, q).sum(1)
        for m, (one, members) in enumerate(zip(self.p, self.inside, strict=True)):
            total = (
                total
                - torch.special.xlogy(one[:, :-1], q[:, members]).sum(1)
                - torch.special.xlogy(one[:, -1], left[:, m])
            )
        return total

    def of_logits(self, z):
        return self.of(torch.softmax(z, 1))

    def residual(self, q):
        q = q.double()
        a = self.g.clone()
        for one, members in zip(self.p, self.inside, strict=True):
            a[:, members] += one[:, :-1]
        d = torch.stack([one[:, -1] for one in self.p], 1)
        load = (d / (q @ self.outside.T).clamp(min=1e-300)) @ self.outside
        stationarity = (q * (1 + len(self.p) - load) - a).abs().max()
        return max(float(stationarity), float((q.sum(1) - 1).abs().max()))


def adam(objective, start, steps):
    z = start.clamp(min=1e-30).log().clone().requires_grad_()
    optimiser = torch.optim.Adam([z], lr=0.1)
    for _ in range(steps):
        optimiser.zero_grad()
        objective.of_logits(z).sum().backward()
        optimiser.step()
    return torch.softmax(z.detach(), 1)


def lbfgs(objective, start, steps):
    z = start.clamp(min=1e-30).log().clone().requires_grad_()
    optimiser = torch.optim.LBFGS(
        [z], max_iter=steps, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimiser.zero_grad()
        loss = objective.of_logits(z).sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    return torch.softmax(z.detach(), 1)


def exactness(quick: bool):
    print(
        "\nexactness: ours minus the other's objective, worst row (negative: ours is lower); KKT residual; n rows each"
    )
    print(f"{'C':>7} {'M':>3} {'|S|':>4} {'scale':>5} {'conflict':>8} {'n':>3} | {'- L-BFGS':>9} {'- Adam':>9} "
          f"{'KKT f64':>8} {'KKT f32':>8}  steps of L-BFGS, Adam")  # fmt: skip
    sizes = {100: 30, 1_000: 60, 15_000: 300, 100_000: 300}
    worst = {"lbfgs": -np.inf, "adam": -np.inf, "64": 0.0, "32": 0.0}
    for classes, size in sizes.items():
        # The oracles cost rows x classes x steps; the large ones get fewer of each.
        rows, steps = {100: (16, 1000), 1_000: (8, 300), 15_000: (2, 60), 100_000: (1, 20)}[classes]
        for specialists in (1, 2, 5, 10, 30):
            for scale, conflicting in ((3, False), (20, False), (3, True), (8, True), (20, True)):
                if quick and (specialists not in (2, 10) or scale != 8):
                    continue
                groups, g, p = problem(rows, classes, specialists, size, scale, conflicting, torch.float64)
                objective = Objective(groups, g, p)
                q = combine_kl(g, p, groups)
                ours = objective.of(q)
                assert bool(torch.isfinite(q).all())
                differences = {}
                with_adam = specialists in (2, 10) and classes <= 1000
                differences["lbfgs"] = float((ours - objective.of(lbfgs(objective, g, min(steps, 200)))).max())
                if with_adam:
                    differences["adam"] = float((ours - objective.of(adam(objective, g, steps))).max())
                p32 = [one.float() for one in p]
                kkt64 = objective.residual(q)
                single = Objective(groups, g.float(), p32)
                kkt32 = single.residual(combine_kl(g.float(), p32, groups))
                for name, value in differences.items():
                    worst[name] = max(worst[name], value)
                worst["64"], worst["32"] = max(worst["64"], kkt64), max(worst["32"], kkt32)
                shown = [f"{differences[name]:9.1e}" if name in differences else " " * 9 for name in ("lbfgs", "adam")]
                if specialists in (2, 10):
                    steps_taken = f"{min(steps, 200)}, {steps if with_adam else '-'}"
                    print(f"{classes:7} {specialists:3} {size:4} {scale:5} {str(conflicting):>8} {rows:3} | "
                          f"{' '.join(shown)} {kkt64:8.1e} {kkt32:8.1e}  {steps_taken}", flush=True)  # fmt: skip
    print(f"worst of all: - L-BFGS {worst['lbfgs']:.1e}, - Adam {worst['adam']:.1e} (bar 1e-9); "
          f"KKT float64 {worst['64']:.1e} (bar 1e-8), float32 {worst['32']:.1e} (bar 1e-4)")  # fmt: skip


def trained(run: str):
    """The same on the opinions that a run's networks have of its own val split."""
    from ensemble import SpecialistEnsemble
    from trainer.config import load_config
    from trainer.data import open_shards

    config = load_config(Path(run) / "config.toml")
    shards = open_shards(config.data.val, config.data, "val")
    ids = np.random.default_rng(SEED).choice(shards.num_samples, min(256, shards.num_samples), replace=False)
    ensemble = SpecialistEnsemble.load(run, gate=5, allow_missing=True)
    p_general, p_special, active = ensemble.opinions(torch.from_numpy(shards.inputs(np.sort(ids))))
    dense = [None if one is None else one[1].double() for one in p_special]
    rows = int(active.sum(1).argmax())
    chosen = active[rows].nonzero()[:, 0].tolist()
    same = (active[:, chosen].all(1)).nonzero()[:, 0]
    groups = ClassGroups([ensemble.groups.members[m] for m in chosen], ensemble.groups.num_classes)
    about = {m: p_special[m][0] for m in chosen}
    p = [dense[m][(about[m][:, None] == same).to(torch.int64).argmax(0)] for m in chosen]
    p = [one / one.sum(1, keepdim=True) for one in p]
    g = p_general[same].double()
    g = g / g.sum(1, keepdim=True)
    objective = Objective(groups, g, p)
    q = combine_kl(g, p, groups)
    difference = float((objective.of(q) - objective.of(lbfgs(objective, g, 200))).max())
    print(
        f"\ntrained ({run}, n = {len(same)} rows, M = {len(chosen)}): - L-BFGS {difference:.1e}, "
        f"KKT {objective.residual(q):.1e}"
    )


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
    rows = [("M = 1", 1, None, 2), ("M = 10", 10, None, 4), ("256 active sets of M = 3 among 61", 61, 3, 10)]
    seconds = {}
    for name, specialists, asked, bar in rows:
        groups, g, p = problem(256, 15_000, specialists, 300, 3, False, torch.float32)
        active = None
        if asked:
            rng, seen = torch.Generator().manual_seed(SEED), set()
            active = torch.zeros(256, specialists, dtype=torch.bool)
            for row in range(256):
                while (chosen := tuple(sorted(torch.randperm(specialists, generator=rng)[:asked].tolist()))) in seen:
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
            values[who] = np.array([np.median(times[:, 0]), times[:, 0].min(), np.median(times[:, 1])])
            shown[who] = "{:6.2f} ({:.2f}; {:.2f})".format(*values[who] * 1e3)
        ratio = "{:.2f} ({:.2f}; {:.2f})".format(*values["ours"] / values["softmax"])
        seconds[name] = float(values["ours"][0])
        print(f"{name:34} {shown['ours']}, softmax {shown['softmax']}, ratio {ratio}, bar {bar}; "
              f"first call {first * 1e3:.0f} ms", flush=True)  # fmt: skip
    groups, g, p = problem(256, 15_000, 10, 300, 3, False, torch.float32)
    objective = Objective(groups, g, p)
    objective.g, objective.p, objective.outside = g, p, objective.outside.float()
    steps = 3 if quick else 5
    start = time.perf_counter()
    adam(objective, g, steps)
    each = (time.perf_counter() - start) / steps
    print(f"Adam, M = 10: {each * 1e3:.0f} ms a step (n = {steps}); 1,000 steps {each * 1e3:.0f} s, "
          f"{1000 * each / seconds['M = 10']:,.0f} times ours, bar 1,000")  # fmt: skip


def sparse(quick: bool):
    k, asked, size, specialists = 1_600, 5, 300, 40
    print(f"\nsparse: 256 rows, k = {k:,}, M = {asked}, |S| = {size}, a set of its own per row, float32, one core")
    for classes in (100_000, 1_000_000):
        rng = np.random.default_rng(SEED)
        members = [rng.choice(classes, size, replace=False) for _ in range(specialists)]
        groups = ClassGroups(members, classes)
        active, indices = torch.zeros(256, specialists, dtype=torch.bool), np.empty((256, k), dtype=np.int64)
        for row in range(256):
            chosen = rng.choice(specialists, asked, replace=False)
            active[row, chosen] = True
            needed = np.unique(np.concatenate([members[m] for m in chosen]))
            others = np.setdiff1d(rng.choice(classes, 2 * k), needed)
            indices[row] = rng.permutation(np.concatenate([needed, rng.permutation(others)[: k - len(needed)]]))
        noise = torch.Generator().manual_seed(SEED)
        g = torch.softmax(3 * torch.randn(256, k + 1, generator=noise), 1)
        p = [torch.softmax(3 * torch.randn(256, size + 1, generator=noise), 1) for _ in range(specialists)]
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
        print(f"C = {classes:9,}: {np.median(wall):6.1f} ms ({wall.min():.1f}; {np.median(cpu):.1f}), bar 50; "
              f"{allocated / 2**20:.0f} MiB allocated in all", flush=True)  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few cases, in seconds")
    parser.add_argument("--trained", metavar="RUN", help="also on the predictions of a run's networks")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    print(f"commit {commit.stdout.strip()}, torch {torch.__version__}, {platform.processor() or platform.machine()}, "
          f"{_cpu()}, one thread, seed {SEED}, {time.strftime('%Y-%m-%d %H:%M')}")  # fmt: skip
    start = time.perf_counter()
    speed(arguments.quick)
    sparse(arguments.quick)
    exactness(arguments.quick)
    if arguments.trained:
        trained(arguments.trained)
    print(f"\n{time.perf_counter() - start:.0f} s in all")


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return "unknown CPU"


if __name__ == "__main__":
    main()
