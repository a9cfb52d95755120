"""The defaults that stages' keys are made against.  Do not change a value in this file.

A stage's key holds only the values that differ from these.  So a key of the config that is added
later, at its default, stales no finished run. A default that changes later enters the keys of new
runs, because it differs from the one here.  A new key of the config is added to `SINCE_SCHEMA_1`
with the default that it was born with. `tests/pipeline/test_identity.py` says when one is
missing.  Where the meaning of a default itself changes, raise `pipeline.store.SCHEMA`.
"""

SCHEDULE = {
    "batch_size": 256,
    "optimizer": "adamw",
    "learning_rate": 0.002,
    "schedule": "cosine",
    "warmup": 0.05,
    "weight_decay": 0.01,
    "momentum": 0.9,
    "beta2": 0.999,
    "label_smoothing": 0.0,
    "ema": 0.0,
    "accumulation": 1,
    "clip_norm": 0.0,
    "balance": 0.0,
    "validate_every": 0,
    "patience": 0,
}

# The keys that runs of schema 1 were made with.  A key whose default is None is absent.
SCHEMA_1 = {
    "seed": 0,
    "data": {
        "train": "",
        "val": "",
        "test": "",
        "transfer": "",
        "label": "cls",
        "input": "",
        "mean": [0.5],
        "std": [0.25],
        "augment": "none",
        "damage": "strict",
        "damage_share": 0.01,
        "manifest": None,
        "decoders": {},
        "classes": None,
    },
    "model": {
        "name": "convnet",
        "width": None,
        "depth": None,
        "embedding": None,
        "dropout": 0.0,
        "options": {},
    },
    "train": {"steps": None, "epochs": None, "negatives": None, **SCHEDULE},
    "generalist": {"from": "", "head": None},
    "clusters": {
        "num_groups": 16,
        "method": "kmeans",
        "capacity": 1.3,
        "overlap": 1,
        "coverage": None,
        "groups_file": "",
        "top_k": None,
        "min_gain": 0.0,
    },
    "specialists": {
        "steps": None,
        "epochs": None,
        "negatives": None,
        **SCHEDULE,
        "dustbin": "preserving",
        "dustbin_rows": None,
        "soft_weight": 1.0,
        "hard_negatives": 0.0,
        "trainable": "all",
        "freeze_norm": True,
        "fraction": 0.5,
    },
    "controls": {"enabled": True, "learning_rates": []},
    "ensemble": {
        "kind": "specialists",
        "members": 4,
        "gate": 1,
        "max_specialists": None,
        "combine": "kl",
        "temperatures": True,
        "fit_weight": True,
    },
    "students": {
        "steps": None,
        "epochs": None,
        "negatives": None,
        **SCHEDULE,
        "method": "distill",
        "network": "single",
        "members": None,
        "head_blocks": 0,
        "start": "generalist",
        "teacher": "ensemble",
        "mean": "arithmetic",
        "temperature": 1.0,
        "hard_weight": 0.0,
        "soft_weight": 1.0,
        "perturb": "none",
        "perturb_size": 1 / 255,
        "augment": None,
        "views": None,
        "share": 1.0,
        "leave_out": [],
        "bias_correction": False,
        "transfer_share": None,
        "model": {},
    },
}

# Keys that were added later, with the default that they were added with.
SINCE_SCHEMA_1 = {
    "data": {"augment_share": 0.2, "augment_options": {}, "stream_shards": 0},
    "model": {"head": "linear", "scale": None, "margin": 0.0, "margin_kind": "cosface"},
    "generalist": {"weights": None, "prefix": ""},
    "clusters": {"capacity_of": "classes", "specialists": None, "train_examples": None},
    "ensemble": {"shortlist": None, "order": 0.0},
    "train": {
        "loss": "cross_entropy",
        "row_rate": None,
        "trainable": "all",
        "layer_decay": 1.0,
        "mixup": 0.0,
        "cutmix": 0.0,
    },
    "specialists": {
        "loss": "cross_entropy",
        "row_rate": None,
        "layer_decay": 1.0,
        "kind": "copy",
        "from": "generalist",
        "blocks": 0,
        "model": {},
        "views": 0,
    },
    "students": {
        "loss": "cross_entropy",
        "row_rate": None,
        "wrong_weight": 0.0,
        "answers": "auto",
        "augment_share": None,
        "perturb_share": 0.5,
        "answers_mass": 0.999,
        "answers_bytes": 4294967296,
    },
    "rerank": {
        "steps": None,
        "epochs": None,
        "negatives": None,
        "loss": "cross_entropy",
        "row_rate": None,
        **SCHEDULE,
        "k": 50,
        "random": 1024,
        "start": "scratch",
        "model": {},
    },
}

# Keys that change no metric of any stage.
IN_NO_KEY = {
    "data": ["cache", "cache_bytes", "workers", "pin_memory", "fetch_dir", "fetch_bytes"],
    "train": ["checkpoint_every", "keep", "log_every"],
    "specialists": ["checkpoint_every", "keep", "log_every", "per_job", "features_bytes"],
    "students": ["checkpoint_every", "keep", "log_every"],
    "rerank": ["checkpoint_every", "keep", "log_every", "shortlists_bytes"],
    "ensemble": ["allow_missing"],
}
# Keys of which pipeline.graph says itself how they enter a key.
IN_A_KEY_OTHERWISE = {
    "advise": ["budget", "levers", "scarce", "limit", "workers"],
    "data": ["ood"],
    "controls": ["twins", "rows", "model", "max_share"],
    "ensemble": ["networks"],
    "extend": ["run", "companions"],
    "route": ["mode", "max_bytes"],
}
