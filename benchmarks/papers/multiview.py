"""Allen-Zhu & Li 2020, their data and network: an ensemble's gain, and what students keep of it.

    python -m benchmarks.papers.multiview --to runs/papers/multiview --write  45 minutes
    python -m benchmarks.papers.multiview --to DIR --seeds 0 --small  a look, no result
    python -m benchmarks.papers.multiview --quick  seconds, no result

Each class has two features, its views. Almost every example shows both, a share mu only one.  One
view is enough for most, and a network learns one view of each class and knows by heart what that
leaves: it fails on half of the new examples that show one view, 0.5 mu of all.  Networks of other
initial weights know other views, their ensemble both.

For each seed, all on one draw of data, by full-batch gradient descent: MEMBERS single networks.
Their ensemble. Its student. Students of one network each (self-distillation), and the control,
fixed random features whose last layer alone is learned: MEMBERS of them, their ensemble, its
students among them, and the paper's network as its student.  All that is done lies under --to and
is not done again.

Students of two kinds, both beside the labels: by KL at T = 30, the usual distillation, and raised
to their teachers' logits (raise_to) where theirs are lower.  KL pulls logits down as well: from one
teacher it hands on that teacher's views and takes from the student its own.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.in_memory import InMemory
from pipeline.config import Engine, ResolvedSchedule, ResolvedStudent, UserError
from trainer.core.loop import Trainer, TrainingFiles, TrainingTask
from trainer.core.losses import classification_loss
from trainer.core.objectives import Objective, classify, distil
from trainer.data.streams import Batch, MeasuringStream, Source, TrainingStream, shuffled
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


# The data


@dataclass(frozen=True)
class Problem:
    """The distribution of Allen-Zhu & Li, section 3, of a size that one core can do.

    Theirs is for k to infinity.  An example has its label's views, weight 1 each. Every view of
    another class with probability off_classes / C, with weight off_weight (off_weight_single where
    the example shows one view). Each of them in a patch of its own, and Gaussian noise of norm
    `noise` in every patch.

    With 60 examples of each class, one of which shows one view: from several such, a network learns
    the second view before it knows them by heart.
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
    """Examples and what is in them.

    inputs: float16 [n, P, d].  labels: int64 [n].  single: bool [n], one view only.
    weights: float32 [n, C, 2], of every view in the example, 0 where it is absent.
    """

    inputs: np.ndarray
    labels: np.ndarray
    single: np.ndarray
    weights: np.ndarray


def orthonormal_views(problem: Problem, seed: int) -> np.ndarray:
    """float32 [C, 2, d]: the 2 C views, orthonormal, directions drawn evenly."""
    rng = np.random.default_rng([seed, 0])
    basis, _ = np.linalg.qr(rng.standard_normal((problem.dimension, 2 * problem.classes)))
    return np.ascontiguousarray(basis.T, np.float32).reshape(problem.classes, 2, problem.dimension)


def draw_examples(
    problem: Problem, views: np.ndarray, per_class: int, single_share: float, seed: int
) -> Drawn:
    """per_class examples of each class, round(single_share per_class) of them with one view.

    Each of its class's views is as likely to be that one.
    """
    rng = np.random.default_rng([seed, 1])
    n = per_class * problem.classes
    rows, labels = np.arange(n), np.arange(n) % problem.classes
    single = rows // problem.classes < round(single_share * per_class)
    weights = draw_weights(problem, labels, single, rng)

    P, d = problem.patches, problem.dimension
    inputs = rng.standard_normal((n, P, d), np.float32) * np.float32(problem.noise / math.sqrt(d))
    patches = rng.random((n, P)).argsort(1)
    flat = weights.reshape(n, -1)
    example, view = flat.nonzero()
    # Which of its example's views each one is: the first, the second, ...
    turn = np.arange(len(example)) - np.searchsorted(example, example)
    strength = flat[example, view, None].astype(np.float32)
    inputs[example, patches[example, turn]] += strength * views.reshape(-1, d)[view]
    return Drawn(inputs.astype(np.float16), labels, single, weights.astype(np.float32))


def draw_weights(
    problem: Problem, labels: np.ndarray, single: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """[n, C, 2]: the weight of every view in each example.

    Where more views of other classes are drawn than there are patches beside the label's two, the
    last of a random order are left out: one example in some thousands has so many.
    """
    n, C = len(labels), problem.classes
    rows = np.arange(n)
    weights = np.where(single[:, None, None], problem.off_weight_single, problem.off_weight)
    weights = weights * (rng.random((n, C, 2)) < problem.off_classes / C)
    order = rng.random((n, 2 * C)).argsort(1)
    flat = weights.reshape(n, 2 * C)
    flat[rows, 2 * labels] = 0
    flat[rows, 2 * labels + 1] = 0
    ordered = np.take_along_axis(flat, order, 1)
    fits = (ordered > 0).cumsum(1) <= problem.patches - 2
    np.put_along_axis(flat, order, np.where(fits, ordered, 0), 1)
    weights = flat.reshape(n, C, 2)
    shown = rng.integers(0, 2, n)
    weights[rows, labels, 0] = ~single | (shown == 0)
    weights[rows, labels, 1] = ~single | (shown == 1)
    return weights


# The networks


def smoothed_relu(z: Tensor, q: int, rho: float) -> Tensor:
    """0 below 0, z^q / (q rho^(q-1)) up to rho, z - (1 - 1/q) rho above.

    Its slope rises from 0 to 1.  Allen-Zhu & Li, section 3.
    """
    z = z.clamp_min(0)
    return torch.where(z < rho, z**q / (q * rho ** (q - 1)), z - (1 - 1 / q) * rho)


class MultiViewNetwork(nn.Module):
    """F_i(x) = sum over r, p of smoothed_relu(<w_i,r, x_p>), w ~ N(0, scale^2).

    [B, P, d] -> float32 [B, C].
    """

    def __init__(
        self, classes: int, dimension: int, neurons: int, q: int, rho: float, scale: float
    ):
        super().__init__()
        self.classes, self.q, self.rho = classes, q, rho
        self.weight = nn.Parameter(torch.randn(classes * neurons, dimension) * scale)

    def forward(self, inputs: Tensor) -> Tensor:
        if not torch.is_autocast_enabled(inputs.device.type):
            inputs = inputs.float()
        responses = smoothed_relu(F.linear(inputs, self.weight).float(), self.q, self.rho)
        return responses.unflatten(2, (self.classes, -1)).sum((1, 3))


def view_correlations(network: MultiViewNetwork, views: np.ndarray) -> Tensor:
    """Phi [C, 2]: sum over r of [<w_i,r, v_i,l>]^+, how well class i's neurons know its view l."""
    weights = network.weight.detach().unflatten(0, (network.classes, -1))
    return torch.einsum("crd,cld->crl", weights, torch.as_tensor(views)).clamp_min(0).sum(1)


def views_learned(correlations: Tensor, off_weight: float) -> Tensor:
    """bool [C, 2]: views that count for more than the best known one in another class's example."""
    return correlations > off_weight * correlations.max()


class RandomFeatures:
    """h_r(x) = sum over p of [<u_r, x_p>]^+, u_r ~ N(0, I), standardised on the given examples.

    The paper's contrast: features that training does not move.  Their last layer is an nn.Linear.
    """

    def __init__(self, count: int, dimension: int, seed: int, inputs: np.ndarray):
        generator = torch.Generator().manual_seed(seed)
        self.directions = torch.randn(count, dimension, generator=generator)
        self.mean, self.deviation = 0.0, 1.0
        features = self(inputs)
        self.mean, self.deviation = features.mean(0), features.std(0)

    def __call__(self, inputs: np.ndarray) -> np.ndarray:
        """[n, P, d] -> float32 [n, count]"""
        blocks = np.array_split(inputs, -(-len(inputs) // 256))
        sums = [
            F.relu(F.linear(torch.from_numpy(block).float(), self.directions)).sum(1).numpy()
            for block in blocks
        ]
        return (np.concatenate(sums) - self.mean) / self.deviation


# Training and measuring

# What students mind.  An ensemble predicts its mean logits, as in the paper: its members' geometric
# mean.
RAISE = 0.3
KL_STUDENT = ResolvedStudent(temperature=30, soft_weight=2, hard_weight=0.3, mean="geometric")
RANDOM_STUDENT = ResolvedStudent(temperature=1, soft_weight=1, hard_weight=0, mean="geometric")


@dataclass(frozen=True)
class Descent:
    """Full-batch gradient descent: so many steps at this rate."""

    steps: int
    rate: float
    precision: Literal["bf16", "fp32"]  # of the products with the inputs. Weights are float32


@dataclass(frozen=True)
class Plan:
    """What is done with each seed. All numbers were chosen on other draws than the seeds'."""

    problem: Problem = Problem()
    members: int = MEMBERS
    self_students: int = SELF_STUDENTS  # of as many singles
    kl_students: int = KL_STUDENTS
    neurons: int = 6  # for each class
    q: int = 3  # of smoothed_relu, as rho
    rho: float = 2.0
    scale: float = 0.004  # of the initial weights
    features: int = 240  # random ones: four for each neuron of a network
    network: Descent = Descent(900, 20.0, "bf16")
    student: Descent = Descent(1500, 10.0, "bf16")
    kl_student: Descent = Descent(1500, 24.0, "bf16")
    random: Descent = Descent(1000, 0.1, "fp32")
    test_per_class: int = 200  # of each kind, one view and both


SMALL = Plan(
    Problem(classes=5, dimension=512, patches=8, off_weight_single=0.3, noise=1.0),
    members=6,
    self_students=1,
    kl_students=1,
    neurons=6,
    scale=0.01,
    network=Descent(300, 20.0, "bf16"),
    student=Descent(600, 10.0, "bf16"),
    kl_student=Descent(600, 10.0, "bf16"),
    test_per_class=50,
)
QUICK = replace(
    SMALL,
    problem=replace(SMALL.problem, classes=3, dimension=128, per_class=30, single_share=1 / 30),
    members=2,
    features=16,
    network=Descent(30, 20.0, "bf16"),
    student=Descent(30, 10.0, "bf16"),
    kl_student=Descent(30, 10.0, "bf16"),
    random=Descent(30, 0.1, "fp32"),
    test_per_class=10,
)


def schedule_of(descent: Descent, examples: int) -> ResolvedSchedule:
    """Every step all examples. A constant rate, no momentum, no decay."""
    return ResolvedSchedule(
        batch_size=examples,
        optimizer="sgd",
        learning_rate=descent.rate,
        schedule="constant",
        warmup=0.0,
        weight_decay=0.0,
        momentum=0.0,
        keep=1,
    )


def train(
    network: nn.Module,
    shards: InMemory,
    objective: Objective,
    descent: Descent,
    path: Path,
    ranks: Ranks,
) -> nn.Module:
    """The trained network, by the product's loop. Read from `path` where it was trained before."""
    weights = path / "weights.safetensors"
    if weights.exists():
        network.load_state_dict(load_file(weights))
        return network.eval()
    path.mkdir(parents=True, exist_ok=True)
    stream = TrainingStream([Source(shards, shuffled(len(shards), 0), len(shards))], 0)
    schedule = schedule_of(descent, len(shards))
    task = TrainingTask(network, objective, stream, schedule, descent.steps)
    files = TrainingFiles(path / "checkpoints", path / "metrics.jsonl")
    config = Engine(device="cpu", precision=descent.precision)
    with closing(build_engine(config, ranks)) as engine:
        network, _ = Trainer(task, engine, ranks, files).train()
    save_file(network.state_dict(), path / ".part")
    (path / ".part").rename(weights)
    return network


@torch.no_grad()
def logits_of(network: nn.Module, shards: InMemory) -> Tensor:
    """[n, C], in the order of the shards."""
    return torch.cat([network(batch.inputs) for batch in MeasuringStream(shards, 200).loader()])


def learn_from(logits: Tensor, student: ResolvedStudent) -> Objective:
    """Learn K networks' predictions of the training examples, [K, n, C] in order of their ids."""
    probabilities = F.softmax(logits, 2)
    return distil(lambda batch: probabilities[:, batch.ids], student)


def raise_to(logits: Tensor, weight: float = RAISE) -> Objective:
    """Cross-entropy with the labels + weight mean_b sum_i [teacher_bi - student_bi]_+^2 / 2.

    logits: K networks' of the training examples, [K, n, C] in the order of their ids. Their mean
    teaches.  A view that only the student knows is left to it, as the teacher's silence is not held
    against it.
    """
    mean = logits.mean(0)

    def objective(network: nn.Module, batch: Batch) -> Tensor:
        own = network(batch.inputs)
        lacking = (mean[batch.ids] - own).clamp_min(0)
        raised = lacking.square().sum(1).mean() / 2
        return classification_loss(own, batch.labels) + weight * raised

    return objective


def errors_of(logits: Tensor, drawn: Drawn) -> dict[str, float]:
    """Of [n, C]: the shares of errors where both views are shown ("multi") and one ("single")."""
    wrong = logits.argmax(1).numpy() != drawn.labels
    return {
        "multi": float(wrong[~drawn.single].mean()),
        "single": float(wrong[drawn.single].mean()),
    }


def in_units_of_mu(errors: dict[str, float], mu: float) -> float:
    """The error of examples of which a share mu show one view, over mu."""
    return errors["multi"] * (1 - mu) / mu + errors["single"]


class Laboratory:
    """One seed's data and all that is trained on it. What is done lies in `path` and is kept."""

    def __init__(self, plan: Plan, seed: int, path: Path, ranks: Ranks):
        self.plan, self.seed, self.path, self.ranks = plan, seed, path, ranks
        path.mkdir(parents=True, exist_ok=True)
        self._check_plan()
        problem = plan.problem
        self.views = orthonormal_views(problem, self.seed_of("views"))
        self.drawn = draw_examples(
            problem,
            self.views,
            problem.per_class,
            problem.single_share,
            self.seed_of("training"),
        )
        self.drawn_test = draw_examples(
            problem, self.views, 2 * plan.test_per_class, 0.5, self.seed_of("test")
        )
        self.shards = InMemory(self.drawn.inputs, self.drawn.labels)
        self.test = InMemory(self.drawn_test.inputs, self.drawn_test.labels, "test")

    def _check_plan(self) -> None:
        students = {
            "kl": KL_STUDENT.model_dump(exclude_unset=True),
            "random": RANDOM_STUDENT.model_dump(exclude_unset=True),
            "raise": RAISE,
        }
        settings = asdict(self.plan) | {"seed": self.seed, "students": students}
        if self.part("plan", lambda: {"plan": settings})["plan"] != settings:
            raise UserError(
                f"{self.path} holds another plan's results, see its plan.json; take another --to"
            )

    def results(self) -> dict[str, list[dict]]:
        """{a name of NAMES: the metrics of each network, or ensemble, of that name}."""
        members = range(self.plan.members)
        work: dict[str, list[Callable[[], dict]]] = {
            "single": [lambda m=m: self.metrics(self.single(m)) for m in members],
            "ensemble": [
                lambda: self.measured(self.logits(members, self.test), self.logits(members))
            ],
            "distilled": [lambda: self.metrics(self.student("distilled", 0, self.logits(members)))],
            "self": [
                lambda k=k: self.metrics(self.student("self", k, self.logits([k])))
                for k in range(self.plan.self_students)
            ],
            "distilled_kl": [
                lambda: self.metrics(self.kl_student("distilled_kl", 0, self.logits(members)))
            ],
            "self_kl": [
                lambda k=k: self.metrics(self.kl_student("self_kl", k, self.logits([k])))
                for k in range(self.plan.kl_students)
            ],
            "random_to_network": [
                lambda: self.metrics(self.student("random_to_network", 0, self.random_logits()))
            ],
        }
        rows = {
            name: [self.part(f"{name}-{k}", each) for k, each in enumerate(tasks)]
            for name, tasks in work.items()
        }
        rows |= self.part("random", self.control)
        return {name: rows[name] for name in NAMES}

    def part(self, name: str, work: Callable[[], dict]) -> dict:
        """What `work` returns. Read from path/NAME.json where it was computed before."""

        def timed() -> dict:
            began = time.process_time()
            return work() | {"cpu_s": round(time.process_time() - began, 1)}

        return lab.once(self.path / f"{name}.json", timed)

    def seed_of(self, name: str, index: int = 0) -> int:
        """A seed of its own for each network and each draw of data."""
        entropy = [self.seed, *name.encode(), index]
        return int(np.random.SeedSequence(entropy).generate_state(1)[0])

    # The paper's network

    def single(self, index: int) -> MultiViewNetwork:
        return self.network("single", index, classify(), self.plan.network)

    def student(self, name: str, index: int, teachers: Tensor) -> MultiViewNetwork:
        """Of new initial weights."""
        return self.network(name, index, raise_to(teachers), self.plan.student)

    def kl_student(self, name: str, index: int, teachers: Tensor) -> MultiViewNetwork:
        return self.network(name, index, learn_from(teachers, KL_STUDENT), self.plan.kl_student)

    def network(
        self, name: str, index: int, objective: Objective, descent: Descent
    ) -> MultiViewNetwork:
        plan, problem = self.plan, self.plan.problem
        torch.manual_seed(self.seed_of(name, index))
        fresh = MultiViewNetwork(
            problem.classes, problem.dimension, plan.neurons, plan.q, plan.rho, plan.scale
        )
        path = self.path / f"{name}-{index}"
        network = train(fresh, self.shards, objective, descent, path, self.ranks)
        assert isinstance(network, MultiViewNetwork)
        return network

    def logits(self, members: Iterable[int], shards: InMemory | None = None) -> Tensor:
        """[K, n, C]: single networks' logits, of the training examples by default."""
        shards = shards or self.shards
        return torch.stack([logits_of(self.single(index), shards) for index in members])

    def metrics(self, network: MultiViewNetwork) -> dict:
        """Errors, and how many classes the network knows by none, one, both of their views."""
        phi = view_correlations(network, self.views)
        learned = views_learned(phi, self.plan.problem.off_weight)
        on_test, on_training = (
            logits_of(network, shards)[None] for shards in (self.test, self.shards)
        )
        return self.measured(on_test, on_training) | {
            "classes_by_views": torch.bincount(learned.sum(1), minlength=3).tolist(),
            "correlations": phi.tolist(),
        }

    def measured(self, on_test: Tensor, on_training: Tensor) -> dict:
        """Errors of the mean of [K, n, C] logits."""
        test = errors_of(on_test.mean(0), self.drawn_test)
        return {
            "error": in_units_of_mu(test, self.plan.problem.single_share),
            "test": test,
            "training": errors_of(on_training.mean(0), self.drawn),
        }

    # The control

    def control(self) -> dict[str, list[dict]]:
        members = range(self.plan.members)
        ones = [self.last_layer("random", index, classify()) for index in members]
        teachers, on_test = (torch.stack(each) for each in zip(*ones, strict=True))
        objective = learn_from(teachers, RANDOM_STUDENT)
        students = [
            self.last_layer("random_distilled", index, objective)
            for index in range(self.plan.self_students)
        ]

        def measured(pairs: list[tuple[Tensor, Tensor]]) -> list[dict]:
            return [self.measured(test[None], training[None]) for training, test in pairs]

        return {
            "random": measured(ones),
            "random_ensemble": [self.measured(on_test, teachers)],
            "random_distilled": measured(students),
        }

    def last_layer(self, name: str, index: int, objective: Objective) -> tuple[Tensor, Tensor]:
        """Logits [n, C] of the training and the test examples.

        The last layer, over the fixed features of member `index`, starts at 0.
        """
        plan = self.plan
        seed = self.seed_of("features", index)
        fixed = RandomFeatures(plan.features, plan.problem.dimension, seed, self.drawn.inputs)
        training, test = (
            InMemory(fixed(drawn.inputs), drawn.labels) for drawn in (self.drawn, self.drawn_test)
        )
        head = nn.Linear(plan.features, plan.problem.classes)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        path = self.path / f"{name}-{index}"
        trained = train(head, training, objective, plan.random, path, self.ranks)
        return logits_of(trained, training), logits_of(trained, test)

    def random_logits(self) -> Tensor:
        """[K, n, C]: the members' logits of the training examples."""
        members = range(self.plan.members)
        return torch.stack([self.last_layer("random", index, classify())[0] for index in members])


# The table


def mean_of(rows: list[dict], key: Callable[[dict], float]) -> float:
    return statistics.mean(map(key, rows))


def views_of(results: list[dict], name: str) -> str:
    """How many classes its networks know by none, one and both views, the mean."""
    rows = [row for of_seed in results for row in of_seed[name]]
    if "classes_by_views" not in rows[0]:
        return "-"
    means = [mean_of(rows, lambda row, k=k: row["classes_by_views"][k]) for k in range(3)]
    return " / ".join(f"{mean:.1f}" for mean in means)


def table_of(results: list[dict]) -> str:
    """A row for each of NAMES: mean and deviation over seeds of means over a seed's networks."""
    columns: dict[str, Callable[[dict], float]] = {
        "test error / mu": lambda row: row["error"],
        "test, both views": lambda row: row["test"]["multi"],
        "training, both views": lambda row: row["training"]["multi"],
        "training, one view": lambda row: row["training"]["single"],
    }
    lines = []
    for name, words in NAMES.items():
        cells = [
            lab.spread([mean_of(of_seed[name], key) for of_seed in results])
            for key in columns.values()
        ]
        lines.append([words, cells[0], PAPER[name], views_of(results, name), *cells[1:]])
    first, *others = columns
    header = ["", first, "the paper", "classes known by no / one / both views", *others]
    return lab.table(header, lines)


def kept_by_random_students(results: list[dict], gain: float) -> float:
    """The fraction of the random features' gain that students keep. NaN where there is none.

    A student has the features of the member whose number it has.
    """
    if gain <= 0:
        return math.nan
    leads = []
    for of_seed in results:
        pairs = zip(of_seed["random"], of_seed["random_distilled"], strict=False)
        leads += [own["error"] - student["error"] for own, student in pairs]
    return statistics.mean(leads) / gain


def verdicts(results: list[dict]) -> list[str]:
    """What is asked, of the means over seeds."""
    mean = {
        name: statistics.mean(
            mean_of(of_seed[name], lambda row: row["error"]) for of_seed in results
        )
        for name in NAMES
    }
    kept = kept_by_random_students(results, mean["random"] - mean["random_ensemble"])
    lowest = {
        "Ensemble below 0.05 mu": ("ensemble", 0.05),
        "Its student by KL below 0.05 mu": ("distilled_kl", 0.05),
        "Its student, raised, below 0.05 mu": ("distilled", 0.05),
        "Self-distillation by KL below 0.35 mu": ("self_kl", 0.35),
        "Self-distillation, raised, below 0.35 mu": ("self", 0.35),
    }
    single = mean["single"]
    bars = [("One network within 20 % of 0.5 mu", single, 0.4 <= single <= 0.6)]
    bars += [(words, mean[name], mean[name] < bar) for words, (name, bar) in lowest.items()]
    words = "Random features: students keep less than a twentieth of their ensemble's gain"
    bars.append((words, kept, kept < 0.05))
    return [f"{words}: {'yes' if holds else 'no'} ({value:.3f})." for words, value, holds in bars]


def main(words: list[str] | None = None) -> None:
    parser = lab.arguments(__doc__)
    parser.add_argument(
        "--small", action="store_true", help="a smaller problem and six members: a look, no result"
    )
    options = lab.parsed(parser, words)
    plan = Plan()
    if options.small:
        plan = SMALL
    if options.quick:
        plan = QUICK
    results = []
    with process_group(Engine(device="cpu")) as ranks:
        for seed in options.seeds:
            results.append(Laboratory(plan, seed, options.to / f"seed-{seed}", ranks).results())
            print(table_of(results[-1:]), flush=True)
    command = lab.command_line("benchmarks.papers.multiview", words)
    judged = verdicts(results)
    lines = "\n".join(f"* {line}" for line in judged)
    text = "\n\n".join([table_of(results), lines, lab.conditions(options.seeds, command)])
    print(text)
    if options.write:
        lab.write_section(TITLE, text)
    errors = {
        name: [[row["error"] for row in of_seed[name]] for of_seed in results] for name in NAMES
    }
    lab.print_json({"error_over_mu": errors, "verdicts": judged}, options, command)


if __name__ == "__main__":
    main()
