"""The data and the network of Allen-Zhu & Li 2020, where an ensemble's gain, and what students keep of it, is counted.

    python -m benchmarks.papers.multiview --to runs/papers/multiview --write      45 minutes of one core
    python -m benchmarks.papers.multiview --to DIR --seeds 0 --quick              a look, no result

Each class has two features, its views; almost every example shows both, a share mu only one.  One view is enough for
most, and a network learns one view of each class and knows by heart what that leaves: it fails on half of the new
examples that show one view, 0.5 mu of all.  Networks of other initial weights know other views, their ensemble both.

For each seed, all on one draw of data, by full-batch gradient descent: MEMBERS single networks; their ensemble; its
student; students of one network each (self-distillation); and the control, fixed random features whose last layer alone
is learned: MEMBERS of them, their ensemble, its students among them, and the paper's network as its student.  All that
is done lies under --to and is not done again.

Students of two kinds, both beside the labels: by KL at T = 30, the usual distillation; and raised to their teachers'
logits (raise_to) where theirs are lower.  KL pulls logits down as well: from one teacher it hands on that teacher's
views and takes from the student its own.
"""

from __future__ import annotations

import math
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.in_memory import InMemory
from pipeline.config import Engine, Schedule, Student, UserError
from trainer.core import loop
from trainer.core.losses import classification_loss
from trainer.core.objectives import Objective, classify, distil
from trainer.data.streams import MeasuringStream, Source, TrainingStream, shuffled
from trainer.distributed.ranks import Ranks, process_group
from trainer.engines import build_engine

from . import lab

TITLE = "Multi-view data (Allen-Zhu & Li 2020)"
MEMBERS, SELF_STUDENTS, KL_STUDENTS = 10, 4, 2
PAPER = {  # test error in units of mu, theorems 1 to 4
    "single": "0.49 to 0.51",
    "ensemble": "at most 0.01",
    "distilled_kl": "at most 0.01",
    "self_kl": "at most 0.26",
    "distilled": "at most 0.01",
    "self": "at most 0.26",
    "random": "-",
    "random_ensemble": "lower",
    "random_distilled": "as one",
    "random_to_network": "-",
}
NAMES = {
    "single": "one network",
    "ensemble": f"ensemble of {MEMBERS}, mean logits",
    "distilled_kl": "student of the ensemble, KL",
    "self_kl": "student of one other network, KL",
    "distilled": "student of the ensemble, raised",
    "self": "student of one other network, raised",
    "random": "random features: one",
    "random_ensemble": f"random features: ensemble of {MEMBERS}",
    "random_distilled": "random features: student of their ensemble",
    "random_to_network": "the paper's network as that ensemble's student",
}


# The data -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """The distribution of Allen-Zhu & Li, section 3, of a size that one core can do; theirs is for k to infinity.

    An example has its label's views, weight 1 each; every view of another class with probability off_classes / C, with
    weight off_weight (off_weight_single where the example shows one view); each of them in a patch of its own; and
    Gaussian noise of norm `noise` in every patch.

    With 60 examples of each class, one of which shows one view: from several such, a network learns the second view
    before it knows them by heart.
    """

    classes: int = 10
    patches: int = 10
    dimension: int = 2048
    per_class: int = 60
    single_share: float = 1 / 60  # mu
    off_classes: float = 2.0  # s
    off_weight: float = 0.4
    off_weight_single: float = 0.35  # Gamma
    noise: float = 1.5


class Drawn(NamedTuple):
    """inputs: float16 [n, P, d].  labels: int64 [n].  single: bool [n], one view only.  weights: float32 [n, C, 2], of
    every view in the example, 0 where it is absent."""

    inputs: np.ndarray
    labels: np.ndarray
    single: np.ndarray
    weights: np.ndarray


def orthonormal_views(problem: Problem, seed: int) -> np.ndarray:
    """float32 [C, 2, d]: the 2 C views, orthonormal, directions drawn evenly."""
    draw = np.random.default_rng([seed, 0])
    basis, _ = np.linalg.qr(draw.standard_normal((problem.dimension, 2 * problem.classes)))
    return np.ascontiguousarray(basis.T, np.float32).reshape(problem.classes, 2, problem.dimension)


def draw_examples(
    problem: Problem, views: np.ndarray, per_class: int, single_share: float, seed: int
) -> Drawn:
    """per_class examples of each class, round(single_share per_class) of them with one view, each view as likely."""
    draw = np.random.default_rng([seed, 1])
    C, P, d, n = problem.classes, problem.patches, problem.dimension, per_class * problem.classes
    rows, labels = np.arange(n), np.arange(n) % C
    single = rows // C < round(single_share * per_class)

    weights = np.where(single[:, None, None], problem.off_weight_single, problem.off_weight)
    weights = weights * (draw.random((n, C, 2)) < problem.off_classes / C)
    # Beyond the room that the label leaves, the last of a random order go: one example in some thousands has so many.
    order = draw.random((n, 2 * C)).argsort(1)
    weights = weights.reshape(n, 2 * C)
    weights[rows[:, None], 2 * labels[:, None] + [0, 1]] = 0
    present = np.take_along_axis(weights > 0, order, 1)
    kept = present & (present.cumsum(1) <= P - 2)
    np.put_along_axis(weights, order, np.where(kept, np.take_along_axis(weights, order, 1), 0), 1)
    weights = weights.reshape(n, C, 2)
    shown = draw.integers(0, 2, n)
    weights[rows, labels, 0] = ~single | (shown == 0)
    weights[rows, labels, 1] = ~single | (shown == 1)

    inputs = draw.standard_normal((n, P, d), np.float32) * np.float32(problem.noise / math.sqrt(d))
    places = draw.random((n, P)).argsort(1)
    example, view = weights.reshape(n, 2 * C).nonzero()
    turn = np.arange(len(example)) - np.searchsorted(
        example, example
    )  # the how-manieth view of its example
    strength = weights.reshape(n, 2 * C)[example, view, None].astype(np.float32)
    inputs[example, places[example, turn]] += strength * views.reshape(-1, d)[view]
    return Drawn(inputs.astype(np.float16), labels, single, weights.astype(np.float32))


# The networks -------------------------------------------------------------------------------------------------------


def smoothed_relu(z: Tensor, q: int, rho: float) -> Tensor:
    """0 below 0, z^q / (q rho^(q-1)) up to rho, z - (1 - 1/q) rho above: its slope rises from 0 to 1.  Allen-Zhu & Li,
    section 3."""
    z = z.clamp_min(0)
    return torch.where(z < rho, z**q / (q * rho ** (q - 1)), z - (1 - 1 / q) * rho)


class MultiViewNetwork(nn.Module):
    """F_i(x) = sum over r, p of smoothed_relu(<w_i,r, x_p>), w ~ N(0, scale^2).  [B, P, d] -> float32 [B, C]."""

    def __init__(
        self, classes: int, dimension: int, neurons: int, q: int, rho: float, scale: float
    ):
        super().__init__()
        self.classes, self.q, self.rho = classes, q, rho
        self.weight = nn.Parameter(torch.randn(classes * neurons, dimension) * scale)

    def forward(self, inputs: Tensor) -> Tensor:
        inputs = inputs if torch.is_autocast_enabled(inputs.device.type) else inputs.float()
        responses = smoothed_relu(F.linear(inputs, self.weight).float(), self.q, self.rho)
        return responses.unflatten(2, (self.classes, -1)).sum((1, 3))


def view_correlations(network: MultiViewNetwork, views: np.ndarray) -> Tensor:
    """Phi [C, 2]: Phi_i,l = sum over r of [<w_i,r, v_i,l>]^+, how well class i's neurons know its view l."""
    weights = network.weight.detach().unflatten(0, (network.classes, -1))
    return torch.einsum("crd,cld->crl", weights, torch.as_tensor(views)).clamp_min(0).sum(1)


def views_learned(correlations: Tensor, off_weight: float) -> Tensor:
    """bool [C, 2]: views that count for more than the best known one does in another class's example."""
    return correlations > off_weight * correlations.max()


class RandomFeatures:
    """h_r(x) = sum over p of [<u_r, x_p>]^+, u_r ~ N(0, I), standardised on the examples that it is made with.

    The paper's contrast: features that training does not move.  Their last layer is an nn.Linear.
    """

    def __init__(self, count: int, dimension: int, seed: int, inputs: np.ndarray):
        self.directions = torch.randn(
            count, dimension, generator=torch.Generator().manual_seed(seed)
        )
        self.mean, self.deviation = 0.0, 1.0
        found = self(inputs)
        self.mean, self.deviation = found.mean(0), found.std(0)

    def __call__(self, inputs: np.ndarray) -> np.ndarray:
        """[n, P, d] -> float32 [n, count]"""
        blocks = np.array_split(inputs, -(-len(inputs) // 256))
        sums = [
            F.relu(F.linear(torch.from_numpy(block).float(), self.directions)).sum(1).numpy()
            for block in blocks
        ]
        return (np.concatenate(sums) - self.mean) / self.deviation


# Training and measuring ---------------------------------------------------------------------------------------------


# What students mind.  An ensemble's answer is its mean logits, as in the paper: its members' geometric mean.
RAISE = 0.3
KL_STUDENT = Student(
    temperature=30, soft_weight=2, hard_weight=0.3, label_smoothing=0, mean="geometric"
)
RANDOM_STUDENT = Student(
    temperature=1, soft_weight=1, hard_weight=0, label_smoothing=0, mean="geometric"
)


@dataclass(frozen=True)
class TrainingTask:
    """Full-batch gradient descent: so many steps at this rate."""

    steps: int
    rate: float
    precision: str  # of the products with the inputs; weights are float32


@dataclass(frozen=True)
class Plan:
    """What is done with each seed; all numbers were chosen on other draws than the seeds'."""

    problem: Problem = Problem()
    members: int = MEMBERS
    self_students: int = SELF_STUDENTS  # of as many singles
    kl_students: int = KL_STUDENTS
    neurons: int = 6  # for each class
    q: int = 3  # of smoothed_relu, as rho
    rho: float = 2.0
    scale: float = 0.004  # of the initial weights
    features: int = 240  # random ones: four for each neuron of a network
    network: TrainingTask = TrainingTask(900, 20.0, "bf16")
    student: TrainingTask = TrainingTask(1500, 10.0, "bf16")
    kl_student: TrainingTask = TrainingTask(1500, 24.0, "bf16")
    random: TrainingTask = TrainingTask(1000, 0.1, "fp32")
    test_per_class: int = 200  # of each kind, one view and both


QUICK = Plan(
    Problem(classes=5, dimension=512, patches=8, off_weight_single=0.3, noise=1.0),
    members=6,
    self_students=1,
    kl_students=1,
    neurons=6,
    scale=0.01,
    network=TrainingTask(300, 20.0, "bf16"),
    student=TrainingTask(600, 10.0, "bf16"),
    kl_student=TrainingTask(600, 10.0, "bf16"),
    test_per_class=50,
)


def schedule_of(lesson: TrainingTask, examples: int) -> Schedule:
    """Every step all examples; a constant rate, no momentum, no decay."""
    return Schedule(
        batch_size=examples,
        optimizer="sgd",
        learning_rate=lesson.rate,
        schedule="constant",
        warmup=0.0,
        weight_decay=0.0,
        momentum=0.0,
        beta2=0.999,
        label_smoothing=0.0,
        ema=0.0,
        accumulation=1,
        clip_norm=0.0,
        balance=0.0,
        validate_every=0,
        patience=0,
        checkpoint_every=500,
        keep=1,
        log_every=50,
    )


def trained(
    network: nn.Module,
    shards: InMemory,
    objective: Objective,
    lesson: TrainingTask,
    place: Path,
    ranks: Ranks,
) -> nn.Module:
    """The network after its lesson, by the product's loop; read from `place` where it has had it."""
    written = place / "weights.safetensors"
    if written.exists():
        network.load_state_dict(load_file(written))
        return network.eval()
    place.mkdir(parents=True, exist_ok=True)
    stream = TrainingStream([Source(shards, shuffled(len(shards), 0), len(shards))], 0)
    schedule = schedule_of(lesson, len(shards))
    task = loop.TrainingTask(network, objective, stream, schedule, lesson.steps)
    files = loop.TrainingFiles(place / "checkpoints", place / "metrics.jsonl")
    config = Engine(device="cpu", precision=lesson.precision)
    with closing(build_engine(config, ranks)) as engine:
        network, _ = loop.Trainer(task, engine, ranks, files).train()
    save_file(network.state_dict(), place / ".part")
    (place / ".part").rename(written)
    return network


@torch.no_grad()
def logits_of(network: nn.Module, shards: InMemory) -> Tensor:
    """[n, C], in the order of the shards."""
    return torch.cat([network(batch.inputs) for batch in MeasuringStream(shards, 200).loader()])


def learn_from(logits: Tensor, student: Student) -> Objective:
    """Learn from what K networks say of the training examples, [K, n, C] in the order of their ids."""
    probabilities = F.softmax(logits, 2)
    return distil(lambda batch: probabilities[:, batch.ids], student)


def raise_to(logits: Tensor, weight: float = RAISE) -> Objective:
    """Cross-entropy with the labels + weight mean_b sum_i [teacher_bi - student_bi]_+^2 / 2 of the logits.

    logits: K networks' of the training examples, [K, n, C] in the order of their ids; their mean teaches.  A view that
    only the student knows is left to it, as the teacher's silence is not held against it.
    """
    mean = logits.mean(0)

    def objective(network: nn.Module, batch) -> Tensor:
        found = network(batch.inputs)
        lacking = (mean[batch.ids] - found).clamp_min(0)
        return (
            classification_loss(found, batch.labels) + weight * lacking.square().sum(1).mean() / 2
        )

    return objective


def errors_of(logits: Tensor, drawn: Drawn) -> dict[str, float]:
    """Of [n, C]: the shares of errors among the examples with both views ("multi") and with one ("single")."""
    wrong = logits.argmax(1).numpy() != drawn.labels
    return {
        "multi": float(wrong[~drawn.single].mean()),
        "single": float(wrong[drawn.single].mean()),
    }


def in_units_of_mu(errors: dict[str, float], mu: float) -> float:
    """The error of examples of which a share mu show one view, over mu."""
    return errors["multi"] * (1 - mu) / mu + errors["single"]


class Laboratory:
    """One seed's data and all that is trained on it; what is done lies in `place` and is not done again."""

    def __init__(self, plan: Plan, seed: int, place: Path, ranks: Ranks):
        self.plan, self.seed, self.place, self.ranks = plan, seed, place, ranks
        place.mkdir(parents=True, exist_ok=True)
        students = {
            "kl": KL_STUDENT.model_dump(),
            "random": RANDOM_STUDENT.model_dump(),
            "raise": RAISE,
        }
        asked = asdict(plan) | {"seed": seed, "students": students}
        if self.part("plan", lambda: {"plan": asked})["plan"] != asked:
            raise UserError(
                f"{place} holds another plan's results, see its plan.json; take another --to"
            )
        problem = plan.problem
        self.views = orthonormal_views(problem, self.draw("views"))
        each, mu = problem.per_class, problem.single_share
        self.taught = draw_examples(problem, self.views, each, mu, self.draw("training"))
        self.asked = draw_examples(
            problem, self.views, 2 * plan.test_per_class, 0.5, self.draw("test")
        )
        self.shards = InMemory(self.taught.inputs, self.taught.labels)
        self.test = InMemory(self.asked.inputs, self.asked.labels, "test")

    def results(self) -> dict[str, list[dict]]:
        """{a name of NAMES: the figures of each network, or ensemble, of that name}."""
        members, students = range(self.plan.members), range(self.plan.self_students)
        by_kl = range(self.plan.kl_students)
        work = {
            "single": [lambda m=m: self.figures(self.single(m)) for m in members],
            "ensemble": [lambda: self.measured(self.say(members, self.test), self.say(members))],
            "distilled": [lambda: self.figures(self.student("distilled", 0, self.say(members)))],
            "self": [
                lambda k=k: self.figures(self.student("self", k, self.say([k]))) for k in students
            ],
            "distilled_kl": [
                lambda: self.figures(self.kl_student("distilled_kl", 0, self.say(members)))
            ],
            "self_kl": [
                lambda k=k: self.figures(self.kl_student("self_kl", k, self.say([k])))
                for k in by_kl
            ],
            "random_to_network": [
                lambda: self.figures(self.student("random_to_network", 0, self.say_randoms()))
            ],
        }
        found = {
            name: [self.part(f"{name}-{k}", each) for k, each in enumerate(rows)]
            for name, rows in work.items()
        }
        found |= self.part("random", self.control)
        return {name: found[name] for name in NAMES}

    def part(self, name: str, work: Callable[[], dict]) -> dict:
        """What `work` finds; read from place/NAME.json where it was found before."""

        def timed() -> dict:
            began = time.process_time()
            found = work()
            return found | {"cpu_s": round(time.process_time() - began, 1)}

        return lab.once(self.place / f"{name}.json", timed)

    def draw(self, name: str, number: int = 0) -> int:
        """A seed of its own for each network and each draw of data."""
        return int(np.random.SeedSequence([self.seed, *name.encode(), number]).generate_state(1)[0])

    # The paper's network.

    def single(self, number: int) -> MultiViewNetwork:
        return self.network("single", number, classify(), self.plan.network)

    def student(self, name: str, number: int, teachers: Tensor) -> MultiViewNetwork:
        """Of new initial weights."""
        return self.network(name, number, raise_to(teachers), self.plan.student)

    def kl_student(self, name: str, number: int, teachers: Tensor) -> MultiViewNetwork:
        return self.network(name, number, learn_from(teachers, KL_STUDENT), self.plan.kl_student)

    def network(
        self, name: str, number: int, objective: Objective, lesson: TrainingTask
    ) -> MultiViewNetwork:
        plan, problem = self.plan, self.plan.problem
        torch.manual_seed(self.draw(name, number))
        network = MultiViewNetwork(
            problem.classes, problem.dimension, plan.neurons, plan.q, plan.rho, plan.scale
        )
        return trained(
            network, self.shards, objective, lesson, self.place / f"{name}-{number}", self.ranks
        )

    def say(self, members, shards: InMemory | None = None) -> Tensor:
        """[K, n, C]: single networks' logits, of the training examples by default."""
        return torch.stack(
            [logits_of(self.single(number), shards or self.shards) for number in members]
        )

    def figures(self, network: MultiViewNetwork) -> dict:
        """Errors, and how many classes the network knows by none, one, both of their views."""
        phi = view_correlations(network, self.views)
        learned = views_learned(phi, self.plan.problem.off_weight)
        return self.measured(
            logits_of(network, self.test)[None], logits_of(network, self.shards)[None]
        ) | {
            "classes_by_views": torch.bincount(learned.sum(1), minlength=3).tolist(),
            "correlations": phi.tolist(),
        }

    def measured(self, on_test: Tensor, on_training: Tensor) -> dict:
        """Errors of the mean of [K, n, C] logits."""
        test = errors_of(on_test.mean(0), self.asked)
        error = in_units_of_mu(test, self.plan.problem.single_share)
        return {
            "error": error,
            "test": test,
            "training": errors_of(on_training.mean(0), self.taught),
        }

    # The control.

    def control(self) -> dict[str, list[dict]]:
        members = range(self.plan.members)
        ones = [self.last_layer("random", number, classify(), number) for number in members]
        teachers, on_test = (torch.stack(each) for each in zip(*ones, strict=True))
        objective = learn_from(teachers, RANDOM_STUDENT)
        students = [
            self.last_layer("random_distilled", number, objective, number)
            for number in range(self.plan.self_students)
        ]
        return {
            "random": [self.measured(test[None], training[None]) for training, test in ones],
            "random_ensemble": [self.measured(on_test, teachers)],
            "random_distilled": [
                self.measured(test[None], training[None]) for training, test in students
            ],
        }

    def last_layer(
        self, name: str, number: int, objective: Objective, features: int
    ) -> tuple[Tensor, Tensor]:
        """Logits [n, C] of the training and the test examples; the last layer over these fixed features starts at 0."""
        plan = self.plan
        seed = self.draw("features", features)
        fixed = RandomFeatures(plan.features, plan.problem.dimension, seed, self.taught.inputs)
        taught, asked = (
            InMemory(fixed(drawn.inputs), drawn.labels) for drawn in (self.taught, self.asked)
        )
        head = nn.Linear(plan.features, plan.problem.classes)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        head = trained(
            head, taught, objective, plan.random, self.place / f"{name}-{number}", self.ranks
        )
        return logits_of(head, taught), logits_of(head, asked)

    def say_randoms(self) -> Tensor:
        """[K, n, C]: the members' logits of the training examples."""
        members = range(self.plan.members)
        return torch.stack(
            [self.last_layer("random", number, classify(), number)[0] for number in members]
        )


# The table ----------------------------------------------------------------------------------------------------------


def of_seed(rows: list[dict], key: Callable[[dict], float]) -> float:
    return statistics.mean(map(key, rows))


def views_of(results: list[dict], name: str) -> str:
    """How many classes its networks know by none, one and both views, the mean."""
    rows = [row for each in results for row in each[name]]
    if "classes_by_views" not in rows[0]:
        return "-"
    return " / ".join(
        f"{statistics.mean(row['classes_by_views'][k] for row in rows):.1f}" for k in range(3)
    )


def table_of(results: list[dict]) -> str:
    """A row for each of NAMES: means over a seed's networks, of which mean and deviation over seeds."""
    columns = {
        "test error / mu": lambda row: row["error"],
        "test, both views": lambda row: row["test"]["multi"],
        "training, both views": lambda row: row["training"]["multi"],
        "training, one view": lambda row: row["training"]["single"],
    }
    lines = []
    for name, words in NAMES.items():
        cells = [
            lab.spread([of_seed(each[name], key) for each in results]) for key in columns.values()
        ]
        lines.append([words, cells[0], PAPER[name], views_of(results, name), *cells[1:]])
    first, *others = columns
    return lab.table(
        ["", first, "the paper", "classes known by no / one / both views", *others], lines
    )


def verdicts(results: list[dict]) -> list[str]:
    """What is asked, of the means over seeds."""
    mean = {
        name: statistics.mean(of_seed(each[name], lambda row: row["error"]) for each in results)
        for name in NAMES
    }
    # The control's students share the features of its first members.
    gain = mean["random"] - mean["random_ensemble"]
    kept = (
        statistics.mean(
            own["error"] - student["error"]
            for each in results
            for own, student in zip(each["random"], each["random_distilled"], strict=False)
        )
        / gain
        if gain > 0
        else math.nan
    )
    return [
        f"{words}: {'yes' if holds else 'no'} ({figure:.3f})."
        for words, figure, holds in [
            ("One network within 20 % of 0.5 mu", mean["single"], 0.4 <= mean["single"] <= 0.6),
            ("Ensemble below 0.05 mu", mean["ensemble"], mean["ensemble"] < 0.05),
            ("Its student by KL below 0.05 mu", mean["distilled_kl"], mean["distilled_kl"] < 0.05),
            ("Its student, raised, below 0.05 mu", mean["distilled"], mean["distilled"] < 0.05),
            ("Self-distillation by KL below 0.35 mu", mean["self_kl"], mean["self_kl"] < 0.35),
            ("Self-distillation, raised, below 0.35 mu", mean["self"], mean["self"] < 0.35),
            (
                "Random features: students keep less than a twentieth of their ensemble's gain",
                kept,
                kept < 0.05,
            ),
        ]
    ]


def main() -> None:
    parser = lab.arguments(__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="a smaller problem and four members: a look, no result"
    )
    asked = parser.parse_args()
    plan = QUICK if asked.quick else Plan()
    results = []
    with process_group(Engine(device="cpu")) as ranks:
        for seed in asked.seeds:
            results.append(Laboratory(plan, seed, asked.to / f"seed-{seed}", ranks).results())
            print(table_of(results[-1:]), flush=True)
    command = "python -m benchmarks.papers.multiview " + shlex.join(sys.argv[1:])
    lines = "\n".join(f"* {line}" for line in verdicts(results))
    text = "\n\n".join([table_of(results), lines, lab.conditions(asked.seeds, command)])
    print(text)
    if asked.write:
        lab.write_section(TITLE, text)


if __name__ == "__main__":
    main()
