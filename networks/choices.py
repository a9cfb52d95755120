"""What can be chosen by name, and what a builder has to be.  No torch here: the config reads it.

A builder is a function `builder(shape, **options)` in any module.

    shape     the shape of one input as the trunk reads it, say (3, 32, 32)
    options   keyword parameters, each with a default.  Of width, depth, embedding and
              dropout in [model] a built-in gets those that it declares; [model.options]
              may name any option. A user's own module:function gets [model.options]
              alone. It raises ValueError for a value that it cannot take, naming the
              value and the rule.
    returns   an nn.Module [B, *shape] -> features [B, D], with weights drawn from torch's
              global generator.  The linear layer to the classes comes behind it and is
              not part of it.

A builder with the attribute `takes_indices = True` gets int32 inputs as they are, unscaled: bins of
n-grams, rows of a table.

An nn.Sequential of named blocks that all have parameters is best: `trainable = "last-N-blocks"`
counts them, and a Hydra is cut between them.  A new built-in is one row here and one function.
"""

# name in [model] and in model.json -> "module:function"
NETWORKS: dict[str, str] = {
    "mlp": "networks.builders:mlp",
    "convnet": "networks.builders:convnet",
    "resnet": "networks.builders:resnet",
    "wideresnet": "networks.builders:wideresnet",
    "embedding_bag": "networks.builders:embedding_bag",
}

# name in model.margin_kind and in model.json -> "module:function" of (the label's logits s cos [n],
# s [n], margin) -> the label's logits with the margin, [n]
MARGINS: dict[str, str] = {
    "cosface": "networks.cosine:cosface",
    "arcface": "networks.cosine:arcface",
}

# Keys under which checkpoints keep weights.  Of two that a file has, the averaged ones are better.
AVERAGED = (
    "state_dict_ema",
    "ema_state_dict",
    "model_ema",
    "ema_model",
    "model_state_dict_ema",
    "model_ema_state_dict",
    "ema",
    "averaged",
    "swa_state_dict",
    "swa_model",
)
PLAIN = (
    "state_dict",
    "model_state_dict",
    "model_state",
    "model",
    "net",
    "network",
    "net_state_dict",
    "weights",
    "params",
    "module",
    "shadow",
)
# Keys, as a pattern, under which they keep what only training needs.
BESIDE_WEIGHTS = (
    r"optim\w*|\w*sched\w*|(\w+_)?scaler\w*|amp|(\w+_)?rng(_\w+)?|callbacks|loops|hparams\w*|"
    r"hyper_parameters|datamodule\w*|best_\w+|epoch\w*|(global_)?steps?|iter\w*|metrics?|meters?|"
    r"args|config|cfg|opt|random_state|n_averaged|arch"
)
