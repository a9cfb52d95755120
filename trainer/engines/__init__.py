"""How a step is taken on many ranks.

An engine has prepare, autocast, accumulating, backward and step; state for checkpoints, from which prepare goes on;
judged and export for whoever wants the network; close.  The loop knows no more, and nothing behind export knows which
engine ran.
"""

from ..config import Engine, Schedule, UserError
from ..distributed import Ranks


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


def refuse_average_of_split_weights(schedule: Schedule) -> None:
    """Of ZeRO stage 3: a rank sees a part of each weight at a time."""
    if schedule.ema:
        raise UserError(
            f"ema = {schedule.ema}: with engine.zero_stage = 3 no rank holds the weights to average; take zero_stage "
            "0, 1 or 2, or ema = 0"
        )
