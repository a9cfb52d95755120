"""From a summary of the data and of the machine to a config: pure functions, a reason for each key.

The rules are meant for a first run: small enough to end, large enough to learn, and each with a
reason that a newcomer can argue with.  docs/recipe.md has what was measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from .data_summary import DataSummary

GIB = 2**30
FLOAT = 4  # bytes
# Multiply-adds that the generalist's training may take in forward passes: minutes, not hours.
# Measured: 1e12 and their backward passes took 1.0 (mlp of naics) to 2.2 (convnet of MNIST) minutes
# of a CPU core, torch 2.13.  The GPU's is a guess: none was there.
CORE_BUDGET = 4e12
GPU_BUDGET = 3e14
LEAST_STEPS = 400  # below, hardly any network has learned what few examples can teach
VALIDATIONS = 8  # of a training
CACHED_BYTES = 2 * GIB  # data.cache_bytes: a split that fits is decoded once
MANY_CLASSES = 1_000
HUGE_CLASSES = 5_000
LARGEST_GROUP = 200
IMBALANCE = 10  # the most frequent class against the rarest, from which training is balanced
STORED_VIEWS = 2_000_000  # answers of the teacher that are stored, a few hundred bytes each
BAG_BINS = 8_192  # of the decoder ngram_bag
BAG_EMBEDDING = 64
SMALL_SIDE = 12  # smaller pictures have no room to be shifted
PHOTO_SIDE = 96  # larger pictures are halved more often than a CIFAR-like ResNet does


@dataclass(frozen=True)
class Hardware:
    """What the run will have.

    cores: that this process may use.  memory: bytes that are free, of the first GPU where there
    is one, else of this machine.  gpus: their names.
    """

    cores: int
    memory: int
    gpus: tuple[str, ...] = ()

    @property
    def budget(self) -> float:
        """Multiply-adds for the generalist."""
        if self.gpus:
            return GPU_BUDGET * len(self.gpus)
        return CORE_BUDGET * self.cores


@dataclass(frozen=True)
class Setting:
    """One key of the config, "section.key", its value, and why it has it."""

    key: str
    value: Any
    why: str

    @property
    def section(self) -> str:
        return self.key.rpartition(".")[0]


@dataclass(frozen=True)
class Network:
    """[model], why, and what it costs.

    weights: with the layer to the classes.  multiply_adds: of one example's forward pass.
    activations: numbers of one example that the backward pass needs.
    """

    name: str
    width: int
    depth: int
    embedding: int
    dropout: float
    why: str
    weights: int
    multiply_adds: float
    activations: int


def propose(data: DataSummary, hardware: Hardware) -> list[Setting]:
    """Every key of the config, in the order in which it is written."""
    network = choose_network(data, hardware)
    ranks = choose_ranks(data, hardware)
    batch = choose_batch(data, hardware, network, ranks)
    epochs = choose_epochs(data, hardware, network, batch)
    return [
        Setting("seed", 0, "of the weights, the order of examples and the groups"),
        *data_settings(data, hardware),
        *model_settings(network),
        *train_settings(data, network, batch, epochs),
        *cluster_settings(data),
        *specialist_settings(data, batch, epochs),
        Setting("controls.enabled", True, _WHY_CONTROLS),
        *student_settings(data, batch, epochs),
        *engine_settings(data, hardware, network, ranks),
    ]


# [data]


def data_settings(data: DataSummary, hardware: Hardware) -> list[Setting]:
    settings = [
        Setting(f"data.{split}", pattern, f"{data.examples[split]:,} examples: {_READ_BY[split]}")
        for split, pattern in data.patterns.items()
    ]
    if data.label != "cls":
        settings.append(Setting("data.label", data.label, "where these tars hold the label"))
    if data.input:
        settings.append(Setting("data.input", data.input, "the member that is the input"))
    if data.decoders:
        settings.append(Setting("data.decoders", dict(data.decoders), _why_decoders(data)))
    if not data.is_bags:
        settings += [
            Setting("data.mean", list(data.mean), _why_mean(data)),
            Setting("data.std", list(data.std), _why_std(data)),
        ]
    settings += [
        Setting("data.augment", *choose_augment(data)),
        Setting("data.workers", *choose_workers(data, hardware)),
    ]
    return settings


_READ_BY = {
    "train": "to learn from",
    "val": "groups, early stopping and weights are chosen on it",
    "test": "only read by the final evaluation",
}


def _why_decoders(data: DataSummary) -> str:
    if not data.is_bags:
        return "a text becomes counts of its letter groups in 2,048 bins"
    why = "a text becomes a list of its letter groups, each one of 8,192 bins"
    if data.cut:
        why += f"; {data.cut:.1%} of the texts are read up to their 85th character"
    return why


def _why_mean(data: DataSummary) -> str:
    unit = ", scaled to 0..1" if data.dtype == "uint8" else ""
    each = ""
    if len(data.mean) > 1:
        each = "of each channel " if data.kind == "pictures" else "of each column "
    return f"{each}of {data.sampled:,} training examples{unit}"


def _why_std(data: DataSummary) -> str:
    if not data.constant:
        return "of the same examples"
    shown = ", ".join(map(str, data.constant[:4]))
    if len(data.constant) > 4:
        shown += ", ..."
    what = "channels" if data.kind == "pictures" else "columns"
    return f"of the same examples; 1 for {what} that never change ({shown}, counted from 0)"


def choose_augment(data: DataSummary) -> tuple[str, str]:
    """(data.augment, why)."""
    if data.is_bags:
        why = "leaves out a random fifth of a text's letter groups each time; teachers see the same"
        return "drop_ngrams", why
    if data.kind != "pictures":
        return "none", "views are for pictures"
    if min(data.shape[1:]) < SMALL_SIDE:
        return "none", "the pictures are too small to be moved"
    if data.drawn:
        return "shift", "drawings on one ground: moved, not mirrored, which would alter letters"
    if data.gray:
        return "shift", 'moved; "flip-crop" also mirrors, where left and right mean the same'
    return "flip-crop", 'mirrored and moved; "shift" where left and right differ, as in writing'


def choose_workers(data: DataSummary, hardware: Hardware) -> tuple[int, str]:
    """(data.workers, why)."""
    if data.split_bytes <= CACHED_BYTES:
        return 0, "decoded once into a file that fits in memory: no reading processes are needed"
    share = hardware.cores // max(1, len(hardware.gpus)) - 1
    return max(1, min(4, share)), "too large to keep decoded: processes read beside the training"


# [model]


def choose_network(data: DataSummary, hardware: Hardware) -> Network:
    """A network that suits the inputs and takes at most a quarter of the memory to train."""
    if data.is_bags:
        return _bag_network(data, hardware)
    choose = _picture_network if data.kind == "pictures" else _flat_network
    width = 0
    while True:
        network = choose(data, hardware, width)
        if training_bytes(network) <= hardware.memory / 4 or network.width <= 8:
            return network
        width = network.width // 2


def training_bytes(network: Network) -> int:
    """Weights, gradients and AdamW's two numbers each."""
    return 4 * FLOAT * network.weights


def _bag_network(data: DataSummary, hardware: Hardware) -> Network:
    """A linear network over the bins of letter groups, in a quarter of the memory.

    Measured (docs/recipe.md): on names of 5,000 places 51 % where an mlp over the counts has 36 %.
    Over 150 to 3,000 other classes within 1.4 points of it, in a fifth to a half of the time.
    """
    size = BAG_EMBEDDING
    while size > 8 and 4 * FLOAT * size * (BAG_BINS + data.num_classes) > hardware.memory / 4:
        size //= 2
    weights = size * (BAG_BINS + data.num_classes)
    work = float(size * (math.prod(data.shape) + data.num_classes))
    why = "texts: the sum of the rows of their letter groups, with no layer in between"
    return Network("embedding_bag", BAG_BINS, 0, size, 0.0, why, weights, work, 2 * size)


def _flat_network(data: DataSummary, hardware: Hardware, width: int) -> Network:
    """An mlp for texts and numbers."""
    columns = math.prod(data.shape)
    depth, dropout = 2, 0.2
    least, chosen = 64, 256
    if data.num_classes > MANY_CLASSES:
        least, chosen = 256, 512
    why = "numbers of any shape: layers over all of them"
    if data.kind == "text":
        depth, dropout = 1, 0.5
        why = "one wide layer over the counts of letter groups"
    else:
        chosen = min(chosen, max(least, 1 << (2 * columns - 1).bit_length()))
    width = width or chosen
    weights = columns * width + (depth - 1) * width**2 + width * data.num_classes
    return Network("mlp", width, depth, 0, dropout, why, weights, float(weights), 2 * depth * width)


def _picture_network(data: DataSummary, hardware: Hardware, width: int) -> Network:
    side = max(data.shape[1:])
    if hardware.gpus and 24 <= side <= PHOTO_SIDE:
        return _resnet(data, width or (64 if data.num_classes > MANY_CLASSES else 32))
    chosen = 16
    if hardware.gpus:
        chosen = 64
    elif data.num_classes > 100 or not data.gray:
        chosen = 32
    return _convnet(data, width or chosen, _embedding(data, hardware))


def _embedding(data: DataSummary, hardware: Hardware) -> int:
    """Numbers that the layer to the classes reads. It takes an eighth of the memory at most."""
    size = 256 if data.num_classes > MANY_CLASSES else 128
    while size > 16 and 4 * FLOAT * size * data.num_classes > hardware.memory / 8:
        size //= 2
    return size


def _convnet(data: DataSummary, width: int, embedding: int) -> Network:
    channels, height, across = data.shape
    depth = min(5, max(2, round(math.log2(max(height, across) / 4))))
    width = min(width, 512 >> (depth - 1))
    weights = work = kept = 0
    for stage in range(depth):
        out = width << stage
        height, across = math.ceil(height / 2), math.ceil(across / 2)
        weights += 9 * channels * out
        work += 9 * channels * out * height * across
        kept += 3 * out * height * across
        channels = out
    last = channels * height * across * embedding + embedding * data.num_classes
    per_class = data.examples["train"] / data.present
    dropout = 0.2 if per_class < 200 else 0.0
    why = f"pictures of {data.shape[1]} x {data.shape[2]}: {depth} times halved"
    return Network(
        "convnet", width, depth, embedding, dropout, why, weights + last, float(work + last), kept
    )


def _resnet(data: DataSummary, width: int) -> Network:
    pixels = math.prod(data.shape[1:])
    weights = 9 * width**2 * (6 + 2 * 12 + 4 * 24) // 4 + 4 * width * data.num_classes
    work = 18 * 9 * width**2 * pixels
    why = f"pictures of {data.shape[1]} x {data.shape[2]} and a GPU"
    return Network("resnet", width, 20, 0, 0.0, why, weights, float(work), 60 * width * pixels)


def model_settings(network: Network) -> list[Setting]:
    size = f"about {float(f'{network.weights:.2g}'):,.0f} weights with the layer to the classes"
    settings = [
        Setting("model.name", network.name, network.why),
        Setting("model.width", network.width, size),
    ]
    if network.depth:
        settings.append(Setting("model.depth", network.depth, _DEPTH[network.name]))
    if network.embedding:
        why = "width of the features that the layer to the classes reads"
        settings.append(Setting("model.embedding", network.embedding, why))
    if network.dropout:
        why = "few examples in each class: it keeps the network from memorising them"
        settings.append(Setting("model.dropout", network.dropout, why))
    return settings


_DEPTH = {
    "mlp": "hidden layers",
    "convnet": "stages, each with twice the channels of the one before",
    "resnet": "layers",
}


# [train]


def choose_ranks(data: DataSummary, hardware: Hardware) -> int:
    """Processes that train the generalist together."""
    if hardware.gpus:
        return len(hardware.gpus)
    if data.examples["train"] < 5_000:
        return 1
    return min(2, hardware.cores)


def choose_batch(data: DataSummary, hardware: Hardware, network: Network, ranks: int) -> int:
    """Examples per step: a power of two for each rank.

    At least 8 steps fill an epoch where there are that many examples, and the batch's logits and
    activations take at most an eighth of the memory.
    """
    examples = data.examples["train"]
    wanted = 64 if examples < 2_000 else 128
    if examples >= 20_000 or data.is_bags:
        wanted = 256
    if hardware.gpus:
        wanted = max(wanted, 128 * ranks)
    wanted = min(wanted, max(8, examples // 8), max(2, examples))
    share = _power_of_two(wanted / ranks)
    of_one = FLOAT * (3 * data.num_classes + 2 * network.activations)
    room = hardware.memory / 8
    if not hardware.gpus:
        room /= ranks
    while share > 2 and share * of_one > room:
        share //= 2
    return share * ranks


def _power_of_two(number: float) -> int:
    """The largest one that is not above `number`, at least 2."""
    return 2 ** max(1, math.floor(math.log2(max(number, 2))))


def choose_epochs(data: DataSummary, hardware: Hardware, network: Network, batch: int) -> float:
    """Passes over train: enough steps for a small set, an affordable number for a large one."""
    examples = data.examples["train"]
    enough = max(_usual_epochs(data), LEAST_STEPS * batch / examples)
    affordable = hardware.budget / (network.multiply_adds * examples)
    return _round_epochs(min(enough, affordable))


def _usual_epochs(data: DataSummary) -> int:
    return 12 if data.kind == "text" and not data.is_bags else 20


def _round_epochs(epochs: float) -> float:
    if epochs >= 3:
        return float(round(epochs))
    return max(0.01, float(f"{epochs:.2g}"))


def steps_of(epochs: float, examples: int, batch: int) -> int:
    return max(1, math.ceil(epochs * examples / batch))


def train_settings(data: DataSummary, network: Network, batch: int, epochs: float) -> list[Setting]:
    steps = steps_of(epochs, data.examples["train"], batch)
    settings = [
        Setting("train.epochs", epochs, f"{steps:,} steps: {_why_epochs(data, epochs, batch)}"),
        Setting("train.batch_size", batch, _why_batch(data, batch)),
        Setting("train.learning_rate", _peak_rate(data, batch), "AdamW's peak; it falls to 0"),
        Setting("train.weight_decay", 0.01, "AdamW's usual one"),
        Setting("train.validate_every", _every(steps), f"about {VALIDATIONS} validations"),
    ]
    if data.kind == "text":
        why = "short texts are soon memorised: it keeps predictions from being overconfident"
        settings.append(Setting("train.label_smoothing", 0.1, why))
    if data.largest >= IMBALANCE * data.smallest:
        why = (
            f"classes have {data.smallest:,} to {data.largest:,} examples: rare ones are seen more "
            "often, and the loss corrects for it"
        )
        settings.append(Setting("train.balance", 0.5, why))
    return settings


def _why_epochs(data: DataSummary, epochs: float, batch: int) -> str:
    wanted = _usual_epochs(data)
    if epochs < wanted:
        return "as many as about ten minutes on this machine allow; more would help"
    if epochs > wanted:
        return "a small set needs many passes to be learned"
    return "passes over train"


def _why_batch(data: DataSummary, batch: int) -> str:
    return f"{math.ceil(data.examples['train'] / batch):,} steps are one pass over train"


def _peak_rate(data: DataSummary, batch: int) -> float:
    if data.is_bags:
        return 3e-2  # a row of the embedding is seen in few steps
    if data.kind == "text":
        return 3e-3
    return 1e-3 if batch < 64 else 2e-3


def _every(steps: int) -> int:
    return max(1, math.ceil(steps / VALIDATIONS))


# [clusters] and [specialists]


def choose_groups(present: int) -> int:
    """Groups of about twice the square root of the classes, at most 200 in one."""
    size = min(LARGEST_GROUP, max(2, round(2 * math.sqrt(present))))
    return min(present, max(2, round(present / size))) if present > 3 else 1


def cluster_settings(data: DataSummary) -> list[Setting]:
    groups = choose_groups(data.present)
    size = math.ceil(data.present / groups)
    why = f"about {size} classes in each; a specialist learns one group"
    if groups == 1:
        why = "so few classes are one group: its specialist is the generalist trained on"
    settings = [
        Setting("clusters.num_groups", groups, why),
        Setting("clusters.overlap", 1, "groups that a class belongs to; 2 catches more errors"),
    ]
    if groups > 1:
        why = "the largest group, as a multiple of the mean size"
        settings.append(Setting("clusters.capacity", 1.3, why))
    return settings


def specialist_epochs(data: DataSummary, batch: int, epochs: float) -> float:
    """Passes over a group's examples: a quarter of the generalist's, at least 60 steps."""
    own = data.examples["train"] / choose_groups(data.present)
    return _round_epochs(max(epochs / 4, 60 * batch / (2 * own)))


def specialist_settings(data: DataSummary, batch: int, epochs: float) -> list[Setting]:
    groups = choose_groups(data.present)
    passes = specialist_epochs(data, batch, epochs)
    steps = steps_of(passes, math.ceil(2 * data.examples["train"] / groups), batch)
    why = f"about {steps:,} steps for each; half of a batch are its own classes"
    rate = _peak_rate(data, batch) / 2
    settings = [
        Setting("specialists.epochs", passes, why),
        Setting("specialists.learning_rate", rate, "half of the generalist's peak"),
        Setting("specialists.validate_every", _every(steps), f"about {VALIDATIONS} validations"),
        Setting("specialists.patience", 3, "it stops when val gets no better, and keeps the best"),
    ]
    if data.kind == "text":
        settings.append(Setting("specialists.label_smoothing", 0.0, _WHY_SHARP))
    if groups > 8:
        per_job = math.ceil(groups / 8)
        why = "specialists that one process trains in turn: starting one costs seconds"
        settings.append(Setting("specialists.per_job", per_job, why))
    if data.num_classes > HUGE_CLASSES:
        why = "rows of the classes that a group is confused with; one row stands for the others"
        settings.append(Setting("specialists.dustbin_rows", 1_000, why))
    return settings


_WHY_SHARP = "[train]'s is for the generalist alone"
_WHY_CONTROLS = (
    "the same training without groups, to compare with; false saves about half of the time"
)


# [students.main]


def student_settings(data: DataSummary, batch: int, epochs: float) -> list[Setting]:
    passes = _round_epochs(max(epochs / 2, LEAST_STEPS / 2 * batch / data.examples["train"]))
    passes = min(passes, epochs)
    steps = steps_of(passes, data.examples["train"], batch)
    key = "students.main"
    rate = _peak_rate(data, batch) / 2
    settings = [
        Setting(f"{key}.epochs", passes, "one network that learns the ensemble's predictions"),
        Setting(f"{key}.learning_rate", rate, "it starts as the generalist"),
        Setting(
            f"{key}.hard_weight", 0.2, "weight of the labels beside the ensemble's predictions"
        ),
        Setting(f"{key}.validate_every", _every(steps), f"about {VALIDATIONS} validations"),
    ]
    if data.kind == "text":
        settings.append(Setting(f"{key}.label_smoothing", 0.0, _WHY_SHARP))
    if choose_augment(data)[0] != "none":
        views = max(1, min(4, STORED_VIEWS // data.examples["train"]))
        why = "views of each input, predicted once and stored; without it each view anew"
        settings.append(Setting(f"{key}.views", views, why))
    return settings


# [engine] and [launch]


def engine_settings(
    data: DataSummary, hardware: Hardware, network: Network, ranks: int
) -> list[Setting]:
    settings = [Setting("engine.device", "auto", "a GPU where there is one, else the CPU")]
    logits = FLOAT * 3 * 64 * data.num_classes
    if logits > hardware.memory / 8:
        why = "so many classes that a batch's logits do not fit: they are taken in blocks"
        settings.append(Setting("engine.shard_head", True, why))
    settings.append(Setting("launch.processes", ranks, _why_ranks(data, hardware, ranks)))
    return settings


def _why_ranks(data: DataSummary, hardware: Hardware, ranks: int) -> str:
    if hardware.gpus:
        return "one for each GPU"
    if ranks == 1 < hardware.cores:
        return "ranks of each stage that scales; so few examples are not worth a second"
    return "ranks of each stage that scales, one per core up to 2"
