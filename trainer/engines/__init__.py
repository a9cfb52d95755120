"""How a step is taken on many ranks.

An engine has prepare, autocast, accumulating, backward and step; state for checkpoints, from which prepare goes on;
eval_model and export for whoever wants the network; close.  The loop knows no more, and nothing behind export knows which
engine ran.
"""

from pipeline.config import Engine

from ..distributed.ranks import Ranks


def build_engine(config: Engine, ranks: Ranks):
    """The engine that `[engine] name` asks for, on these ranks.  DeepSpeed is imported only where it is chosen."""
    if config.name == "deepspeed":
        from .zero import DeepSpeedEngine

        return DeepSpeedEngine(config, ranks)
    if config.shard_head:
        from .sharded import ShardedHeadEngine

        return ShardedHeadEngine(config, ranks)
    from .ddp import DDPEngine

    return DDPEngine(config, ranks)
