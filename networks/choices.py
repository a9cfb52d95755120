"""The built-in networks by name, and what a builder has to be.  No torch here: the config reads it.

A builder is a function `builder(shape, **options)` in any module.

    shape     the shape of one input as the trunk reads it, say (3, 32, 32)
    options   keyword parameters, each with a default.  Of width, depth, embedding and dropout in
              [model] a built-in gets those that it declares; [model.options] may name any option.
              A user's own module:function gets [model.options] alone.
              It raises ValueError for a value that it cannot take, naming the value and the rule.
    returns   an nn.Module [B, *shape] -> features [B, D], with weights drawn from torch's global
              generator.  The linear layer to the classes comes behind it and is not part of it.

An nn.Sequential of named blocks that all have parameters is best: `trainable = "last-N-blocks"`
counts them, and a Hydra is cut between them.  A new built-in is one row here and one function.
"""

# name in [model] and in model.json -> "module:function"
NETWORKS: dict[str, str] = {
    "mlp": "networks.builders:mlp",
    "convnet": "networks.builders:convnet",
    "resnet": "networks.builders:resnet",
    "wideresnet": "networks.builders:wideresnet",
}
