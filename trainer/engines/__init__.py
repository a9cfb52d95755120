"""How a step is taken on many ranks.  An engine has prepare, backward, step, save / load and export; the loop knows
no more."""


def build_engine(config, ranks):
    """The engine that `[engine] name` asks for, on these ranks."""
    from .ddp import DDPEngine

    return {"ddp": DDPEngine}[config.name](config, ranks)
