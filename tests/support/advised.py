"""A made-up advice.json: a generalist of 10,000 classes and what seven levers would do for it."""

import copy

from pipeline.advice.choosing import choose

GENERALIST = {
    "top1": 0.5175,
    "nll": 3.175,
    "steps": 20_000,
    "multiplications": 1_689_000,
    "parameters": 2_400_000,
    "latency_ms": 0.120,
}


def lever(name, gain, half, training, multiplications, parameters, latency, **more):
    """multiplications, parameters, latency: × the generalist's."""
    return {
        "name": name,
        "gain": gain,
        "low": round(gain - half, 3),
        "high": round(gain + half, 3),
        "training": training,
        "wall_clock": training,
        "multiplications": multiplications * GENERALIST["multiplications"],
        "parameters": parameters * GENERALIST["parameters"],
        "latency_ms": latency * GENERALIST["latency_ms"],
        "measured": {
            "share": 0.15,
            "gain": gain / 3,
            "low": gain / 3 - 0.4,
            "high": gain / 3 + 0.4,
        },
        "needs": "",
        **more,
    }


LEVERS = [
    lever("train_on", 0.9, 0.6, 1.0, 1.0, 1.0, 1.0, needs="as many steps again"),
    lever("wider", 3.3, 1.3, 2.0, 2.0, 2.0, 1.8, needs="a network of twice the width"),
    lever("average", 3.5, 0.7, 1.0, 2.0, 2.0, 2.0, needs="both networks at each answer"),
    lever(
        "shortlist",
        4.8,
        0.8,
        1.0,
        1.004,
        2.0,
        1.1,
        shortlist=100,
        needs="a second trunk, and 100 rows of its head, at each answer",
    ),
    lever(
        "average_student", 2.1, 1.1, 2.0, 1.0, 1.0, 1.0, needs="one network; a student's training"
    ),
    lever("copies", 1.2, 0.9, 1.4, 2.1, 7.0, 2.2, wall_clock=0.2, needs="24 jobs, side by side"),
    lever("branches", 1.5, 0.8, 0.6, 1.05, 1.2, 1.3, wall_clock=0.15, needs="a pass for features"),
]


def made_up(scarce="", limit=None, levers=LEVERS, **more):
    """advice.json as the stage would write it, of these levers."""
    chosen = choose(copy.deepcopy(levers), GENERALIST, scarce, limit)
    return {
        "schema": 1,
        **chosen,
        "spent": 0.27,
        "budget": 0.3,
        "diagnosis": {
            "state": "steps",
            "sentences": [
                "The loss on train still falls: the generalist is short of steps.",
                "Its errors on val lie inside of groups (58 %, chance 6 %).",
            ],
        },
        "generalist": dict(GENERALIST),
        "rounds": [
            {
                "families": ["on", "wide", "second", "copies", "branches"],
                "dropped": ["on", "copies"],
                "share": 0.12,
            },
            {"families": ["wide", "second", "branches"], "dropped": [], "share": 0.15},
        ],
        "not_possible": {"rerank": "10,000 classes, but a head without bias"},
        **more,
    }
